"""The kernel of a LoRA update's thin products against two matrix products in float64."""

from __future__ import annotations

import pytest
import torch

from device import DEVICE
from hyaena.ops.triton import lora

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
"""The interpreter has no products of bfloat16 numbers."""


@pytest.mark.parametrize("rank", [1, 16, 24])
@pytest.mark.parametrize(("length", "width"), [(1, 3), (70, 600)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_two_products(
    monkeypatch: pytest.MonkeyPatch, rank: int, length: int, width: int, dtype: torch.dtype
) -> None:
    """Products of 16-bit numbers are exact in float32; sums of up to 600 of them round to a few parts in 10^6."""
    monkeypatch.setattr(lora, "PROGRAMS", 4)  # several runs of tokens, each of several tiles
    x, q = (torch.randn(length, n, device=DEVICE).to(dtype) for n in (width, rank))
    for p in (torch.randn(rank, width, device=DEVICE).to(dtype), torch.randn(width, rank, device=DEVICE).to(dtype).t()):
        u, v = lora.products(x, p, q, 0.5)
        assert u is not None and v is not None and u.dtype == dtype and v.dtype == torch.float32
        exact_u, exact_v = 0.5 * x.double() @ p.double().t(), q.double().t() @ x.double()
        torch.testing.assert_close(v.double(), exact_v, rtol=1e-5, atol=1e-5)
        tolerance = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps  # u is rounded
        torch.testing.assert_close(u.double(), exact_u, rtol=tolerance, atol=1e-4)
    alone_u, no_v = lora.products(x, p, None, 0.5)
    no_u, alone_v = lora.products(x, None, q, 0.5)
    assert no_u is None and no_v is None
    torch.testing.assert_close((alone_u, alone_v), (u, v), rtol=0, atol=0)


@pytest.mark.skipif(DEVICE != "cuda", reason="the plain function uses the kernel on a GPU only")
def test_a_layer_on_a_gpu_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyaena.ops import Dense, lora_linear

    calls: list[None] = []
    kernel = lora.products
    monkeypatch.setattr(lora, "products", lambda *args: calls.append(None) or kernel(*args))
    x = torch.randn(1, 600, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    layer = Dense(torch.randn(96, 64, device=DEVICE, dtype=torch.bfloat16))
    a, b = torch.randn(8, 64, device=DEVICE, requires_grad=True), torch.randn(96, 8, device=DEVICE, requires_grad=True)
    got = torch.autograd.grad(lora_linear(x, layer, a, b, 0.5).float().square().sum(), (x, a, b))
    assert len(calls) == 3
    wide = torch.nn.functional.linear(x.float(), layer.weight.float() + 0.5 * b @ a)
    expected = torch.autograd.grad(wide.square().sum(), (x, a, b))
    for value, want in zip(got, expected, strict=True):  # bfloat16: 8 bits, over sums of up to 600
        torch.testing.assert_close(value.float(), want.float(), rtol=0, atol=0.02 * float(want.abs().max()))
