"""Rows that own their storage, as kernels see them: tables of addresses and capacities on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_storage(addresses, row, TYPE: tl.constexpr):
    """A pointer to a row's storage of TYPE, from a table of addresses int64 [B].

    Storage begins at a multiple of 16 bytes; the compiler must know that to load 16 bytes at a time.
    """
    return tl.multiple_of(tl.load(addresses + row).to(tl.pointer_type(TYPE)), 16)
