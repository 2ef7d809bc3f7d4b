"""Attention of one new token per row to the KV cache, the tokens of every row split among programs (flash decoding).

Every row uses the first ``lengths[b]`` slots of a store of its own, or of its pages, in which a block of slots never
crosses a page. Addresses, capacities, numbers of pages and lengths are read on the device, so a captured graph reads
the slots that are valid when it is replayed, and what belongs to them of the table of pages. The grid is fixed: the
``SPLITS`` programs of a (row, key head) divide what is valid, each a run of whole blocks, and those without any end
immediately. Each program serves all query heads of its key head, so keys and values are read once. A second pass joins
the splits by their log-sum-exp.

The reference is ``ops.attention`` on the valid slots.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.kv import KVState
from hyaena.ops.pages import PagedRows
from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.decode.pdl import gdc_launch_dependents, gdc_wait
from hyaena.ops.triton.decode.rows import first_slot, page_operands, read_slots, row_capacity, row_storage

BLOCK = 64
"""Slots that a program reads at a time; fewer where heads are wide, to keep a block of keys within ``TILE`` bytes."""
TILE = 16384
WAVE = 384
"""Programs that run on a large device at the same time, three on each processor."""
PROGRAMS = 1024
"""Programs to aim for where one wave would be too few to share the work evenly."""
MAX_SPLITS = 64


@triton.jit
def _split_range(lengths, row, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """First and last slot (exclusive) of a split, and how many splits of this row have any."""
    stop = tl.load(lengths + row).to(tl.int32)
    width = tl.cdiv(tl.cdiv(stop, SPLITS), BLOCK) * BLOCK
    width = tl.maximum(width, BLOCK)
    begin = split * width
    return begin, tl.minimum(begin + width, stop), tl.cdiv(stop, width)


@triton.jit
def _split_kernel(q, keys, values, capacities, pages, lengths, partial, weights, scale,
                  HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SHARE_PAD: tl.constexpr,
                  WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, SLOT: tl.constexpr, SPLITS: tl.constexpr,
                  BLOCK: tl.constexpr, OPERAND: tl.constexpr, WEIGHT: tl.constexpr, TYPE: tl.constexpr,
                  STAGES: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One split: its softmax over its own slots [HEADS/GROUPS,WIDTH], and the logarithm (base 2) of its normaliser."""
    gdc_wait(OVERLAP)
    row = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(1)
    begin, end, _ = _split_range(lengths, row, split, SPLITS, BLOCK)
    if begin >= end:
        return
    share = tl.arange(0, SHARE_PAD)
    channel = tl.arange(0, WIDTH_PAD)
    inside = channel < WIDTH
    query = (row * HEADS + group * SHARE + share).to(tl.int64)  # padded heads are never stored
    real = (share < SHARE)[:, None] & inside[None, :]
    qs = tl.load(q + query[:, None] * WIDTH + channel[None, :], mask=real, other=0.0).to(OPERAND)
    base = group.to(tl.int64) * row_capacity(capacities, row, PAGE) * SLOT
    k = row_storage(keys, row, TYPE, PAGE) + base
    v = row_storage(values, row, TYPE, PAGE) + base

    best = tl.full([SHARE_PAD], -float("inf"), tl.float32)
    total = tl.zeros([SHARE_PAD], tl.float32)
    out = tl.zeros([SHARE_PAD, WIDTH_PAD], tl.float32)
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        slot = at + tl.arange(0, BLOCK)
        valid = slot < end
        stored = first_slot(pages, row, at, TABLE, PAGE) + tl.arange(0, BLOCK)
        ks, of_key = read_slots(k, stored, valid, channel, WIDTH, SLOT, OPERAND)
        vs, of_value = read_slots(v, stored, valid, channel, WIDTH, SLOT, WEIGHT)
        score = tl.dot(qs, tl.trans(ks), input_precision="ieee") * scale
        if SLOT > WIDTH:
            score *= of_key[None, :]
        score = tl.where(valid[None, :], score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, axis=1))
        shrink = tl.exp2(best - higher)
        p = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        if SLOT > WIDTH:
            p *= of_value[None, :]
        out = out * shrink[:, None] + tl.dot(p.to(WEIGHT), vs, input_precision="ieee")
        best = higher
    gdc_launch_dependents(OVERLAP)
    store = query * SPLITS + split
    tl.store(partial + store[:, None] * WIDTH + channel[None, :], out / total[:, None], mask=real)
    tl.store(weights + store, best + tl.log2(total), mask=share < SHARE)


