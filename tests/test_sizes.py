"""Sizes are arithmetic: they must equal the published figures, and those of the tensors themselves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from configs import TINY
from hyaena.bench.run import SH_7B
from hyaena.config import ModelConfig
from hyaena.errors import ConfigError
from hyaena.formats import read_config
from hyaena.layers import MIXERS
from hyaena.model import StripedHyena
from hyaena.sizes import LAYER_SIZES, LayerSize, ModelSizes

BFLOAT16 = 2
MISTRAL = dataclasses.replace(SH_7B, layer_types=("attention",) * 32)
ROOT = Path(__file__).parents[1]


def test_the_preset_is_the_published_configuration() -> None:
    published = ModelConfig.from_name("sh-7b")
    other = {"name": SH_7B.name, "max_length": SH_7B.max_length, "prefill_style": "auto"}
    assert dataclasses.replace(published, **other) == SH_7B


def test_floors_need_no_torch() -> None:
    code = "import sys, hyaena.sizes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "src")})


def test_a_decoding_step_of_the_7b() -> None:
    """15.03 GB + B·(65,536·context + 3.67 MB) in bfloat16."""
    step = ModelSizes(SH_7B).decode_bytes(1, 0, BFLOAT16)
    assert ModelSizes(SH_7B).state_bytes(BFLOAT16) == 1.75 * 2**20
    assert step - 2 * ModelSizes(SH_7B).state_bytes(BFLOAT16) == pytest.approx(15.03e9, rel=1e-3)
    assert ModelSizes(SH_7B).decode_bytes(16, 1000, BFLOAT16) - step == 15 * 3_670_016 + 16 * 65_536_000


# Rounded to three digits where they are stated; the last of them carries an uncertainty of 0.2 %.
STATED = 2.5e-3
TWO_DIGITS = 1e-2


@pytest.mark.parametrize(("context", "expected"), [(0, 286), (8192, 276), (32_768, 250), (131_072, 182)])
def test_decoding_floors_of_the_7b(context: int, expected: float) -> None:
    assert 4.3e12 / ModelSizes(SH_7B).decode_bytes(1, context, BFLOAT16) == pytest.approx(expected, rel=STATED)


@pytest.mark.parametrize(("context", "expected"), [(0, 302), (8192, 281), (32_768, 232), (131_072, 137)])
def test_decoding_floors_of_a_transformer(context: int, expected: float) -> None:
    assert 4.3e12 / ModelSizes(MISTRAL).decode_bytes(1, context, BFLOAT16) == pytest.approx(expected, rel=STATED)


def test_decoding_floors_of_a_batch() -> None:
    rates = [16 * 4.3e12 / ModelSizes(c).decode_bytes(16, 32_768, BFLOAT16) for c in (SH_7B, MISTRAL)]
    assert rates == pytest.approx([1391, 830], rel=STATED)


@pytest.mark.parametrize(("length", "expected"), [(2048, 52_600), (8192, 49_900), (32_768, 41_500), (131_072, 24_700)])
def test_prefill_floors_of_the_7b(length: int, expected: float) -> None:
    assert length * 790e12 / ModelSizes(SH_7B).prefill_flops(length) == pytest.approx(expected, rel=STATED)


@pytest.mark.parametrize(("length", "expected"), [(2048, 15.6e-6), (8192, 62e-6), (32_768, 250e-6), (131_072, 1e-3)])
def test_operator_floors_of_the_7b(length: int, expected: float) -> None:
    assert ModelSizes(SH_7B).operator_bytes(length, BFLOAT16) / 4.3e12 == pytest.approx(
        expected, rel=1e-2
    )  # two digits


# The tensors of each kind of layer: parameters, and the state of one sequence. D channels, K short taps, N modes.
D, K, N, F, W = 16, 3, 2, 4, 5
FRAME = {"in_proj": 3 * D * D + 3 * D, "short": 3 * D * K + 3 * D, "out_proj": D * D + D}
SHORT_STATE = 3 * D * (K - 1)


@pytest.mark.parametrize(
    ("kind", "filter", "float32", "state", "float32_state"),
    [
        ("hyena", 4 * D * N + D, 4 * D * N, SHORT_STATE, 2 * D * N),  # complex poles and residues, skip
        ("hyena_li", 2 * D * N + D, 2 * D * N, SHORT_STATE, D * N),  # real log_poles and residues, skip
        ("hyena_se", F * W, 0, SHORT_STATE, D * (W - 1)),  # taps
        ("hyena_mr", F * W + D, 0, SHORT_STATE, D * (W - 1)),  # taps, skip
    ],
)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_sizes_of_the_kinds_of_hyena_layers(
    kind: str, filter: int, float32: int, state: int, float32_state: int, itemsize: int
) -> None:
    groups = {f"{kind[-2:]}_filter_length": W, f"{kind[-2:]}_filter_groups": F} if kind[-2:] in ("se", "mr") else {}
    one = ModelSizes(dataclasses.replace(TINY, layer_types=(kind,), **groups))
    two = ModelSizes(dataclasses.replace(TINY, layer_types=(kind, kind), **groups))
    assert one.parameters_by_part[kind] == sum(FRAME.values()) + filter
    mlp_and_norms = 3 * D * TINY.intermediate_size + 2 * D
    assert two.parameters - one.parameters == sum(FRAME.values()) + filter + mlp_and_norms
    narrow = sum(FRAME.values()) + filter + mlp_and_norms - float32
    wide = max(itemsize, 4)
    assert two.weight_bytes(itemsize) - one.weight_bytes(itemsize) == narrow * itemsize + float32 * wide
    assert one.state_bytes(itemsize) == state * itemsize + float32_state * wide
    assert one.kv_bytes_per_token(itemsize) == 0


@pytest.mark.parametrize("kind", ["se", "mr"])
def test_explicit_filters_without_groups_have_one_for_each_channel(kind: str) -> None:
    shared = {f"{kind}_filter_length": W, f"{kind}_filter_groups": F}
    sizes = [
        ModelSizes(
            dataclasses.replace(TINY, layer_types=(f"hyena_{kind}",), **shared | {f"{kind}_filter_groups": groups})
        )
        for groups in (None, D, F)
    ]
    assert sizes[0].parameters == sizes[1].parameters == sizes[2].parameters + (D - F) * W


def test_a_kind_of_ones_own_needs_one_entry() -> None:
    config = dataclasses.replace(TINY, layer_types=("hyena", "mine", "mine"))
    mine = LayerSize(
        parameters=100, float32_parameters=10, output_parameters=5, kv_per_token=3, state=7, float32_state=2,
        activations_per_token=10**6, flops_per_pair=4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"layer 1: unknown layer kind 'mine': known: attention, hyena"):
        ModelSizes(config)
    ours, without = (
        ModelSizes(c, kinds=LAYER_SIZES | {"mine": lambda _: mine})
        for c in (config, dataclasses.replace(config, layer_types=("hyena",)))
    )
    rest = 2 * (3 * D * TINY.intermediate_size + 2 * D)  # the norms and MLPs of two layers
    assert ours.parameters - without.parameters == 200 + rest
    assert ours.weight_bytes(2) - without.weight_bytes(2) == 2 * (200 + rest) + 20 * 2
    assert ours.kv_bytes_per_token(2) == 2 * 3 * 2
    assert ours.state_bytes(2) - without.state_bytes(2) == 2 * (7 * 2 + 2 * 4)
    assert ours.cache_bytes(3, 10, 2) == 3 * (10 * 12 + ours.state_bytes(2))
    assert ours.activation_bytes_per_token(2) == 2 * (4 * D + 10**6)
    assert ours.prefill_flops(100) - without.prefill_flops(100) == 2 * 100 * (200 + rest) + 2 * 4 * 100**2 // 2
    assert ours.last_layer_savings(100) == 4 * 100**2 // 2 + 2 * 99 * (5 + 3 * D * TINY.intermediate_size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors(golden_case: Path, dtype: str) -> None:
    import torch

    config = read_config(golden_case / "config.yml")
    kind = getattr(torch, dtype)
    model = StripedHyena(config).to(kind)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert ModelSizes(config).weight_bytes(kind.itemsize) == stored
    embedding = model.embed_tokens.weight
    unread = 0 if config.tie_embeddings else embedding.numel() * embedding.element_size()
    cache = model.make_cache(3, max_length=10)
    states = 3 * ModelSizes(config).state_bytes(kind.itemsize)
    assert cache.nbytes == 3 * 10 * ModelSizes(config).kv_bytes_per_token(kind.itemsize) + states
    assert ModelSizes(config).decode_bytes(3, 10, kind.itemsize) == stored - unread + cache.nbytes + states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MIXERS)
def test_bytes_of_every_kind_are_those_of_its_tensors(kind: str, dtype: str) -> None:
    import torch

    config = dataclasses.replace(TINY, layer_types=(kind, kind), se_filter_groups=4, mr_filter_groups=8)
    itemsize, sizes = getattr(torch, dtype).itemsize, ModelSizes(config)
    model = StripedHyena(config).to(getattr(torch, dtype))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.weight_bytes(itemsize) == sum(p.nbytes for p in model.parameters())
    for length in (5, 9):
        assert model.make_cache(3, max_length=length).nbytes == sizes.cache_bytes(3, length, itemsize)


def test_the_last_layer_spares_at_most_one_layers_work() -> None:
    """Of the 7B's 32 layers, 3 % of the products and a sixteenth of the scores."""
    for length, share in ((8192, 0.029), (131_072, 0.0455)):
        spared = ModelSizes(SH_7B).last_layer_savings(length) / ModelSizes(SH_7B).prefill_flops(length)
        assert spared == pytest.approx(share, rel=0.02)


def test_logits_are_of_one_position_and_scores_are_causal() -> None:
    config = dataclasses.replace(SH_7B, layer_types=("attention",), tie_embeddings=True)
    one, two = (ModelSizes(config).prefill_flops(length) for length in (1000, 2000))
    head = 2 * config.vocab_size * config.hidden_size
    # What is left after the head doubles, but for the scores: 4·D operations for each of T²/2 pairs.
    assert (two - head) - 2 * (one - head) == 2 * config.hidden_size * (2000**2 - 2 * 1000**2)
