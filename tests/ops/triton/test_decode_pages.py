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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1, 64], [65, 2], [63, 400]])
def test_attention_reads_the_valid_slots_of_pages_and_no_other(dtype: torch.dtype, lengths: list[int]) -> None:
    state, table = paged(lengths, 2, 24, dtype)
    q, context = randn(2, 6, 24, dtype=dtype), context_of(lengths, 24, table)
    exact = PagedKVState(state.keys.double(), state.values.double())
    close(FUSED.attend(q, state, context), PLAIN.attend(q.double(), exact, context), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 64), (4, 1, 128), (2, 1, 256)])
def test_attention_of_every_width_with_a_shared_prefix(
    dtype: torch.dtype, heads: int, groups: int, head_dim: int
) -> None:
    """Blocks of 64, 32 and 16 slots, each inside one page."""
    lengths = [70, 129]
    state, table = paged(lengths, groups, head_dim, dtype, shared=1)
    q, context = randn(2, heads, head_dim, dtype=dtype), context_of(lengths, head_dim, table)
    exact = PagedKVState(state.keys.double(), state.values.double())
    close(FUSED.attend(q, state, context), PLAIN.attend(q.double(), exact, context), dtype)


def test_pages_and_storage_of_rows_give_the_same_bits() -> None:
    lengths = [200, 64]
    state, table = paged(lengths, 2, 32, torch.float32)
    rows = ops.KVState.allocate(2, 2, table.numbers.shape[1] * PAGE, 32, torch.float32, DEVICE)
    for run in state.through(table).runs(lengths):
        row, length = run.rows.start, run.keys.shape[2]
        rows.keys(row)[:, :length], rows.values(row)[:, :length] = run.keys[0], run.values[0]
    q, context = randn(2, 4, 32), context_of(lengths, 32, table)
    assert torch.equal(FUSED.attend(q, state, context), FUSED.attend(q, rows, context))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
def test_rotate_and_cache_writes_one_slot_of_one_page(dtype: torch.dtype, head_dim: int) -> None:
    heads, groups, lengths = 4, 2, [130, 64, 65]  # the newest token: inside, last and first of its page
    qkv = randn(3, (heads + 2 * groups) * head_dim, dtype=dtype)
    state, table = paged(lengths, groups, head_dim, dtype, shared=1)
    other, context = PagedKVState(state.keys.clone(), state.values.clone()), context_of(lengths, head_dim, table)
    close(FUSED.rotate_and_cache(qkv, state, context), PLAIN.rotate_and_cache(qkv, other, context), dtype)
    for got, want in ((state.keys, other.keys), (state.values, other.values)):
        changed: list[Tensor] = []
        for row, length in enumerate(lengths):
            page, slot = int(table.numbers[row, (length - 1) // PAGE]), (length - 1) % PAGE
            close(got[:, page, slot], want[:, page, slot], dtype)
            changed.append(got[:, page, slot].clone())
            got[:, page, slot] = want[:, page, slot]
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and len(changed) == 3


def test_a_step_sees_the_pages_of_the_moment() -> None:
    """The table may change between steps, its address and width not: that is what a captured graph reads."""
    lengths = [100, 70]
    state, table = paged(lengths, 2, 16, torch.float32)
    q, context = randn(2, 4, 16), context_of(lengths, 16, table)
    first = FUSED.attend(q, state, context)
    table.numbers.copy_(table.numbers.flip(0))
    context.lengths.copy_(context.lengths.flip(0))
    close(FUSED.attend(q.flip(0), state, context), first.flip(0), torch.float32)
