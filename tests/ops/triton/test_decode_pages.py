"""The kernels of a decoding step read and write keys and values on pages as the plain operators do."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena import ops
from hyaena.ops import PAGE, PagedKVState, PagePool, PageTable, StepContext, rotary_table
from hyaena.ops.step import DecodeOperators
from hyaena.ops.triton.decode.operators import FusedDecodeOperators

FUSED, PLAIN = FusedDecodeOperators(longest=4 * PAGE), DecodeOperators()  # few splits: the interpreter is slow
# one rounding of the result to its own dtype, and in the reference one or two more on the way
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)
NOWHERE = 2**30
"""A number that stands in the table where none may be read."""


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= TOLERANCE[dtype], error  # NaN fails too


def paged(
    lengths: list[int], groups: int, head_dim: int, dtype: torch.dtype, *, shared: int = 0, pages: int = 40
) -> tuple[PagedKVState, PageTable]:
    """Rows whose first ``shared`` pages are the same, others in random order; NaN in every slot that is not valid."""
    pool = PagePool(pages, [(1, 8), (groups, head_dim)], dtype, DEVICE)
    state = PagedKVState(*pool.layers[1])
    free = random.Random(sum(lengths)).sample(range(pages), pages)
    prefix = [free.pop() for _ in range(shared)]
    rows = [prefix + [free.pop() for _ in range(-(-n // PAGE) - shared)] for n in lengths]
    width = max(map(len, rows)) + 3
    table = torch.tensor([row + [NOWHERE] * (width - len(row)) for row in rows], dtype=torch.int32, device=DEVICE)
    for stored in (state.keys, state.values):
        stored.fill_(torch.nan)
        for row, length in zip(rows, lengths, strict=True):
            for i, page in enumerate(row):
                stored[:, page, : length - i * PAGE] = randn(groups, PAGE, head_dim, dtype=dtype)[
                    :, : length - i * PAGE
                ]
    return state, PageTable(table)


def context_of(lengths: list[int], head_dim: int, table: PageTable) -> StepContext:
    """The context of a step in which the rows hold so many tokens."""
    rotary = rotary_table(torch.arange(max(lengths) + 1, device=DEVICE), head_dim, 10_000.0)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return StepContext(PLAIN, counts, counts + 1, rotary, table)


def qkv_of(rows: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(rows, (heads + 2 * groups) * head_dim, dtype=dtype)


def copied(state: PagedKVState) -> PagedKVState:
    return PagedKVState(state.keys.clone(), state.values.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim", "shared"),
    [
        ([1, 64], 6, 2, 24, 0),
        ([65, 2], 6, 2, 24, 0),
        ([63, 400], 6, 2, 24, 0),
        ([130, 64, 65], 4, 2, 64, 0),  # the newest token: inside, last and first of its page
        # blocks of 64, 32 and 16 slots, each inside one page
        ([70, 129], 8, 2, 64, 1),
        ([70, 129], 4, 1, 128, 1),
        ([70, 129], 2, 1, 256, 1),
    ],
)
def test_attention_reads_the_valid_slots_of_pages_and_writes_one(
    dtype: torch.dtype, lengths: list[int], heads: int, groups: int, head_dim: int, shared: int
) -> None:
    state, table = paged(lengths, groups, head_dim, dtype, shared=shared)
    qkv, context = qkv_of(len(lengths), heads, groups, head_dim, dtype), context_of(lengths, head_dim, table)
    other = copied(state)
    want = PLAIN.attention(qkv.double(), other, context)
    for row, length in enumerate(lengths):
        page, slot = int(table.numbers[row, (length - 1) // PAGE]), (length - 1) % PAGE
        state.keys[:, page, slot] = state.values[:, page, slot] = torch.nan
    close(FUSED.attention(qkv, state, context), want, dtype)
    for row, length in enumerate(lengths):
        page, slot = int(table.numbers[row, (length - 1) // PAGE]), (length - 1) % PAGE
        for got, wanted in ((state.keys, other.keys), (state.values, other.values)):
            close(got[:, page, slot], wanted[:, page, slot], dtype)
            got[:, page, slot] = wanted[:, page, slot]
    for got, wanted in ((state.keys, other.keys), (state.values, other.values)):
        assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_pages_and_storage_of_rows_give_the_same_bits() -> None:
    lengths = [200, 64]
    state, table = paged(lengths, 2, 32, torch.float32)
    rows = ops.KVState.allocate(2, 2, table.numbers.shape[1] * PAGE, 32, torch.float32, DEVICE)
    for run in state.through(table).runs(lengths):
        row, length = run.rows.start, run.keys.shape[2]
        rows.keys(row)[:, :length], rows.values(row)[:, :length] = run.keys[0], run.values[0]
    qkv, context = qkv_of(2, 4, 2, 32), context_of(lengths, 32, table)
    assert torch.equal(FUSED.attention(qkv, state, context), FUSED.attention(qkv, rows, context))


def test_a_step_sees_the_pages_of_the_moment() -> None:
    """The table may change between steps, its address and width not: that is what a captured graph reads."""
    lengths = [100, 70]
    state, table = paged(lengths, 2, 16, torch.float32)
    qkv, context = qkv_of(2, 4, 2, 16), context_of(lengths, 16, table)
    first = FUSED.attention(qkv, state, context)
    table.numbers.copy_(table.numbers.flip(0))
    context.lengths.copy_(context.lengths.flip(0))
    close(FUSED.attention(qkv.flip(0), state, context), first.flip(0), torch.float32)
