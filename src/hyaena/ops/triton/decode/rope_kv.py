"""RoPE and the write to the KV cache of the newest tokens of several rows, before ``packed_attention`` reads them.

The reference is ``DecodeOperators.rotate_and_cache``. A step has it in the kernel of ``attention``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.kv import KVState
from hyaena.ops.pages import PagedRows
from hyaena.ops.step import StepContext
from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.decode.rows import first_slot, page_operands, row_capacity, row_storage, write_slots
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

HEADS_TOGETHER = 16
"""Heads of a program: with heads of 128 channels, 16 bytes of each half for each of 128 threads."""


# tables are parts of one tensor: no compilation for each of their alignments
@triton.jit(do_not_specialize_on_alignment=["pages", "owners", "lengths"])
def _rotate_and_cache_kernel(qkv, keys, values, capacities, pages, owners, q, lengths, cos, sin,
                             HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOT: tl.constexpr,
                             HALF_PAD: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr, TABLE: tl.constexpr,
                             PAGE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Some heads of one token. Heads: queries, keys, values, in the order of the projection."""
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    HALF: tl.constexpr = WIDTH // 2
    i = tl.arange(0, HALF_PAD)
    here = (i < HALF)[None, :]
    position = tl.load(lengths + row).to(tl.int64) - 1
    owner = tl.load(owners + row).to(tl.int64)
    slot = first_slot(pages, owner, position, TABLE, PAGE)
    capacity = row_capacity(capacities, owner, PAGE).to(tl.int64)
    inside = (head < HEADS + 2 * GROUPS) & here
    start = qkv + (row * (HEADS + 2 * GROUPS) + head) * WIDTH + i[None, :]
    a = tl.load(start, mask=inside, other=0.0)
    b = tl.load(start + HALF, mask=inside, other=0.0)
    angle = position * HALF + i
    c = tl.load(cos + angle, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=i < HALF, other=0.0)[None, :]
    first = a.to(tl.float32) * c - b.to(tl.float32) * s
    second = b.to(tl.float32) * c + a.to(tl.float32) * s

    query = q + (row * HEADS + head) * WIDTH + i[None, :]
    is_query = (head < HEADS) & here
    tl.store(query, first.to(q.dtype.element_ty), mask=is_query)
    tl.store(query + HALF, second.to(q.dtype.element_ty), mask=is_query)
    group = head - HEADS
    key = row_storage(keys, owner, TYPE, PAGE) + (group * capacity + slot) * SLOT
    write_slots(key, first, second, (group >= 0) & (group < GROUPS), i, WIDTH, SLOT, TYPE)
    group -= GROUPS
    value = row_storage(values, owner, TYPE, PAGE) + (group * capacity + slot) * SLOT
    write_slots(value, a.to(tl.float32), b.to(tl.float32), (group >= 0) & (group < GROUPS), i, WIDTH, SLOT, TYPE)


def rotate_and_cache(
    qkv: Tensor,
    rows: KVState | PagedRows,
    context: StepContext,
    *,
    owners: Tensor,
    overlap: bool = False,
) -> Tensor:
    """Rotate queries and keys of qkv [B,(H+2G)·head_dim], store keys and values at slot ``lengths - 1`` of their rows.

    Args:
        owners: int32 [B], the row of each token.

    Returns:
        The queries [B,H,head_dim].
    """
    groups, width = rows.groups, rows.head_dim
    batch, heads = qkv.shape[0], qkv.shape[1] // width - 2 * groups
    q = torch.empty(batch, heads, width, dtype=qkv.dtype, device=qkv.device)
    keys, values, capacities = rows.pointers()
    pages, table, page = page_operands(rows)
    block = min(HEADS_TOGETHER, triton.next_power_of_2(heads + 2 * groups))
    _rotate_and_cache_kernel[(batch, triton.cdiv(heads + 2 * groups, block))](
        qkv, keys, values, capacities, pages, owners, q, context.lengths, *context.rotary,
        HEADS=heads, GROUPS=groups, WIDTH=width, SLOT=rows.slots.width(width),
        HALF_PAD=triton.next_power_of_2(width // 2), BLOCK=block, TYPE=TYPES[rows.dtype], TABLE=table,
        PAGE=page, OVERLAP=overlap,
        launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return q
