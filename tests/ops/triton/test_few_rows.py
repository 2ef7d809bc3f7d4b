"""Products of several rows equal the plain operators: on a GPU if there is one, else on Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena import ops
from hyaena.ops import Dense, RMSNormWeight
from hyaena.ops.step import DecodeOperators
from hyaena.ops.triton import can_overlap
from hyaena.ops.triton.decode.few_rows import MOST_ROWS, Products, Tile, choose_tile
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES

PLAIN = DecodeOperators()
OVERLAP = can_overlap(torch.device(DEVICE))
# one rounding of the result to its own dtype; the interpreter cuts bfloat16 off, which errs twice as much
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 4e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, roundings: float = 1) -> None:
    error = float((got.double() - want).norm() / want.norm())
    assert error <= roundings * TOLERANCE[got.dtype], error  # NaN fails too


TILES = [Tile(16, 64, 1, 2), Tile(32, 128, 2, 3), Tile(64, 64, 4, 4), Tile(128, 64, 3, 2, 8)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("vectors", "rows", "width"), [(2, 70, 72), (33, None, 600), (64, 64, 64)])
def test_products(dtype: torch.dtype, tile: Tile, vectors: int, rows: int | None, width: int) -> None:
    """In any tile, at sizes that it divides and others; twice, since what programs tell one another is used again."""
    rows = rows or tile.rows + 8
    padded = max(16, 1 << (vectors - 1).bit_length())
    tiles = {("linear", padded, rows, width): tile}
    tiles["gate", padded, rows, width] = Tile(tile.rows, tile.width, tile.splits, 2, tile.warps)
    products = Products(overlap=OVERLAP, tiles=tiles)
    x, residual = randn(vectors, width, dtype=dtype), randn(vectors, rows, dtype=dtype)
    a, b = (randn(rows, width, dtype=dtype) / width**0.5 for _ in range(2))
    bias = randn(rows, dtype=dtype)
    wide = [t.double() for t in (x, a, b, bias, residual)]
    for _ in range(2):
        close(products.linear(x, Dense(a)), PLAIN.linear(wide[0], Dense(wide[1])))
        want = PLAIN.linear(wide[0], Dense(wide[1], wide[3]), residual=wide[4])
        close(products.linear(x, Dense(a, bias), residual=residual), want)
    for activation in ("silu", "gelu", "identity"):
        want = PLAIN.gate(wide[0], Dense(wide[1]), Dense(wide[2]), activation=activation)
        got = products.gate(x, Dense(a), Dense(b), activation=activation)
        close(got, want, roundings=1.5)  # the interpreter cuts bits off


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    ("vectors", "rows", "width", "tile"), [(3, 70, 384, TILES[0]), (17, 64, 256, TILES[1]), (9, 40, 640, TILES[2])]
)
def test_narrow_products(name: str, vectors: int, rows: int, width: int, tile: Tile) -> None:
    padded = max(16, 1 << (vectors - 1).bit_length())
    tiles = {(kind, padded, rows, width): replace(tile, width=2 * tile.width) for kind in ("linear", "gate")}
    products = Products(overlap=OVERLAP, tiles=tiles)
    x, bias, residual = (randn(*shape, dtype=torch.bfloat16) for shape in ((vectors, width), (rows,), (vectors, rows)))
    a, b = (round_weight(randn(rows, width) / width**0.5 + 0.01, SCHEMES[name]) for _ in range(2))
    wide = [Dense(ops.widen(layer, torch.float64)) for layer in (a, b)]
    for _ in range(2):
        got = products.linear(x, a._replace(bias=bias), residual=residual)
        want = PLAIN.linear(x.double(), wide[0]._replace(bias=bias.double()), residual=residual.double())
        close(got, want, roundings=2)
    got = products.gate(x, a, b, activation="silu")
    close(got, PLAIN.gate(x.double(), wide[0], wide[1], activation="silu"), roundings=4)


def test_what_lies_behind_the_last_column_is_not_read() -> None:
    """Rows that end inside a piece stand beside NaN."""
    stored = torch.full((40, 200), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    x = randn(5, 72, dtype=torch.bfloat16)
    a = stored.view(-1)[: 40 * 72].view(40, 72)
    a.normal_()
    products = Products(overlap=OVERLAP, tiles={("linear", 16, 40, 72): Tile(16, 64, 2, 2)})
    close(products.linear(x, Dense(a)), x.double() @ a.double().T)


@pytest.mark.parametrize("inside", [True, False])
def test_the_operators_of_a_step_take_them(inside: bool) -> None:
    fused = FusedDecodeOperators(overlap=OVERLAP)
    x, residual = randn(9, 96, dtype=torch.bfloat16), randn(9, 40, dtype=torch.bfloat16)
    a, b = (randn(40, 96, dtype=torch.bfloat16) / 10 for _ in range(2))
    norm = RMSNormWeight(randn(96, dtype=torch.bfloat16), 1e-2, inside)
    wide = norm._replace(weight=norm.weight.double())
    got = fused.linear(x, Dense(a), norm=norm, residual=residual)
    want = PLAIN.linear(x.double(), Dense(a.double()), norm=wide, residual=residual.double())
    close(got, want, roundings=2)
    got = fused.gate(x, Dense(a), Dense(b), norm=norm, activation="silu")
    want = PLAIN.gate(x.double(), Dense(a.double()), Dense(b.double()), norm=wide, activation="silu")
    close(got, want, roundings=4)  # of the norm, in both factors and the activation, and of the result


def test_what_they_do_not_take() -> None:
    products = Products()
    a = randn(8, 32, dtype=torch.bfloat16)
    assert products.takes(randn(MOST_ROWS, 32, dtype=torch.bfloat16), Dense(a))
    assert not products.takes(randn(MOST_ROWS + 1, 32, dtype=torch.bfloat16), Dense(a))
    assert not products.takes(randn(2, 32, dtype=torch.float16), Dense(a))
    assert not products.takes(randn(2, 32), Dense(a.float()))  # the matrix units would round to tf32


@pytest.mark.parametrize("vectors", [16, 64, 128])
@pytest.mark.parametrize(("matrices", "rows", "width"), [(1, 4096, 14336), (1, 12288, 4096), (2, 14336, 4096)])
def test_the_rule_fits_a_processor(vectors: int, matrices: int, rows: int, width: int) -> None:
    """Shared memory of a Hopper processor, 227 KiB, and every program has at least one piece."""
    tile = choose_tile(vectors, matrices, rows, width)
    assert tile.stages * tile.width * (matrices * tile.rows + vectors) * 2 <= 227 * 1024
    assert tile.splits * tile.width <= width
    assert matrices == 1 or tile.splits == 1
