"""The kernels of a decoding step read and write int8 slots as the plain operators do; see ``ops.slots``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from device import DEVICE
from hyaena import ops
from hyaena.ops import PAGE, KVState, PagedKVState, PagePool, PageTable, StepContext, rotary_table
from hyaena.ops.slots import slots_of
from hyaena.ops.step import DecodeOperators
from hyaena.ops.triton.decode.operators import FusedDecodeOperators
from hyaena.ops.triton.decode.packed_attention import packed_attention

FUSED, PLAIN = FusedDecodeOperators(longest=4 * PAGE), DecodeOperators()  # few splits: the interpreter is slow
INT8 = slots_of(torch.int8)
# one rounding of the result, and that of the weights of values, which have no scale in the reference
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= TOLERANCE[dtype], error  # NaN fails too


def paged(lengths: list[int], groups: int, head_dim: int) -> tuple[PagedKVState, KVState, PageTable]:
    """The same rows on pages in mixed order and in storage of their own; NaN in slots that are not valid."""
    count = [-(-n // PAGE) for n in lengths]
    pool = PagePool(sum(count) + 1, [(groups, head_dim)], torch.int8, DEVICE)
    numbers = torch.randperm(pool.pages).tolist()
    pages = [[numbers.pop() for _ in range(n)] for n in count]
    state, rows = PagedKVState(*pool.layers[0]), KVState.allocate(1, groups, 1, head_dim, torch.int8, DEVICE)
    rows = rows.select([0] * len(lengths)).reserve([PAGE * n for n in count])
    for stored in (state.keys, state.values, *rows.tensors()):
        stored.copy_(INT8.encode(torch.full((*stored.shape[:-1], head_dim), torch.nan)))
    for row, (length, mine) in enumerate(zip(lengths, pages, strict=True)):
        for of_pages, own in ((state.keys, rows.keys(row)), (state.values, rows.values(row))):
            own[:, :length] = INT8.encode(randn(groups, length, head_dim))
            of_pages[:, mine] = own.unflatten(1, (-1, PAGE))
    table = torch.full((len(lengths), max(count) + 2), 2**30, dtype=torch.int32, device=DEVICE)
    for row, mine in enumerate(pages):
        table[row, : len(mine)] = torch.tensor(mine)
    return state, rows, PageTable(table)


def context_of(lengths: list[int], head_dim: int, table: PageTable | None = None) -> StepContext:
    rotary = rotary_table(torch.arange(max(lengths) + 1, device=DEVICE), head_dim, 10_000.0)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return StepContext(PLAIN, counts, counts + 1, rotary, table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "head_dim"),
    [
        ([70, 129, 1], 6, 2, 24),
        ([130, 64, 65], 8, 2, 64),  # the newest token: inside, last and first of its page
        ([70, 129, 1], 4, 1, 128),
        ([70, 129, 1], 2, 1, 256),
    ],
)
def test_attention_reads_the_valid_slots_and_writes_one(
    dtype: torch.dtype, lengths: list[int], heads: int, groups: int, head_dim: int
) -> None:
    state, rows, table = paged(lengths, groups, head_dim)
    qkv, context = randn(3, (heads + 2 * groups) * head_dim, dtype=dtype), context_of(lengths, head_dim, table)
    other = PagedKVState(state.keys.clone(), state.values.clone())
    got = FUSED.attention(qkv, state, context)
    assert torch.equal(got, FUSED.attention(qkv, rows, context_of(lengths, head_dim)))
    close(got, PLAIN.attention(qkv.double(), other, context), dtype)
    assert torch.equal(*(t.view(torch.uint8) for t in (state.values, other.values)))  # to the bit: they are not rotated
    for row, length in enumerate(lengths):
        page, slot = int(table.numbers[row, (length - 1) // PAGE]), (length - 1) % PAGE
        key, want = (INT8.decode(keys[:, page, slot], randn(1).double()) for keys in (state.keys, other.keys))
        largest = want.abs().amax(-1, keepdim=True)
        assert bool(((key - want).abs() <= largest * (1 / 127 + TOLERANCE[dtype])).all())
        assert torch.equal(state.keys[:, page, slot], rows.keys(row)[:, length - 1])
        state.keys[:, page, slot] = other.keys[:, page, slot]
    assert torch.equal(state.keys, other.keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 128])
def test_packed_tokens_read_the_slots_before_them(dtype: torch.dtype, head_dim: int) -> None:
    lengths, counts = [70, 19], [5, 19]  # tokens of a row up to its last, and those that are read now
    state, rows, table = paged(lengths, 2, head_dim)
    q = randn(sum(counts), 4, head_dim, dtype=dtype)
    seen = [n - c + 1 + i for n, c in zip(lengths, counts, strict=True) for i in range(c)]
    blocks = [0, 0, 5, 1, 5, 16, 1, 21, 3, 0, 0, 0]
    on_device: list[Any] = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (blocks, seen)]
    want = []
    for row, queries in enumerate(q.double().split(counts)):
        keys, values = rows.row(row, lengths[row]).read(queries)
        want.append(ops.attention(queries.transpose(0, 1)[None], keys, values)[0].transpose(0, 1))
    close(packed_attention(q, state.through(table), *on_device), torch.cat(want), dtype)
    assert torch.equal(
        packed_attention(q, state.through(table), *on_device), packed_attention(q, rows.through(None), *on_device)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_slots_of_numbers_that_have_no_scale(value: float) -> None:
    """NaN and infinity stay visible, and zeros are zeros."""
    qkv = torch.full((1, 4 * 16), value, device=DEVICE)
    state = KVState.allocate(1, 1, 8, 16, torch.int8, DEVICE)
    FUSED.attention(qkv, state, context_of([3], 16))
    for stored in (state.keys(0), state.values(0)):
        wide = INT8.decode(stored[:, 2], qkv)
        assert bool((wide == 0).all() if value == 0 else not wide.isfinite().any())
