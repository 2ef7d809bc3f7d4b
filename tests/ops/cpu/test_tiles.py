"""Products of narrow weights with many rows, on processors that multiply tiles of bfloat16 numbers."""

from __future__ import annotations

import pytest
import torch

from hyaena import ops
from hyaena.ops import cpu
from hyaena.quant import round_weight
from hyaena.schemes import SCHEMES

tiles = pytest.importorskip("hyaena.ops.cpu.tiles")
INTEGERS = [name for name, scheme in SCHEMES.items() if not scheme.floating]

pytestmark = pytest.mark.skipif(
    not tiles._permitted(), reason="needs a processor with AMX, and the system's permission"
)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(("rows", "outputs", "width"), [(32, 32, 128), (77, 301, 384), (65, 96, 2048), (200, 33, 256)])
def test_tiles_give_the_product_of_the_widened_weight(
    threads: int, name: str, rows: int, outputs: int, width: int
) -> None:
    layer = round_weight(torch.randn(outputs, width) / width**0.5, SCHEMES[name])
    x = torch.randn(rows, width).bfloat16()
    exact = x.double() @ ops.widen(layer, torch.bfloat16).double().T
    got = tiles.many_rows(x, layer)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)
    # torch's own products configure tiles too, and a product of few rows does not
    weight = ops.widen(layer, torch.bfloat16)
    torch.testing.assert_close(torch.nn.functional.linear(x, weight).double(), exact, rtol=2**-7, atol=1e-4)
    assert torch.equal(tiles.many_rows(x, layer), got)
    assert torch.equal(ops.linear(x.expand(2, -1, -1), layer), got.expand(2, -1, -1))


def test_what_is_not_finite_stays_in_its_row() -> None:
    layer, x = round_weight(torch.randn(64, 128), SCHEMES["int8"]), torch.randn(64, 128).bfloat16()
    want = tiles.many_rows(x, layer)
    x[3, 5], x[40, 0] = torch.nan, torch.inf
    got = tiles.many_rows(x, layer)
    rows = [3, 40]
    assert bool(got[3].isnan().all()) and not bool(got[40].isfinite().any())
    keep = [i for i in range(64) if i not in rows]
    assert torch.equal(got[keep], want[keep])


def test_other_products_are_left_to_torch() -> None:
    layer = round_weight(torch.randn(64, 128), SCHEMES["int8"])
    for x in (torch.randn(64, 128), torch.randn(64, 128).half(), torch.randn(31, 128).bfloat16()):
        assert tiles.many_rows(x, layer) is None
    assert tiles.many_rows(torch.randn(64, 128).bfloat16(), round_weight(torch.randn(31, 128), SCHEMES["int8"])) is None
    floating = round_weight(torch.randn(64, 128), SCHEMES["float8"])
    assert tiles.many_rows(torch.randn(64, 128).bfloat16(), floating) is None


def test_processors_without_tiles_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = round_weight(torch.randn(64, 128), SCHEMES["int4"]), torch.randn(100, 128).bfloat16()
    monkeypatch.setattr(tiles, "_permitted", lambda: False)
    assert torch.equal(ops.linear(x, layer), torch.nn.functional.linear(x, ops.widen(layer, torch.bfloat16)))
    monkeypatch.setattr(cpu, "unsupported_reason", lambda _: "none here")
    assert torch.equal(ops.linear(x, layer), torch.nn.functional.linear(x, ops.widen(layer, torch.bfloat16)))
