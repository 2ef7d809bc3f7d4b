"""The compiled operators read and write int8 slots as the plain ones do; see ``ops.slots``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hyaena.ops import PAGE, KVState, PagedKVState, PagePool, PageTable, StepContext, rotary_table
from hyaena.ops.slots import slots_of
from hyaena.ops.step import DecodeOperators

pytest.importorskip("numba", reason="the kernels are compiled by numba")

from hyaena.ops.cpu.operators import CompiledOperators

PLAIN, COMPILED, INT8 = DecodeOperators(), CompiledOperators(), slots_of(torch.int8)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= TOLERANCE[dtype], error  # NaN fails too


def context_of(lengths: list[int], head_dim: int, pages: PageTable | None = None) -> StepContext:
    counts = torch.tensor(lengths, dtype=torch.int32)
    return StepContext(COMPILED, counts, counts + 1, rotary_table(torch.arange(max(lengths) + 1), head_dim, 1e4), pages)


def stored(lengths: list[int], groups: int, head_dim: int) -> tuple[KVState, PagedKVState, PageTable]:
    """The same rows in storage of their own and on pages in mixed order; NaN in slots that are not valid."""
    count = [-(-n // PAGE) for n in lengths]
    pool = PagePool(sum(count) + 1, [(groups, head_dim)], torch.int8, "cpu")
    numbers = torch.randperm(pool.pages).tolist()
    pages = [[numbers.pop() for _ in range(n)] for n in count]
    paged, rows = PagedKVState(*pool.layers[0]), KVState.allocate(1, groups, 1, head_dim, torch.int8, "cpu")
    rows = rows.select([0] * len(lengths)).reserve([PAGE * n for n in count])
    for slots in (paged.keys, paged.values, *rows.tensors()):
        slots.copy_(INT8.encode(torch.full((*slots.shape[:-1], head_dim), torch.nan)))
    for row, (length, mine) in enumerate(zip(lengths, pages, strict=True)):
        for of_pages, own in ((paged.keys, rows.keys(row)), (paged.values, rows.values(row))):
            own[:, :length] = INT8.encode(torch.randn(groups, length, head_dim))
            of_pages[:, mine] = own.unflatten(1, (-1, PAGE))
    return rows, paged, PageTable.of(pages, torch.device("cpu"))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim"), [(1, 1, 16), (8, 1, 64), (6, 2, 24), (3, 3, 80), (32, 8, 128)]
)
def test_attention(threads: int, dtype: torch.dtype, heads: int, groups: int, head_dim: int) -> None:
    """By scales in scores and weights, equal to attention over the widened slots; a row's bits are its own."""
    lengths = [700, 1, 64]
    rows, paged, table = stored(lengths, groups, head_dim)
    q = torch.randn(3, heads, head_dim).to(dtype)
    got = COMPILED.attend(q, rows, context_of(lengths, head_dim))
    close(got, PLAIN.attend(q.double(), rows, context_of(lengths, head_dim)), dtype)
    assert torch.equal(got, COMPILED.attend(q, paged, context_of(lengths, head_dim, table)))
    for i, n in enumerate(lengths):
        alone = COMPILED.attend(q[i : i + 1], KVState([rows.rows[i]]), context_of([n], head_dim))
        assert torch.equal(alone[0], got[i])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_dim", [4, 24, 128])
def test_rotate_and_cache_writes_one_slot_per_row(threads: int, dtype: torch.dtype, head_dim: int) -> None:
    heads, groups, lengths = 6, 2, [130, 64, 65]
    qkv = torch.randn(3, (heads + 2 * groups) * head_dim).to(dtype)
    rows, paged, table = stored(lengths, groups, head_dim)
    other = rows.select([0, 1, 2])
    context = context_of(lengths, head_dim)
    close(COMPILED.rotate_and_cache(qkv, rows, context), PLAIN.rotate_and_cache(qkv, other, context), dtype)
    COMPILED.rotate_and_cache(qkv, paged, context_of(lengths, head_dim, table))
    for row, length in enumerate(lengths):
        assert torch.equal(rows.values(row), other.values(row))  # to the bit: they are not rotated
        assert torch.equal(rows.keys(row)[:, : length - 1], other.keys(row)[:, : length - 1])
        on_pages = paged.through(table).row(row, length)
        assert torch.equal(on_pages.keys[0], rows.keys(row)[:, :length])
        got, want = (INT8.decode(state.keys(row)[:, length - 1], qkv.double()) for state in (rows, other))
        assert bool(((got - want).abs() <= want.abs().amax(-1, keepdim=True) * (1 / 127 + TOLERANCE[dtype])).all())


def test_float32_slots_are_the_plain_ones_to_the_bit() -> None:
    """Zeros, subnormal numbers, and those whose quotient lies between two whole numbers."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50, 32) * 10.0 ** torch.arange(-44, 36, 1.6)[:50, None], torch.arange(64.0).view(2, 32)])
    x[0] = 0
    for values in x:
        qkv = torch.cat([torch.zeros(64), values])[None]
        rows = KVState.allocate(1, 1, 4, 32, torch.int8, "cpu")
        COMPILED.rotate_and_cache(qkv, rows, context_of([2], 32))
        assert torch.equal(rows.values(0)[0, 1], INT8.encode(values)), values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    qkv, rows = torch.randn(1, 4 * 16), KVState.allocate(1, 1, 40, 16, torch.int8, "cpu")
    qkv[:, 3 * 16 + 5] = value
    q = COMPILED.rotate_and_cache(qkv, rows, context_of([20], 16))
    assert not INT8.decode(rows.values(0)[:, 19], q).isfinite().any()
    assert not COMPILED.attend(q, rows, context_of([20], 16)).isfinite().any()
