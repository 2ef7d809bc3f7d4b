"""Where keys and values lie, as kernels see it: in storage of every row, or in pages of a pool.

A row's own storage is found by tables of addresses and capacities on the device. Pages are found by a table of numbers.
In kernels PAGE is the number of tokens of a page, 0 where rows have storage of their own; WIDTH the channels of a head,
and SLOT the numbers of a slot: more than WIDTH where a scale lies behind them, see ``ops.slots``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.kv import KVState
from hyaena.ops.pages import PAGE as TOKENS
from hyaena.ops.pages import PagedRows
from hyaena.ops.slots import INVERSE as FACTOR

INVERSE = tl.constexpr(FACTOR)


@triton.jit
def row_storage(storage, row, TYPE: tl.constexpr, PAGE: tl.constexpr):
    """A pointer to a row's storage of TYPE, from a table of addresses int64 [B]; the pool itself where it has pages.

    Storage begins at a multiple of 16 bytes; the compiler must know that to load 16 bytes at a time.
    """
    if PAGE:
        return storage
    else:
        return tl.multiple_of(tl.load(storage + row).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def row_capacity(capacities, row, PAGE: tl.constexpr):
    """Slots between two heads of the storage: of the row, from a table int32 [B], or of the whole pool."""
    if PAGE:
        return capacities
    else:
        return tl.load(capacities + row)


@triton.jit
def first_slot(pages, row, at, TABLE: tl.constexpr, PAGE: tl.constexpr):
    """The slot of a row's token ``at``, from a table int32 [B,TABLE]; the tokens behind it in the page follow."""
    if PAGE:
        page = tl.load(pages + row.to(tl.int64) * TABLE + at // PAGE).to(tl.int64)
        return page * PAGE + at % PAGE
    else:
        return at


@triton.jit
def read_slots(storage, slot, valid, channel, WIDTH: tl.constexpr, SLOT: tl.constexpr, OPERAND: tl.constexpr):
    """The numbers of slots [BLOCK,WIDTH_PAD], as OPERAND, and the scale of each [BLOCK]; 1 where they have none."""
    slot = slot.to(tl.int64) * SLOT
    keep = valid[:, None] & (channel < WIDTH)[None, :]
    numbers = tl.load(storage + slot[:, None] + channel[None, :], mask=keep, other=0).to(OPERAND)
    if SLOT > WIDTH:
        scales = (storage + WIDTH).to(tl.pointer_type(tl.float32))
        return numbers, tl.load(scales + slot // 4, mask=valid, other=0.0)
    else:
        return numbers, 1.0


@triton.jit
def write_slots(slot, first, second, mine, i, WIDTH: tl.constexpr, SLOT: tl.constexpr, TYPE: tl.constexpr):
    """Write both halves [BLOCK,HALF_PAD] of the numbers of slots, in float32, to those that are ``mine`` [BLOCK,1].

    ``slot`` is a pointer to each [BLOCK,1]. The numbers and the scale are those of ``ops.slots``, to the bit.
    """
    HALF: tl.constexpr = WIDTH // 2
    here = mine & (i < HALF)[None, :]
    if SLOT > WIDTH:
        sizes = tl.maximum(_size_bits(first), _size_bits(second))  # as integers: NaN is the largest
        largest = tl.max(tl.where((i < HALF)[None, :], sizes, 0), axis=1)[:, None].to(tl.float32, bitcast=True)
        scale = largest * INVERSE
        tl.store((slot + WIDTH).to(tl.pointer_type(tl.float32)), scale, mask=mine)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        first, second = _rounded(tl.math.div_rn(first, divisor)), _rounded(tl.math.div_rn(second, divisor))
    tl.store(slot + i[None, :], first.to(TYPE), mask=here)
    tl.store(slot + i[None, :] + HALF, second.to(TYPE), mask=here)


@triton.jit
def _size_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _rounded(x):
    """To the nearest whole number within -127…127, to the even one of two: float32 has no digits behind 3·2^22."""
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, -127.0), 127.0)


def page_operands(rows: KVState | PagedRows) -> tuple[Tensor | None, int, int]:
    """The table of pages and the constants TABLE and PAGE that kernels take with it."""
    if rows.table is None:
        return None, 0, 0
    return rows.table.numbers, rows.table.numbers.stride(0), TOKENS
