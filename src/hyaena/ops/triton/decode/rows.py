"""Where keys and values lie, as kernels see it: in storage of every row, or in pages of a pool.

A row's own storage is found by tables of addresses and capacities on the device. Pages are found by a table of numbers.
In kernels PAGE is the number of tokens of a page, 0 where rows have storage of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.kv import KVState
from hyaena.ops.pages import PAGE as TOKENS
from hyaena.ops.pages import PagedRows


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


def page_operands(rows: KVState | PagedRows) -> tuple[Tensor | None, int, int]:
    """The table of pages and the constants TABLE and PAGE that kernels take with it."""
    if rows.table is None:
        return None, 0, 0
    return rows.table.numbers, rows.table.numbers.stride(0), TOKENS
