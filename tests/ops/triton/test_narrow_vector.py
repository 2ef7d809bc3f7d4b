"""Products of narrow weights and one vector equal the plain operators: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena import ops
from hyaena.ops import Dense, RMSNormWeight
from hyaena.ops.step import DecodeOperators
from hyaena.ops.triton import can_overlap
from hyaena.ops.triton.decode import narrow_vector
from hyaena.ops.triton.decode.narrow_vector import Tile
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES

PLAIN = DecodeOperators()
OVERLAP = can_overlap(torch.device(DEVICE))
# of the result, and with a norm of what is multiplied; the interpreter cuts bfloat16 off, which errs twice as much
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, roundings: float = 1) -> None:
    error = float((got.double() - want).norm() / want.norm())
    assert error <= roundings * TOLERANCE[got.dtype], error  # NaN fails too


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "width", "tile"), [(5, 128, Tile(16, 1, 1)), (64, 2048, Tile(32, 2, 4)), (40, 640, Tile(16, 4, 4, 3))]
)
def test_products(name: str, dtype: torch.dtype, rows: int, width: int, tile: Tile) -> None:
    """At sizes that the tile divides and others."""
    x, bias, residual = (randn(*shape, dtype=dtype) for shape in ((1, width), (rows,), (1, rows)))
    a, b = (round_weight(randn(rows, width) / width**0.5 + 0.01, SCHEMES[name]) for _ in range(2))
    norm = RMSNormWeight(randn(width, dtype=dtype), 1e-2, rows == 64)
    wide = norm._replace(weight=norm.weight.double())
    dense = [Dense(ops.widen(layer, torch.float64)) for layer in (a, b)]
    options = {"tile": tile, "overlap": OVERLAP}
    close(narrow_vector.linear(x, a, **options), PLAIN.linear(x.double(), dense[0]))
    got = narrow_vector.linear(x, a._replace(bias=bias), norm=norm, residual=residual, **options)
    want = PLAIN.linear(x.double(), Dense(dense[0].weight, bias.double()), norm=wide, residual=residual.double())
    close(got, want, roundings=2)
    got = narrow_vector.gate(x, a, b, norm=norm, activation="silu", **options)
    close(got, PLAIN.gate(x.double(), dense[0], dense[1], norm=wide, activation="silu"), roundings=4)


def test_the_operators_of_a_step_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("linear", "gate"):
        monkeypatch.setattr(narrow_vector, name, lambda *_, name=name, **__: taken.append(name))
    layer = round_weight(randn(8, 128), SCHEMES["int4"])
    fused = FusedDecodeOperators()
    fused.linear(randn(1, 128, dtype=torch.bfloat16), layer)
    fused.gate(randn(1, 128, dtype=torch.float16), layer, layer, activation="silu")
    fused.linear(randn(1, 128), layer)
    assert taken == ["linear", "gate"]
