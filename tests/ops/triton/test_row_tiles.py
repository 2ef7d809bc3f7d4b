"""Products of 2 to 8 rows in registers equal the plain operators: on a GPU if there is one, else on the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena.ops import Dense, RMSNormWeight
from hyaena.ops.step import DecodeOperators
from hyaena.ops.triton import can_overlap
from hyaena.ops.triton.decode import row_tiles
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.ops.triton.decode.row_tiles import MOST_COLUMNS, MOST_ROWS, Tile, choose_tile

PLAIN = DecodeOperators()
OVERLAP = can_overlap(torch.device(DEVICE))
TOLERANCE = 6e-3
"""x·g and the result are rounded to bfloat16; the interpreter cuts results off, which errs twice as much."""


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, torch.bfloat16)


def close(got: Tensor, want: Tensor, roundings: float = 1) -> None:
    errors = (got.double() - want).norm(dim=1) / want.norm(dim=1)  # of every vector: one may be much larger
    assert float(errors.max()) <= roundings * TOLERANCE, errors  # NaN fails too


def operands(vectors: int, rows: int, width: int, inside: bool) -> tuple[Tensor, Dense, Dense, RMSNormWeight, Tensor]:
    a, b = (randn(rows, width, scale=width**-0.5) for _ in range(2))
    norm = RMSNormWeight(randn(width), 1e-2, inside)
    return randn(vectors, width), Dense(a, randn(rows)), Dense(b), norm, randn(vectors, rows)


def wide(layer: Dense) -> Dense:
    return Dense(layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize(
    ("vectors", "rows", "width", "tile", "inside"),
    [
        (2, 8, 384, Tile(1, 2, early=True), True),
        (3, 12, 264, Tile(2, 1, 2), False),
        (8, 6, 136, Tile(1, 1), True),
        (5, 12, 72, Tile(1, 1), False),
    ],
    ids=str,
)
def test_products(vectors: int, rows: int, width: int, tile: Tile, inside: bool) -> None:
    x, a, b, norm, residual = operands(vectors, rows, width, inside)
    precise = norm._replace(weight=norm.weight.double())
    got = row_tiles.linear(x, a, norm=norm, residual=residual, tile=tile, overlap=OVERLAP)
    close(got, PLAIN.linear(x.double(), wide(a), norm=precise, residual=residual.double()))
    got = row_tiles.gate(x, a._replace(bias=None), b, norm=norm, activation="silu", tile=tile, overlap=OVERLAP)
    want = PLAIN.gate(x.double(), wide(a)._replace(bias=None), wide(b), norm=precise, activation="silu")
    close(got, want, roundings=2)


@pytest.mark.parametrize("inside", [True, False])
def test_numbers_whose_squares_overflow_are_normalised(inside: bool) -> None:
    x, a, _, norm, _ = operands(3, 4, 24, inside)
    x[1] *= 1e25
    got = row_tiles.linear(x, a, norm=norm, overlap=OVERLAP)
    close(got, PLAIN.linear(x.double(), wide(a), norm=norm._replace(weight=norm.weight.double())))


def test_what_lies_behind_the_last_column_and_row_is_not_read() -> None:
    stored = torch.full((3000,), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    a, x = stored[: 12 * 72].view(12, 72), torch.full((4, 72), torch.nan, device=DEVICE, dtype=torch.bfloat16)[:3]
    a.normal_()
    x.normal_()
    close(row_tiles.linear(x, Dense(a), overlap=OVERLAP), x.double() @ a.double().T)


def test_the_operators_of_a_step_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("linear", "gate"):
        monkeypatch.setattr(row_tiles, name, lambda *_, name=name, **__: taken.append(name))
    fused, (x, a, b, norm, _) = FusedDecodeOperators(), operands(2, 8, 16, True)
    fused.linear(x, a, norm=norm)
    fused.gate(x, b, b, norm=norm, activation="silu")
    assert taken == ["linear", "gate"]


def test_what_they_do_not_take() -> None:
    x, a, b, _, _ = operands(2, 8, 32, True)
    assert row_tiles.takes(x, a, b)
    assert not row_tiles.takes(randn(1, 32), a) and not row_tiles.takes(randn(MOST_ROWS + 1, 32), a)
    assert not row_tiles.takes(x.half(), Dense(a.weight.half()))
    assert not row_tiles.takes(x[:, :20].contiguous(), Dense(a.weight[:, :20].contiguous()))  # not units of 16 bytes
    assert not row_tiles.takes(randn(2, 33)[:, 1:], a) and not row_tiles.takes(x, Dense(randn(32, 8).T))
    far = randn(2, MOST_COLUMNS + 8)
    assert not row_tiles.takes(far, Dense(far))


@pytest.mark.parametrize("vectors", [2, 4, 8])
@pytest.mark.parametrize(("matrices", "width"), [(1, 4096), (2, 4096), (1, 14336), (1, 64)])
def test_the_rule_fits_a_processor(vectors: int, matrices: int, width: int) -> None:
    tile = choose_tile(vectors, matrices, width)
    blocks = tile.depth * matrices * tile.strips
    assert tile.warps <= max(1, width // 128)
    assert tile.depth >= 1 and 16 * blocks + 2 * vectors * tile.depth < tile.registers
    assert tile.warps * tile.programs * 32 * tile.registers <= 65536
