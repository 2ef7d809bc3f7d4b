"""Floors are arithmetic: they must be those of the published figures, and those of the tensors themselves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from hyaena.bench import roofline
from hyaena.bench.run import SH_7B
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena

BFLOAT16 = 2
MISTRAL = dataclasses.replace(SH_7B, layer_types=("attention",) * 32)
ROOT = Path(__file__).parents[2]


def test_the_preset_is_the_published_configuration() -> None:
    published = ModelConfig.from_file(ROOT / "configs" / "7b-sh-32k-v1.yml")
    other = {"name": SH_7B.name, "max_length": SH_7B.max_length, "prefill_style": "auto"}
    assert dataclasses.replace(published, **other) == SH_7B


def test_floors_need_no_torch() -> None:
    code = "import sys, hyaena.bench.roofline; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "src")})


def test_a_decoding_step_of_the_7b() -> None:
    """15.03 GB + B·(65,536·context + 3.67 MB) in bfloat16."""
    step = roofline.decode_bytes(SH_7B, 1, 0, BFLOAT16)
    assert roofline.state_bytes(SH_7B, BFLOAT16) == 1.75 * 2**20
    assert step - 2 * roofline.state_bytes(SH_7B, BFLOAT16) == pytest.approx(15.03e9, rel=1e-3)
    assert roofline.decode_bytes(SH_7B, 16, 1000, BFLOAT16) - step == 15 * 3_670_016 + 16 * 65_536_000


# Rounded to three digits where they are stated; the last of them carries an uncertainty of 0.2 %.
STATED = 2.5e-3


@pytest.mark.parametrize(("context", "expected"), [(0, 286), (8192, 276), (32_768, 250), (131_072, 182)])
def test_decoding_floors_of_the_7b(context: int, expected: float) -> None:
    assert 4.3e12 / roofline.decode_bytes(SH_7B, 1, context, BFLOAT16) == pytest.approx(expected, rel=STATED)


@pytest.mark.parametrize(("context", "expected"), [(0, 302), (8192, 281), (32_768, 232), (131_072, 137)])
def test_decoding_floors_of_a_transformer(context: int, expected: float) -> None:
    assert 4.3e12 / roofline.decode_bytes(MISTRAL, 1, context, BFLOAT16) == pytest.approx(expected, rel=STATED)


def test_decoding_floors_of_a_batch() -> None:
    rates = [16 * 4.3e12 / roofline.decode_bytes(c, 16, 32_768, BFLOAT16) for c in (SH_7B, MISTRAL)]
    assert rates == pytest.approx([1391, 830], rel=STATED)


@pytest.mark.parametrize(("length", "expected"), [(2048, 52_600), (8192, 49_900), (32_768, 41_500), (131_072, 24_700)])
def test_prefill_floors_of_the_7b(length: int, expected: float) -> None:
    assert length * 790e12 / roofline.prefill_flops(SH_7B, length) == pytest.approx(expected, rel=STATED)


@pytest.mark.parametrize(("length", "expected"), [(2048, 15.6e-6), (8192, 62e-6), (32_768, 250e-6), (131_072, 1e-3)])
def test_operator_floors_of_the_7b(length: int, expected: float) -> None:
    assert roofline.operator_bytes(SH_7B, length, BFLOAT16) / 4.3e12 == pytest.approx(expected, rel=1e-2)  # two digits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors(golden_case: Path, dtype: str) -> None:
    import torch

    config = ModelConfig.from_file(golden_case / "config.yml")
    kind = getattr(torch, dtype)
    model = StripedHyena(config).to(kind)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert roofline.weight_bytes(config, kind.itemsize) == stored
    embedding = model.embed_tokens.weight
    unread = 0 if config.tie_embeddings else embedding.numel() * embedding.element_size()
    cache = model.make_cache(3, max_length=10)
    states = 3 * roofline.state_bytes(config, kind.itemsize)
    assert cache.nbytes == 3 * 10 * config.kv_bytes_per_token(kind.itemsize) + states
    assert roofline.decode_bytes(config, 3, 10, kind.itemsize) == stored - unread + cache.nbytes + states


def test_the_last_layer_spares_at_most_one_layers_work() -> None:
    """Of the 7B's 32 layers, 3 % of the products and a sixteenth of the scores."""
    for length, share in ((8192, 0.029), (131_072, 0.0455)):
        spared = roofline.spared_flops(SH_7B, length) / roofline.prefill_flops(SH_7B, length)
        assert spared == pytest.approx(share, rel=0.02)


def test_logits_are_of_one_position_and_scores_are_causal() -> None:
    config = dataclasses.replace(SH_7B, layer_types=("attention",), tie_embeddings=True)
    one, two = (roofline.prefill_flops(config, length) for length in (1000, 2000))
    head = 2 * config.vocab_size * config.hidden_size
    # What is left after the head doubles, but for the scores: 4·D operations for each of T²/2 pairs.
    assert (two - head) - 2 * (one - head) == 2 * config.hidden_size * (2000**2 - 2 * 1000**2)
