"""Streamed products of 33 to 64 rows equal the plain operators: on a Hopper GPU, since nothing else runs them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.ops import Dense, RMSNormWeight
from hyaena.ops.step import DecodeOperators
from hyaena.ops.triton import can_stream
from hyaena.ops.triton.decode import operators, streamed

PLAIN = DecodeOperators()
HOPPER = can_stream(torch.device(DEVICE))
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 4e-3}

on_hopper = pytest.mark.skipif(not HOPPER, reason="takes a Hopper GPU")


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor) -> None:
    error = float((got.double() - want).norm() / want.norm())
    assert error <= TOLERANCE[got.dtype], error  # NaN fails too


@on_hopper
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("vectors", [33, 48, 64])
@pytest.mark.parametrize(("rows", "width"), [(104, 136), (4096, 4096), (6144, 520), (12_288, 512), (40_000, 64)])
def test_products(dtype: torch.dtype, vectors: int, rows: int, width: int) -> None:
    """At sizes that parts and pieces divide and others; again with the same bits; a row does not know the others."""
    products = streamed.StreamedProducts(overlap=True)
    x, residual = randn(vectors, width, dtype=dtype), randn(vectors, rows, dtype=dtype)
    a, b = (randn(rows, width, dtype=dtype) / width**0.5 for _ in range(2))
    bias = randn(rows, dtype=dtype)
    wide = [t.double() for t in (x, a, b, bias, residual)]
    got = products.linear(x, Dense(a, bias), residual=residual)
    close(got, PLAIN.linear(wide[0], Dense(wide[1], wide[3]), residual=wide[4]))
    assert all(torch.equal(products.linear(x, Dense(a, bias), residual=residual), got) for _ in range(5))
    assert torch.equal(products.linear(x[:33], Dense(a, bias), residual=residual[:33]), got[:33])
    close(products.linear(x, Dense(a)), PLAIN.linear(wide[0], Dense(wide[1])))
    for activation in ("silu", "gelu", "identity"):
        want = PLAIN.gate(wide[0], Dense(wide[1]), Dense(wide[2]), activation=activation)
        close(products.gate(x, Dense(a), Dense(b), activation=activation), want)


@on_hopper
def test_the_operators_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 33 to 64 rows whose addresses TMA takes; with a norm before them."""
    launched = []
    launch = streamed.StreamedProducts._launch
    monkeypatch.setattr(streamed.StreamedProducts, "_launch", lambda *a: launched.append(len(a[1])) or launch(*a))
    fused, norm = operators.FusedDecodeOperators(overlap=True), RMSNormWeight(randn(256), 1e-5, True)
    weight = randn(512, 256)
    shifted = torch.empty(512 * 256 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(512, 256).copy_(weight)
    for rows in (16, 32, 33, 64, 65):
        x = randn(rows, 256)
        want = PLAIN.linear(x.double(), Dense(weight.double()), norm=RMSNormWeight(norm.weight.double(), 1e-5, True))
        for given in (weight, shifted):
            error = (fused.linear(x, Dense(given), norm=norm).double() - want).norm() / want.norm()
            assert error < 8e-3
    assert launched == [33, 64]


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("rows", [1, 100, 512, 4096, 6144, 11_264, 12_288, 14_336, 32_000, 262_144])
@pytest.mark.parametrize("programs", [78, 114, 132])
def test_rings_fit(matrices: int, rows: int, programs: int) -> None:
    """The shared memory of a processor; and no more programs than run at once, but for matrices of many rows."""
    ring = streamed.choose_ring(matrices, rows, programs)
    panel = 128 * ring.panels
    assert sum(ring.parts) * matrices * panel * ring.stages + 64 * panel * ring.ahead <= 220 * 1024
    assert list(ring.parts) == sorted(ring.parts, reverse=True) and len(set(ring.parts)) == len(ring.parts) <= 3
    assert 2 <= ring.ahead <= ring.stages and ring.early <= ring.stages
    assert -(-rows // sum(ring.parts)) <= programs or sum(ring.parts) == 128