@triton.jit
def _join_kernel(partial, weights, lengths, out, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                 WIDTH_PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
                 BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The splits of one query head, joined by their normalisers."""
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    query = tl.program_id(0).to(tl.int64)
    _, _, count = _split_range(lengths, query // HEADS, 0, SPLITS, BLOCK)
    split = tl.arange(0, SPLITS_PAD)
    channel = tl.arange(0, WIDTH_PAD)
    wrote = split < count  # what the others hold is left over from longer sequences
    weight = tl.load(weights + query * SPLITS + split, mask=wrote, other=-float("inf"))
    weight = tl.exp2(weight - tl.max(weight, axis=0))
    parts = tl.load(
        partial + (query * SPLITS + split)[:, None] * WIDTH + channel[None, :],
        mask=wrote[:, None] & (channel < WIDTH)[None, :],
        other=0.0,
    )
    joined = tl.sum(parts * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + query * WIDTH + channel, joined.to(out.dtype.element_ty), mask=channel < WIDTH)


def decode_attention(
    q: Tensor, rows: KVState | PagedRows, lengths: Tensor, *, longest: int | None = None, overlap: bool = False
) -> Tensor:
    """Attention of the newest token of every row to all tokens of that row, itself included.

    Args:
        q: [B,H,head_dim], float32, bfloat16 or float16.
        rows: keys and values of B rows, head_dim at most 256; slots outside the valid ones may hold anything.
        lengths: int32 [B], tokens of each row, at least 1, at most its capacity, on the device.
        longest: the most tokens of any row, which bounds the number of splits; the largest capacity unless given.

    Returns:
        [B,H,head_dim].
    """
    batch, heads, width = q.shape
    groups = rows.groups
    keys, values, capacities = rows.pointers()
    pages, table, page = page_operands(rows)
    padded = max(16, triton.next_power_of_2(width))
    block = min(BLOCK, TILE // (padded * q.element_size()))
    programs = WAVE if 2 * batch * groups <= WAVE else PROGRAMS
    longest = rows.longest if longest is None else longest
    splits = max(1, min(programs // (batch * groups), MAX_SPLITS, triton.cdiv(longest, block)))
    share = heads // groups
    partial = q.new_empty((batch, heads, splits, width), dtype=torch.float32)
    weights = q.new_empty((batch, heads, splits), dtype=torch.float32)
    out = torch.empty_like(q)
    scale = width**-0.5 * 1.4426950408889634  # exp(x) = 2^(x·log2 e)
    _split_kernel[(batch * groups, splits)](
        q, keys, values, capacities, pages, lengths, partial, weights, scale,
        HEADS=heads, GROUPS=groups, SHARE=share, SHARE_PAD=max(16, triton.next_power_of_2(share)),
        WIDTH=width, WIDTH_PAD=padded, SLOT=rows.slots.width(width), SPLITS=splits, BLOCK=block,
        OPERAND=operand(q.dtype), WEIGHT=weight_operand(q.dtype, rows.dtype), TYPE=TYPES[rows.dtype],
        STAGES=3, TABLE=table, PAGE=page, OVERLAP=overlap,
        launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    _join_kernel[(batch * heads,)](
        partial, weights, lengths, out,
        HEADS=heads, WIDTH=width, WIDTH_PAD=padded, SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits),
        BLOCK=block, OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return out


def operand(dtype: torch.dtype) -> tl.dtype:
    """What the products multiply: the numbers as they are; under the interpreter, which cannot, bfloat16 as float32."""
    if dtype == torch.bfloat16:
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def weight_operand(dtype: torch.dtype, stored: torch.dtype) -> tl.dtype:
    """What the weights of values are multiplied as, in which float16 has no digits left for a weight times a scale."""
    return operand(torch.bfloat16 if (dtype, stored) == (torch.float16, torch.int8) else dtype)
