"""RoPE and the write to the KV cache, between the projection and attention of a decoding step.

The reference is ``DecodeOperators.rotate_and_cache``.
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
from hyaena.ops.triton.decode.pdl import gdc_launch_dependents, gdc_wait
from hyaena.ops.triton.decode.rows import first_slot, page_operands, row_capacity, row_storage


@triton.jit
def _rotate_and_cache_kernel(qkv, keys, values, capacities, pages, q, lengths, cos, sin,
                             HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HALF_PAD: tl.constexpr,
                             TYPE: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
                             OVERLAP: tl.constexpr):  # fmt: skip
    """One head of one row. Heads: queries, keys, values, in the order of the projection."""
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = WIDTH // 2
    i = tl.arange(0, HALF_PAD)
    inside = i < HALF
    position = tl.load(lengths + row).to(tl.int64) - 1
    slot = first_slot(pages, row, position, TABLE, PAGE)
    capacity = row_capacity(capacities, row, PAGE).to(tl.int64)
    start = qkv + (row * (HEADS + 2 * GROUPS) + head) * WIDTH
    a = tl.load(start + i, mask=inside, other=0.0)
    b = tl.load(start + HALF + i, mask=inside, other=0.0)
    if head >= HEADS + GROUPS:
        target = row_storage(values, row, TYPE, PAGE) + ((head - HEADS - GROUPS) * capacity + slot) * WIDTH
        tl.store(target + i, a.to(TYPE), mask=inside)
        tl.store(target + HALF + i, b.to(TYPE), mask=inside)
    else:
        angle = position * HALF + i
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        first = a.to(tl.float32)
        second = b.to(tl.float32)
        if head < HEADS:
            target = q + (row * HEADS + head) * WIDTH
            tl.store(target + i, (first * c - second * s).to(q.dtype.element_ty), mask=inside)
            tl.store(target + HALF + i, (second * c + first * s).to(q.dtype.element_ty), mask=inside)
        else:
            target = row_storage(keys, row, TYPE, PAGE) + ((head - HEADS) * capacity + slot) * WIDTH
            tl.store(target + i, (first * c - second * s).to(TYPE), mask=inside)
            tl.store(target + HALF + i, (second * c + first * s).to(TYPE), mask=inside)


def rotate_and_cache(qkv: Tensor, rows: KVState | PagedRows, context: StepContext, *, overlap: bool = False) -> Tensor:
    """Rotate queries and keys of qkv [B,(H+2G)·head_dim], store keys and values at slot ``lengths - 1`` of their rows.

    Returns:
        The queries [B,H,head_dim].
    """
    groups, width = rows.groups, rows.head_dim
    batch, heads = qkv.shape[0], qkv.shape[1] // width - 2 * groups
    q = torch.empty(batch, heads, width, dtype=qkv.dtype, device=qkv.device)
    keys, values, capacities = rows.pointers()
    pages, table, page = page_operands(rows)
    _rotate_and_cache_kernel[(batch, heads + 2 * groups)](
        qkv, keys, values, capacities, pages, q, context.lengths, *context.rotary,
        HEADS=heads, GROUPS=groups, WIDTH=width, HALF_PAD=triton.next_power_of_2(width // 2),
        TYPE=TYPES[rows.dtype], TABLE=table, PAGE=page, OVERLAP=overlap,
        launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
    return q
