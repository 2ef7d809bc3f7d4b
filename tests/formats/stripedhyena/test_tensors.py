"""The key map: every name, every layout, both directions, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError
from hyaena.formats import read_config
from hyaena.formats.stripedhyena.tensors import to_ours
from hyaena.formats.tensors import matches_tensors, state_to_ours, state_to_theirs
from hyaena.sizes import ModelSizes

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ["sh-tiny", "evo-tiny", "evo8k-tiny"]


def golden(case: str) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    return read_config(GOLDEN / case / "config.yml"), load_file(GOLDEN / case / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_original_to_ours_and_back_is_the_identity(case: str) -> None:
    config, state = golden(case)
    back = state_to_theirs(state_to_ours(state, config), config)
    if config.tie_embeddings:  # the original refuses a checkpoint without it
        assert torch.equal(back.pop("unembed.weight"), state["embedding_layer.weight"])
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].dtype == tensor.dtype


@pytest.mark.parametrize("case", CASES)
def test_our_names_shapes_and_number_of_parameters(case: str) -> None:
    config, state = golden(case)
    ours = state_to_ours(state, config)
    assert not matches_tensors(ours)
    assert sum(tensor.numel() for tensor in ours.values()) == ModelSizes(config).parameters
    d, n = config.hidden_size, config.state_size
    i = config.layer_types.index("hyena")
    assert ours[f"layers.{i}.mixer.short_filter.weight"].shape == (3 * d, config.short_filter_length)
    assert ours[f"layers.{i}.mixer.long_filter.poles"].shape == (d, n, 2)
    assert ours[f"layers.{i}.mixer.long_filter.residues"].shape == (d, n, 2)
    assert ours[f"layers.{i}.mixer.in_proj.weight"].shape == (3 * d, d)


def test_interleaved_rows_become_three_blocks() -> None:
    """Two heads of three channels: per head the original stores x2, x1, v; ours are all of x2, all of x1, all of v."""
    config = replace(
        golden("evo-tiny")[0], hidden_size=6, num_attention_heads=2, num_key_value_heads=2, layer_types=("hyena",)
    )
    theirs = ["x2a", "x2b", "x2c", "x1a", "x1b", "x1c", "va", "vb", "vc", "x2d", "x2e", "x2f", "x1d", "x1e", "x1f"]
    theirs += ["vd", "ve", "vf"]
    ours = [f"{block}{channel}" for block in ("x2", "x1", "v") for channel in "abcdef"]
    rows = torch.arange(18.0)
    item = to_ours("blocks.0.projections.bias", rows, config)
    assert item is not None and item[0] == "layers.0.mixer.in_proj.bias"
    assert [theirs[int(row)] for row in item[1]] == ours
    weight = rows[:, None, None].expand(18, 1, 3)
    item = to_ours("blocks.0.filter.short_filter_weight", weight, config)
    assert item is not None and [theirs[int(row)] for row in item[1][:, 0]] == ours
    plain = to_ours("blocks.0.projections.bias", rows, replace(config, column_split_hyena=False))
    assert plain is not None and torch.equal(plain[1], rows)


@pytest.mark.parametrize("case", CASES)
def test_the_hub_prefix_is_accepted(case: str) -> None:
    config, state = golden(case)
    prefixed = state_to_ours({f"backbone.{key}": tensor for key, tensor in state.items()}, config)
    plain = state_to_ours(state, config)
    assert prefixed.keys() == plain.keys()
    assert all(torch.equal(prefixed[key], plain[key]) for key in plain)
    assert matches_tensors(state) and matches_tensors(f"backbone.{key}" for key in state)


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.filter.t",
        "blocks.0.filter.freq",
        "blocks.2.inner_mha_cls.rotary_emb.inv_freq",
        "blocks.0.mlp.l1._extra_state",
        "backbone.blocks.11.projections._extra_state",
        "_extra_state",
    ],
)
def test_what_is_recomputed_is_dropped(key: str) -> None:
    assert to_ours(key, torch.zeros(3), golden("evo-tiny")[0]) is None


@pytest.mark.parametrize("key", ["blocks.0.filter.tt", "blocks.x.norm", "blocks.0.other", "lm_head.scale", "optimizer"])
def test_unknown_keys_pass_under_their_own_name(key: str) -> None:
    tensor = torch.zeros(3)
    assert to_ours(key, tensor, golden("evo-tiny")[0]) == (key, tensor)


def test_misshapen_tensors_pass_with_their_own_shape() -> None:
    config = golden("evo-tiny")[0]
    item = to_ours("blocks.0.projections.weight", torch.zeros(5, 64), config)
    assert item is not None and item[1].shape == (5, 64)
    item = to_ours("blocks.0.filter.poles", torch.zeros(64, 8, 3, 2), config)
    assert item is not None and item[1].shape == (64, 8, 3, 2)


def test_a_tied_head_may_be_absent_or_equal_but_not_different() -> None:
    config, state = golden("evo-tiny")
    same = state_to_ours(state | {"unembed.weight": state["embedding_layer.weight"].clone()}, config)
    assert "lm_head.weight" not in same
    with pytest.raises(CheckpointError, match=r"unembed.weight differs from embedding_layer.weight"):
        state_to_ours(state | {"unembed.weight": state["embedding_layer.weight"] + 1}, config)


@given(
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 3),
    modes=st.integers(1, 3),
    taps=st.integers(1, 4),
    split=st.booleans(),
)
def test_random_hyena_layers_survive_both_directions(
    heads: int, head_dim: int, modes: int, taps: int, split: bool
) -> None:
    d = 2 * heads * head_dim
    config = ModelConfig(
        vocab_size=4,
        hidden_size=d,
        layer_types=("hyena",),
        intermediate_size=4,
        num_attention_heads=heads,
        num_key_value_heads=1,
        state_size=modes,
        short_filter_length=taps,
        column_split_hyena=split,
    )
    shapes = {
        "projections.weight": (3 * d, d),
        "projections.bias": (3 * d,),
        "filter.short_filter_weight": (3 * d, 1, taps),
        "filter.short_filter_bias": (3 * d,),
        "filter.poles": (d, modes, 1, 2),
        "filter.residues": (d, modes, 1, 2),
    }
    state = {f"blocks.0.{key}": torch.randn(shape).bfloat16() for key, shape in shapes.items()}
    back = state_to_theirs(state_to_ours(state, config), config)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
