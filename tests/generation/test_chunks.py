"""How long a pass is: what it holds in memory, and what of it fits."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyaena.config import ModelConfig
from hyaena.generation.chunks import choose_chunk, fitting_chunk
from hyaena.model import StripedHyena
from hyaena.sizes import ModelSizes
from watching import LiveBytes

SMALL = ModelConfig(
    vocab_size=16,
    hidden_size=64,
    layer_types=("attention", "attention", "attention"),
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
)


def test_a_seven_billion_parameter_model() -> None:
    config = ModelConfig.from_name("sh-7b")
    assert ModelSizes(config).activation_bytes_per_token(2) == 2 * (4 * 4096 + 3 * 14336)


@pytest.mark.parametrize(
    ("free", "expected"),
    [(-5, 2048), (0, 2048), (4095 * 100, 2048), (2 * 8191 * 100, 4096), (2 * 8192 * 100, 8192), (10**9, 32768)],
)
def test_the_largest_power_of_two_that_fits(free: int, expected: int) -> None:
    assert fitting_chunk(free, 100) == expected


def test_the_memory_of_a_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_name("sh-7b")
    dtype = torch.bfloat16
    model: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, cache_dtype=dtype, config=config)
    free = 3_000_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 500_000_000, 24_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 15_500_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 15_000_000_000)
    # half of what the cache leaves, at 118,784 bytes a token
    assert choose_chunk(model, 1000) == 8192 < (free - 1000 * 65536) / 2 / 118_784 < 16384
    assert choose_chunk(model, 20_000) == 4096 < (free - 20_000 * 65536) / 2 / 118_784 < 8192
    assert choose_chunk(model, 131_072) == 2048
    model.cache_dtype = torch.int8  # 33 KiB a token in place of 64
    assert choose_chunk(model, 20_000) == 8192 < (free - 20_000 * 33_792) / 2 / 118_784 < 16384
    model.device = torch.device("cpu")
    assert choose_chunk(model, 1000) == 512


@pytest.mark.parametrize("inner", [64, 256])
def test_a_pass_holds_what_was_said(monkeypatch: pytest.MonkeyPatch, inner: int) -> None:
    """Wide and narrow MLPs: either part of a layer may be the one that holds most."""
    pytest.importorskip("triton", reason="the module that is replaced here needs it")
    from hyaena.ops.triton import pointwise

    monkeypatch.setenv("HYAENA_BACKEND", "triton")
    # Stand-ins that allocate what the kernels do: under its interpreter Triton holds on to their arguments for a while.
    monkeypatch.setattr("hyaena.ops.triton.device_unsupported_reason", lambda _: None)
    monkeypatch.setattr(pointwise, "rms_norm", lambda x, *_, **__: x.clone())
    monkeypatch.setattr(pointwise, "gate", lambda a, b, _: a.sigmoid().mul_(b))
    monkeypatch.setattr(pointwise, "rotate", lambda x, _: x.contiguous())
    config = dataclasses.replace(SMALL, intermediate_size=inner)
    model, length = StripedHyena(config), 64
    cache = model.make_cache(max_length=2 * length)
    ids = torch.randint(16, (1, length))
    with torch.inference_mode():
        model(ids, cache=cache, logits_to_keep=1)
        with LiveBytes() as live:
            model(ids, cache=cache, logits_to_keep=1)
    said = length * ModelSizes(config).activation_bytes_per_token(4)
    # the angles of rotary positions and the normalisers of attention are not counted: a twentieth of a layer so narrow
    assert 0.8 * said < live.most < 1.05 * said, (live.most / length, said / length)
