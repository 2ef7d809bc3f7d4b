"""Attention of the newest tokens of several rows, on pages, to all tokens of their rows up to themselves.

A program has some neighbouring tokens of one row, and of these all query heads that share one key head: a tile of
tokens x heads queries, for which each key is read once. Which tokens it has is read on the device. The reference is
``ops.attention`` of each row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.kv import KVState
from hyaena.ops.pages import PagedRows
from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.decode.attention import TILE, operand, soften, weight_operand
from hyaena.ops.triton.decode.rows import first_slot, page_operands, read_slots, row_capacity, row_storage
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

BLOCK_TOKENS = 16
"""The most tokens of a program."""
BLOCK = 64
"""Slots that a program reads at a time; fewer where heads are wide, see ``decode.attention``."""


# tables are parts of one tensor: no compilation for each of their alignments
@triton.jit(do_not_specialize_on_alignment=["pages", "blocks", "lengths"])
def _packed_attention_kernel(q, keys, values, capacities, pages, blocks, lengths, out, scale,
                             HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SHARE_PAD: tl.constexpr,
                             TOKENS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, SLOT: tl.constexpr,
                             BLOCK: tl.constexpr, OPERAND: tl.constexpr, WEIGHT: tl.constexpr, TYPE: tl.constexpr,
                             TABLE: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
                             OVERLAP: tl.constexpr):  # fmt: skip
    """One block of tokens and one key head. Grid: (blocks, GROUPS)."""
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    block = blocks + tl.program_id(0) * 3
    group = tl.program_id(1)
    row = tl.load(block).to(tl.int64)
    first = tl.load(block + 1)
    count = tl.load(block + 2)
    if count == 0:
        return
    start = tl.load(lengths + first)
    query = tl.arange(0, TOKENS * SHARE_PAD)
    token = query // SHARE_PAD
    share = query % SHARE_PAD
    channel = tl.arange(0, WIDTH_PAD)
    inside = channel < WIDTH
    real = ((token < count) & (share < SHARE))[:, None] & inside[None, :]
    place = ((first + token).to(tl.int64) * HEADS + group * SHARE + share)[:, None] * WIDTH + channel[None, :]
    qs = tl.load(q + place, mask=real, other=0.0).to(OPERAND)
    limit = start + token  # slots that the token sees
    end = start + count - 1
    base = group.to(tl.int64) * row_capacity(capacities, row, PAGE) * SLOT
    k = row_storage(keys, row, TYPE, PAGE) + base
    v = row_storage(values, row, TYPE, PAGE) + base

    best = tl.full([TOKENS * SHARE_PAD], -float("inf"), tl.float32)
    total = tl.zeros([TOKENS * SHARE_PAD], tl.float32)
    acc = tl.zeros([TOKENS * SHARE_PAD, WIDTH_PAD], tl.float32)
    for at in tl.range(0, end, BLOCK, num_stages=STAGES):
        slot = at + tl.arange(0, BLOCK)
        stored = first_slot(pages, row, at, TABLE, PAGE) + tl.arange(0, BLOCK)
        ks, of_key = read_slots(k, stored, slot < end, channel, WIDTH, SLOT, OPERAND)
        vs, of_value = read_slots(v, stored, slot < end, channel, WIDTH, SLOT, WEIGHT)
        score = tl.dot(qs, tl.trans(ks), input_precision="ieee") * scale
        if SLOT > WIDTH:
            score *= of_key[None, :]
        score = tl.where(slot[None, :] < limit[:, None], score, -float("inf"))
        p, shrink, best, total = soften(score, best, total)
        if SLOT > WIDTH:
            p *= of_value[None, :]
        acc = acc * shrink[:, None] + tl.dot(p.to(WEIGHT), vs, input_precision="ieee")
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)


def packed_attention(
    q: Tensor, rows: KVState | PagedRows, blocks: Tensor, lengths: Tensor, *, overlap: bool = False
) -> Tensor:
    """Attention of T tokens to the tokens of their rows, themselves and those before.

    Args:
        q: [T,H,head_dim].
        rows: where keys and values of the rows are, the newest among them.
        blocks: int32 [blocks·3], row, first place in q and number of neighbouring tokens, at most ``BLOCK_TOKENS``; 0
            tokens where there is no block.
        lengths: int32 [T], tokens of the row up to each token.

    Returns:
        [T,H,head_dim]; nothing is written where no block lies.
    """
    _, heads, width = q.shape
    groups = rows.groups
    keys, values, capacities = rows.pointers()
    pages, table, page = page_operands(rows)
    padded = max(16, triton.next_power_of_2(width))
    share = heads // groups
    out = torch.empty_like(q)
    scale = width**-0.5 * 1.4426950408889634  # exp(x) = 2^(x·log2 e)
    _packed_attention_kernel[(blocks.shape[0] // 3, groups)](
        q, keys, values, capacities, pages, blocks, lengths, out, scale,
        HEADS=heads, GROUPS=groups, SHARE=share, SHARE_PAD=triton.next_power_of_2(share), TOKENS=BLOCK_TOKENS,
        WIDTH=width, WIDTH_PAD=padded, SLOT=rows.slots.width(width),
        BLOCK=min(BLOCK, TILE // (padded * q.element_size())), OPERAND=operand(q.dtype),
        WEIGHT=weight_operand(q.dtype, rows.dtype), TYPE=TYPES[rows.dtype], TABLE=table, PAGE=page, STAGES=2,
        OVERLAP=overlap,
        launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return out
