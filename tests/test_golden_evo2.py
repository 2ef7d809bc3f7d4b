"""StripedHyena 2: the original's numbers (vortex, float32), reproduced from its own checkpoints and configurations.

Where the original is wrong, ours is right: prompts shorter than a filter, and continuing a cache with several tokens.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyaena.checkpoints import load_model
from hyaena.decoding import Decoder
from hyaena.formats import read_config
from hyaena.model import StripedHyena
from hyaena.ops import HyenaState, KVState, RealModalFilter
from hyaena.sampling import SamplingParams

CASES = ("evo2-tiny", "evo2-tiny/hcm128")
TOLERANCE = 1e-5
"""Of the largest logit: the original differs from a float64 evaluation by 2.4e-6, and the smallest mistake by 2e-4."""


def load(folder: Path) -> tuple[StripedHyena, dict[str, torch.Tensor]]:
    config = read_config(folder / "config.yml")
    model = StripedHyena(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), load_file(folder / "expected.safetensors")


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def check_states(cache_states: list, expected: dict[str, torch.Tensor], when: str) -> None:
    """Every state is the original's: windows of filters, modes, keys and values."""
    seen = 0
    for i, state in enumerate(cache_states):
        if isinstance(state, KVState):
            if when == "final":  # not among the original's numbers
                continue
            kv = expected[f"{when}.kv.{i}"]  # [B,T,2,H,hd]
            for row in range(len(kv)):
                held = [t[:, : kv.shape[1]].transpose(0, 1) for t in (state.keys(row), state.values(row))]
                assert relative(torch.stack(held, dim=1), kv[row]) < TOLERANCE
            continue
        assert isinstance(state, HyenaState)
        fir = expected[f"{when}.fir_state.{i}"].unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2)
        assert relative(state.short[..., -fir.shape[-1] :], fir) < TOLERANCE
        modes = expected.get(f"{when}.iir_state.{i}")
        window = expected.get(f"{when}.fir_inner_state.{i}")
        if modes is not None:
            assert relative(state.long, modes) < TOLERANCE
        else:
            assert window is not None
            assert relative(state.long[..., -window.shape[-1] :], window) < TOLERANCE
            assert not state.long[..., : -window.shape[-1]].any()  # before the first token there was nothing
        seen += 1
    assert seen >= 3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["auto", "recurrence", "fft", "blocked"])
def test_prefill(golden: Path, case: str, method: str) -> None:
    model, expected = load(golden / case)
    ids = expected["input_ids"]
    cache = model.make_cache(ids.shape[0], method=method)
    hidden = {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, __, out, i=i: hidden.update({i: out[0]}))
    with torch.inference_mode():
        assert relative(model(ids, method=method), expected["logits"]) < TOLERANCE
        assert relative(model(ids, cache=cache, method=method), expected["logits"]) < TOLERANCE
    for i, out in hidden.items():
        assert relative(out, expected[f"block_out.{i}"]) < TOLERANCE
    check_states(cache.states, expected, "prefill")


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
    assert relative(torch.cat(logits, dim=1), expected["decode_logits"]) < TOLERANCE
    check_states(cache.states, expected, "final")


@pytest.mark.parametrize("case", CASES)
def test_static_decoding(golden: Path, case: str) -> None:
    model, expected = load(golden / case)
    ids, greedy = expected["input_ids"], expected["greedy_ids"]
    rows, steps = greedy.shape
    cache = model.make_cache(rows, max_length=ids.shape[1] + steps)
    params = [SamplingParams()] * rows
    decoder = Decoder(model, rows)
    with torch.inference_mode():
        first = model(ids, cache=cache, logits_to_keep=1)[:, 0].argmax(-1)
    decoder.add(cache, first, params, [p.generator() for p in params])
    found = [first.tolist()]
    for _ in range(steps - 1):
        decoder.launch()
        found.append(decoder.fetch().tokens)
    assert torch.tensor(found).T.tolist() == greedy.tolist()
    check_states(decoder.cache().states, expected, "final")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", range(1, 8))
def test_short_prompts_decode_as_one_pass_does(golden: Path, case: str, prompt: int) -> None:
    """The original takes the wrong taps after prompts shorter than a filter (engine.py:425): off by 1.2 and more."""
    model, expected = load(golden / case)
    ids = expected["input_ids"][:, :30]
    cache = model.make_cache(len(ids))
    with torch.inference_mode():
        whole = model(ids)
        steps = [model(ids[:, :prompt], cache=cache)]
        steps += [model(ids[:, t : t + 1], cache=cache) for t in range(prompt, ids.shape[1])]
    assert relative(torch.cat(steps, dim=1), whole) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_cache_is_continued_with_several_tokens(golden: Path, case: str) -> None:
    """The original keeps the last of them only (model.py:322)."""
    model, expected = load(golden / case)
    ids = expected["input_ids"]
    cache = model.make_cache(len(ids))
    with torch.inference_mode():
        parts = [model(part, cache=cache) for part in ids.split([5, 1, 17, ids.shape[1] - 23], dim=1)]
    assert relative(torch.cat(parts, dim=1), expected["logits"]) < TOLERANCE
    check_states(cache.states, expected, "prefill")


@pytest.mark.parametrize("case", CASES)
def test_left_padding_contributes_nothing(golden: Path, case: str) -> None:
    """The original zeroes the keys of padding, whose scores of 0 still count (model.py:89)."""
    model, expected = load(golden / case)
    ids = torch.nn.functional.pad(expected["input_ids"], (6, 0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :6] = False
    cache = model.make_cache(len(ids))
    with torch.inference_mode():
        assert relative(model(ids, mask=mask)[:, 6:], expected["logits"]) < TOLERANCE
        assert relative(model(ids, mask=mask, cache=cache)[:, 6:], expected["logits"]) < TOLERANCE
    check_states(cache.states, expected, "prefill")


@pytest.mark.parametrize("case", CASES)
def test_folders_load_with_what_published_files_hold_beside_the_weights(golden: Path, case: str) -> None:
    model = load_model(golden / case)
    plain, expected = load(golden / case)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.inference_mode():
        assert relative(model(expected["input_ids"]), expected["logits"]) < TOLERANCE


def test_the_cases_are_float32_and_of_every_kind(golden: Path) -> None:
    model, _ = load(golden / CASES[0])
    assert set(model.config.layer_types) == {"attention", "hyena_se", "hyena_mr", "hyena_li"}
    assert isinstance(model.layers[2].mixer.long_filter(), RealModalFilter)
    model = model.bfloat16()
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == {"rotary.frequencies"} | {
        f"layers.{i}.mixer.long_filter.{name}" for i in (2, 5) for name in ("log_poles", "residues")
    }
