"""What a slot holds: the bound of its rounding, and attention over slots as over the numbers that are read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyaena import ops
from hyaena.errors import InputError
from hyaena.ops import KVState, PagePool, PageTable, StepContext, rotary_table
from hyaena.ops.slots import as_cache_dtype, slots_of
from hyaena.ops.step import CompilableOperators, DecodeOperators

INT8 = slots_of(torch.int8)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(-38, 38), dtype=st.sampled_from(FLOATS))
def test_the_error_of_a_number_is_half_a_scale(seed: int, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) * 10.0**size).to(dtype)
    x[1] = 0
    if not bool(x.isfinite().all()):
        return
    slots = INT8.encode(x)
    assert slots.dtype == torch.int8 and slots.shape == (3, INT8.width(16)) and INT8.head_dim(slots.shape[-1]) == 16
    back, scale = INT8.decode(slots, x.double()), slots[:, 16:].view(torch.float32).double()
    assert bool(((back - x.double()).abs() <= scale * (0.5 + 1e-5) + 1e-45).all())
    torch.testing.assert_close(scale[:, 0], x.double().abs().amax(1) / 127, rtol=1e-6, atol=2e-45)
    assert bool((back[1] == 0).all()) and bool((slots[..., :16] >= -127).all())
    torch.testing.assert_close(INT8.rounded(x), back.to(dtype), rtol=0, atol=0)


def test_slots_of_slots_are_read_where_they_lie() -> None:
    """Views of storage: rows, heads and pages in between."""
    storage = INT8.encode(torch.randn(4, 3, 10, 8))
    view = storage[1:3, :, 2:7]
    assert torch.equal(INT8.decode(view, torch.ones(1)), INT8.decode(view.contiguous(), torch.ones(1)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_leaves_no_finite_number(value: float) -> None:
    x = torch.randn(2, 8)
    x[0, 3] = value
    back = INT8.rounded(x)
    assert not back[0].isfinite().any() and back[1].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_floating_point_slots_are_the_numbers(dtype: torch.dtype) -> None:
    x, slots = torch.randn(2, 7), slots_of(dtype)
    slots.check(7)
    assert slots.width(7) == slots.head_dim(7) == 7
    assert torch.equal(slots.encode(x), x.to(dtype)) and torch.equal(slots.decode(x.to(dtype), x), slots.rounded(x))


def test_names() -> None:
    assert as_cache_dtype(None) is as_cache_dtype("auto") is None
    assert as_cache_dtype("int8") == as_cache_dtype(torch.int8) == torch.int8
    for wrong in ("int4", "", torch.int16, torch.float8_e4m3fn, 8, "float"):
        with pytest.raises(InputError, match="choose a cache dtype among auto, float32, bfloat16, float16, int8"):
            as_cache_dtype(wrong)
    with pytest.raises(InputError, match=r"heads of a multiple of 4 channels.*have 18: leave the cache"):
        INT8.check(18)


def rows_of(kind: str, lengths: list[int], keys: torch.Tensor, values: torch.Tensor) -> Any:
    """int8 rows that keys and values [B,G,T,head_dim] were written to, with their table of pages."""
    batch, groups, most, width = keys.shape
    if kind == "rows":
        rows, table = KVState.allocate(batch, groups, most, width, torch.int8, "cpu"), None
    else:
        pool = PagePool(2 * batch, [(groups, width)], torch.int8, "cpu")
        table = PageTable.of([[2 * i + 1, 2 * i] for i in range(batch)], torch.device("cpu"))
        rows = ops.PagedKVState(*pool.layers[0])
    for i, length in enumerate(lengths):
        counts = [length if row == i else 0 for row in range(batch)]
        rows.through(table).write_packed(
            keys[i : i + 1, :, :length], values[i : i + 1, :, :length], [0] * batch, counts
        )
    return rows, table


@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_attention_reads_the_rounded_numbers(kind: str) -> None:
    lengths = [90, 7, 90]
    keys, values = torch.randn(2, 3, 2, 90, 8, dtype=torch.float64)
    rows, table = rows_of(kind, lengths, keys, values)
    q, counts = torch.randn(3, 4, 8, dtype=torch.float64), torch.tensor(lengths, dtype=torch.int32)
    context = StepContext(DecodeOperators(), counts, counts, rotary_table(torch.arange(91), 8, 1e4), table)
    got = context.operators.attend(q, rows, context)
    for i, n in enumerate(lengths):
        k, v = (INT8.rounded(t[i : i + 1, :, :n]) for t in (keys, values))
        torch.testing.assert_close(got[i], ops.attention(q[i : i + 1, :, None], k, v)[0, :, 0])


def test_a_graph_of_the_compiler_reads_and_writes_slots() -> None:
    compiled, plain = CompilableOperators(), DecodeOperators()
    keys, values = torch.randn(2, 2, 2, 20, 8)
    (rows, _), (other, _) = (rows_of("rows", [20, 20], keys, values) for _ in range(2))
    counts = torch.tensor([12, 5], dtype=torch.int32)
    context = StepContext(compiled, counts, counts, rotary_table(torch.arange(21), 8, 1e4))
    qkv = torch.randn(2, 8 * 8)
    q = compiled.rotate_and_cache(qkv, rows, context)
    torch.testing.assert_close(q, plain.rotate_and_cache(qkv, other, context))
    assert all(torch.equal(a, b) for a, b in zip(rows.store, other.store, strict=True))
    torch.testing.assert_close(compiled.attend(q, rows, context), plain.attend(q, other, context))
