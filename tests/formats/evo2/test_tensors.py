"""The tensors of StripedHyena 2: every name and layout, in both directions, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError
from hyaena.formats import read_config
from hyaena.formats.evo2.tensors import our_name, to_ours
from hyaena.formats.tensors import format_of, matches_tensors, state_to_ours, state_to_theirs
from hyaena.model import StripedHyena
from hyaena.sizes import ModelSizes

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ["evo2-tiny", "evo2-tiny/hcm128"]
STRAY = ("filter.t", "_extra_state")


def golden(case: str) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    return read_config(GOLDEN / case / "config.yml"), load_file(GOLDEN / case / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_original_to_ours_and_back_is_the_identity(case: str) -> None:
    config, state = golden(case)
    back = state_to_theirs(state_to_ours(state, config), config)
    kept = {key: tensor for key, tensor in state.items() if not key.endswith(STRAY)}
    assert len(kept) < len(state)
    assert back.keys() == kept.keys()
    for key, tensor in kept.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].dtype == tensor.dtype


@pytest.mark.parametrize("case", CASES)
def test_our_names_shapes_and_number_of_parameters(case: str) -> None:
    config, state = golden(case)
    ours = state_to_ours(state, config)
    assert not matches_tensors(ours)
    frequencies = ours["rotary.frequencies"]
    assert sum(tensor.numel() for tensor in ours.values()) - len(frequencies) == ModelSizes(config).parameters
    expected = StripedHyena(config).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in expected.items()}


def test_interleaved_channels_become_three_blocks() -> None:
    config = golden("evo2-tiny")[0]
    rows = torch.arange(192.0)
    item = to_ours("blocks.0.projections.bias", rows, config)
    assert item is not None and item[0] == "layers.0.mixer.in_proj.bias"
    x2, x1, v = item[1].split(64)
    assert torch.equal(x2, rows[0::3]) and torch.equal(x1, rows[1::3]) and torch.equal(v, rows[2::3])


def test_projections_of_attention_are_sorted_by_head_no_more() -> None:
    config = golden("evo2-tiny")[0]  # 4 heads of 16
    item = to_ours("blocks.3.inner_mha_cls.Wqkv.weight", torch.arange(192.0)[:, None], config)
    assert item is not None
    q, k, v = item[1][:, 0].view(3, 4, 16)
    for head in range(4):
        first = 48 * head
        assert q[head].tolist() == list(range(first, first + 16))
        assert k[head].tolist() == list(range(first + 16, first + 32))
        assert v[head].tolist() == list(range(first + 32, first + 48))


@pytest.mark.parametrize(("taps", "first"), [(7, 6), (127, 126), (128, 0), (160, 0)])
def test_taps_begin_with_the_current_step_on_either_side_of_the_switch(taps: int, first: int) -> None:
    config = golden("evo2-tiny")[0]
    item = to_ours("blocks.0.filter.h", torch.arange(float(taps)).expand(8, 1, taps), config)
    assert item is not None and item[0] == "layers.0.mixer.long_filter.taps"
    assert item[1].shape == (8, taps) and item[1][0, 0] == first
    back = format_of(config).to_theirs(item[0], item[1], config)
    assert back is not None and back[1][0, 0].tolist() == list(range(taps))


@pytest.mark.parametrize(
    "key",
    [
        "blocks.2.mixer.mixer.filter.t",
        "blocks.2.filter.t",
        "blocks.3.mixer.dense._extra_state",
        "blocks.3.mixer.attn._extra_state",
        "blocks.0.mlp.l1._extra_state",
        "blocks.0.out_filter_dense._extra_state",
        "blocks.3.inner_mha_cls.Wqkv._extra_state",
        "backbone.blocks.0.mlp.l1._extra_state",
    ],
)
def test_stray_keys_are_dropped(key: str) -> None:
    assert our_name(key) is None


def test_frequencies_must_agree() -> None:
    config = replace(golden("evo2-tiny")[0], layer_types=("attention", "attention", "hyena_li"))
    stored = torch.rand(8)
    names = [f"blocks.{i}.inner_mha_cls.rotary_emb.inv_freq" for i in (0, 1)]
    assert torch.equal(state_to_ours(dict.fromkeys(names, stored), config)["rotary.frequencies"], stored)
    with pytest.raises(CheckpointError, match=r"blocks\.1\..*inv_freq differs from that of another"):
        state_to_ours({names[0]: stored, names[1]: stored + 1e-3}, config)


def test_frequencies_are_computed_where_a_file_has_none() -> None:
    config, state = golden("evo2-tiny")
    del state["blocks.3.inner_mha_cls.rotary_emb.inv_freq"]
    model = StripedHyena(config)
    model.rotary.frequencies = torch.zeros(8)
    model.load_state_dict(state)
    torch.testing.assert_close(model.rotary.frequencies, 10_000 ** (-torch.arange(8) / 8), rtol=1e-6, atol=0)


def test_frequencies_are_those_of_the_file() -> None:
    config, state = golden("evo2-tiny")
    key = "blocks.3.inner_mha_cls.rotary_emb.inv_freq"
    ids = torch.randint(256, (1, 40))
    model = StripedHyena(config).requires_grad_(False)
    model.load_state_dict(state)
    plain = model(ids)
    model.load_state_dict(state | {key: state[key].bfloat16()})
    assert model.rotary.frequencies is not None and model.rotary.frequencies.dtype == torch.float32
    assert torch.equal(model.rotary.frequencies, state[key].bfloat16().float())
    assert float((model(ids) - plain).abs().max() / plain.abs().max()) > 1e-5


def test_a_head_that_differs_from_a_tied_embedding_is_refused() -> None:
    config, state = golden("evo2-tiny")
    state["unembed.weight"] = state["unembed.weight"] + 1
    with pytest.raises(CheckpointError, match="tie_embeddings is true"):
        state_to_ours(state, config)
