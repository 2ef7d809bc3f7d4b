"""The original implementation's numbers, reproduced in float32 from its own checkpoints and configurations."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyaena.config import ModelConfig
from hyaena.formats import read_config
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState, ModalFilter

CASES = ("sh-tiny", "evo-tiny", "evo8k-tiny")


def load(folder: Path) -> tuple[StripedHyena, dict[str, torch.Tensor]]:
    config = read_config(folder / "config.yml")
    model = StripedHyena(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, load_file(folder / "expected.safetensors")


def original_channel_order(fir: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Our [B,3D,K-1] blocks, interleaved per head where the original interleaves them."""
    if not config.column_split_hyena:
        return fir
    return fir.unflatten(1, (3, config.num_attention_heads, -1)).transpose(1, 2).flatten(1, 3)


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["auto", *ModalFilter.methods])
def test_prefill(golden: Path, case: str, method: str) -> None:
    model, expected = load(golden / case)
    ids = expected["input_ids"]
    cache = model.make_cache(ids.shape[0], method=method)
    with torch.inference_mode():
        assert relative(model(ids, method=method), expected["logits"]) < 1e-4
        assert relative(model(ids, cache=cache, method=method), expected["logits"]) < 1e-4
    states = {i: layer for i, layer in enumerate(cache.states) if isinstance(layer, HyenaState)}
    assert states
    for i, state in states.items():
        fir = original_channel_order(state.short, model.config)
        assert relative(fir, expected[f"prefill.fir_state.{i}"]) < 1e-4
        if state.long.is_complex():  # truncated filters keep a window instead
            assert relative(torch.view_as_real(state.long), expected[f"prefill.iir_state.{i}"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_greedy_decoding(golden: Path, case: str) -> None:
    model, expected = load(golden / case)
    ids, greedy = expected["input_ids"], expected["greedy_ids"]
    cache = model.make_cache(ids.shape[0], max_length=ids.shape[1] + greedy.shape[1])
    with torch.inference_mode():
        chosen = [model(ids, cache=cache, logits_to_keep=1).argmax(-1)]
        logits = []
        for _ in range(greedy.shape[1] - 1):
            logits.append(model(chosen[-1], cache=cache))
            chosen.append(logits[-1].argmax(-1))
    assert torch.equal(torch.cat(chosen, dim=1), greedy)
    assert relative(torch.cat(logits, dim=1), expected["decode_logits"]) < 1e-4
    for i, layer in enumerate(cache.states):
        if isinstance(layer, HyenaState):
            assert relative(torch.view_as_real(layer.long), expected[f"final.iir_state.{i}"]) < 1e-4
