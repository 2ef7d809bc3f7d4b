"""RoPE, the write to the KV cache and attention of one new token per row, in one kernel (flash decoding).

Every row uses the first ``lengths[b]`` slots of a store of its own, or of its pages, in which a block of slots never
crosses a page. Addresses, capacities, numbers of pages and lengths are read on the device, so a captured graph reads
the slots that are valid when it is replayed, and what belongs to them of the table of pages. The grid is fixed: the
``SPLITS`` programs of a (row, key head) divide what is valid, each a run of whole blocks, and those without any end
immediately. Each program serves all query heads of its key head, so keys and values are read once; it rotates these
queries itself, and the program of the last run writes the new key and value before it reads its slots.

Splits are joined by their log-sum-exp. The program that ends last joins them, in the order of the splits, so the result
does not depend on which it is: programs count themselves in ``arrived``, which the last sets back to zero. Until it has
joined them, the next kernel reads its weights, see ``ops.triton.pdl``.

The reference is ``DecodeOperators.attention``.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
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
from hyaena.ops.triton.decode.rows import first_slot, page_operands, read_slots, row_capacity, row_storage, write_slots
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

BLOCK = 64
"""Slots that a program reads at a time; fewer where heads are wide, to keep a block of keys within ``TILE`` bytes."""
TILE = 16384
PROGRAMS = 256
"""Programs to aim for, two on each processor of a large device; twice as many where half of them have a key head of a
row already, so that rows of different lengths share the device."""
MAX_SPLITS = 64
JOINED = 8192
"""Numbers of splits that a program joins at a time, 64 or 128 for each of its threads."""


@triton.jit
def soften(score, best, total):
    """A block [M,N] of scores (base 2) of a softmax that is computed block by block.

    Returns:
        The weights [M,N], against the largest score [M] so far; what sums of earlier blocks shrink by; that largest
        score; the sum of all weights so far.
    """
    higher = tl.maximum(best, tl.max(score, axis=1))
    shrink = tl.exp2(best - higher)
    p = tl.exp2(score - higher[:, None])
    return p, shrink, higher, total * shrink + tl.sum(p, axis=1)


@triton.jit
def _split_range(lengths, row, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """First and last slot (exclusive) of a split, and how many splits of this row have any.

    Two blocks are the least: both are in flight together.
    """
    stop = tl.load(lengths + row).to(tl.int32)
    width = tl.cdiv(tl.cdiv(stop, SPLITS), BLOCK) * BLOCK
    width = tl.maximum(width, 2 * BLOCK)
    begin = split * width
    return begin, tl.minimum(begin + width, stop), tl.cdiv(stop, width)


@triton.jit
def _read_rotated(x, channel, real, c, s, HALF: tl.constexpr):
    """Rotate heads at pointers x [SHARE_PAD,1]: x·cos and the other half times ±sin, float32 [SHARE_PAD,WIDTH_PAD]."""
    first = channel < HALF
    other = tl.where(first, channel + HALF, channel - HALF)
    own = tl.load(x + channel[None, :], mask=real, other=0.0).to(tl.float32)
    turned = tl.load(x + other[None, :], mask=real, other=0.0).to(tl.float32)
    return own * c[None, :] + tl.where(first[None, :], -turned, turned) * s[None, :]


@triton.jit
def _write_newest(x, key, value, cos, sin, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HALF_PAD: tl.constexpr,
                  SLOT: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Write the rotated key at x, and the value GROUPS heads behind it, to their slots; tables of the token's place."""
    HALF: tl.constexpr = WIDTH // 2
    i = tl.arange(0, HALF_PAD)
    here = i < HALF
    a = tl.load(x + i, mask=here, other=0.0).to(tl.float32)[None, :]
    b = tl.load(x + HALF + i, mask=here, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + i, mask=here, other=0.0)[None, :]
    s = tl.load(sin + i, mask=here, other=0.0)[None, :]
    x += GROUPS * WIDTH
    first = tl.load(x + i, mask=here, other=0.0).to(tl.float32)[None, :]
    second = tl.load(x + HALF + i, mask=here, other=0.0).to(tl.float32)[None, :]
    mine = tl.full([1, 1], 1, tl.int1)
    zero = tl.zeros([1, 1], tl.int32)
    write_slots(key + zero, a * c - b * s, b * c + a * s, mine, i, WIDTH, SLOT, TYPE)
    write_slots(value + zero, first, second, mine, i, WIDTH, SLOT, TYPE)


@triton.jit
def _join(partial, weights, out, count, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, SPLITS: tl.constexpr,
          SHARE: tl.constexpr, HEADS_PAD: tl.constexpr, TOGETHER: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Join the splits of SHARE heads by their normalisers, TOGETHER splits at a time."""
    head = tl.arange(0, HEADS_PAD)
    channel = tl.arange(0, WIDTH_PAD)
    here = head < SHARE
    inside = channel < WIDTH
    best = tl.full([HEADS_PAD], -float("inf"), tl.float32)
    total = tl.zeros([HEADS_PAD], tl.float32)
    sums = tl.zeros([HEADS_PAD, WIDTH_PAD], tl.float32)
    for at in tl.range(0, count, TOGETHER):
        split = at + tl.arange(0, TOGETHER)
        wrote = here[:, None] & (split < count)[None, :]  # what the others hold is left over from longer sequences
        place = head[:, None] * SPLITS + split[None, :]
        own = tl.load(weights + place, mask=wrote, other=-float("inf"))
        parts = tl.load(
            partial + place[:, :, None] * WIDTH + channel[None, None, :],
            mask=wrote[:, :, None] & inside[None, None, :],
            other=0.0,
        )
        p, shrink, best, total = soften(own, best, total)
        sums = sums * shrink[:, None] + tl.sum(parts * p[:, :, None], axis=1)
    gdc_launch_dependents(OVERLAP)
    store = out + head[:, None] * WIDTH + channel[None, :]
    mean = sums / total[:, None]
    tl.store(store, mean.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :])


# tables are parts of one tensor: no compilation for each of their alignments
@triton.jit(do_not_specialize_on_alignment=["pages", "lengths"])
def _attention_kernel(qkv, keys, values, capacities, pages, lengths, cos, sin, partial, weights, arrived, out, scale,
                      HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, SHARE_PAD: tl.constexpr,
                      HEADS_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
                      SLOT: tl.constexpr, SPLITS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
                      OPERAND: tl.constexpr, WEIGHT: tl.constexpr, TYPE: tl.constexpr, STAGES: tl.constexpr,
                      TABLE: tl.constexpr, PAGE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One split: its softmax over its own slots [SHARE,WIDTH], and the logarithm (base 2) of its normaliser."""
    gdc_wait(OVERLAP)
    row = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(1)
    begin, end, count = _split_range(lengths, row, split, SPLITS, BLOCK)
    if begin >= end:
        return
    HALF: tl.constexpr = WIDTH // 2
    share = tl.arange(0, SHARE_PAD)
    channel = tl.arange(0, WIDTH_PAD)
    inside = channel < WIDTH
    position = tl.load(lengths + row).to(tl.int64) - 1
    heads = qkv + row.to(tl.int64) * (HEADS + 2 * GROUPS) * WIDTH
    angle = position * HALF + channel % HALF
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    query = (heads + group * SHARE * WIDTH) + share[:, None] * WIDTH  # padded heads are never read or stored
    real = (share < SHARE)[:, None] & inside[None, :]
    qs = _read_rotated(query, channel, real, c, s, HALF).to(qkv.dtype.element_ty).to(OPERAND)
    base = group.to(tl.int64) * row_capacity(capacities, row, PAGE) * SLOT
    k = row_storage(keys, row, TYPE, PAGE) + base
    v = row_storage(values, row, TYPE, PAGE) + base
    if split == count - 1:
        slot = first_slot(pages, row, position, TABLE, PAGE) * SLOT
        at = position * HALF
        _write_newest(heads + (HEADS + group) * WIDTH, k + slot, v + slot, cos + at, sin + at,
                      GROUPS, WIDTH, HALF_PAD, SLOT, TYPE)  # fmt: skip
        tl.debug_barrier()  # all threads of the program read what some of them wrote

    best = tl.full([SHARE_PAD], -float("inf"), tl.float32)
    total = tl.zeros([SHARE_PAD], tl.float32)
    sums = tl.zeros([SHARE_PAD, WIDTH_PAD], tl.float32)
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
        p, shrink, best, total = soften(score, best, total)
        if SLOT > WIDTH:
            p *= of_value[None, :]
        sums = sums * shrink[:, None] + tl.dot(p.to(WEIGHT), vs, input_precision="ieee")
    mean = sums / total[:, None]
    first = row.to(tl.int64) * HEADS + group * SHARE  # the first of the program's heads
    out += first * WIDTH
    if count == 1:
        tl.store(out + share[:, None] * WIDTH + channel[None, :], mean.to(out.dtype.element_ty), mask=real)
        return
    partial += first * SPLITS * WIDTH
    weights += first * SPLITS
    store = share * SPLITS + split
    tl.store(partial + store[:, None] * WIDTH + channel[None, :], mean, mask=real)
    tl.store(weights + store, best + tl.log2(total), mask=share < SHARE)
    tl.debug_barrier()  # before one thread says that all have written
    arrived += tl.program_id(0)
    if tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1:
        tl.store(arrived, 0)
        # not before: what is read here would wait behind the weights of the next kernel
        _join(partial, weights, out, count, WIDTH, WIDTH_PAD, SPLITS, SHARE, HEADS_PAD, TOGETHER, OVERLAP)


def decode_attention(
    qkv: Tensor,
    rows: KVState | PagedRows,
    context: StepContext,
    arrived: Tensor,
    *,
    longest: int | None = None,
    overlap: bool = False,
) -> Tensor:
    """Attention of the newest token of every row to all tokens of that row, itself included.

    Queries and keys of the token are rotated, its keys and values are stored at slot ``lengths - 1`` of its row.

    Args:
        qkv: [B,(H+2G)·head_dim], queries, keys and values in this order; float32, bfloat16 or float16.
        rows: keys and values of B rows, head_dim at most 256; slots outside the valid ones may hold anything.
        context: lengths int32 [B], tokens of each row with the new one, at least 1, at most its capacity, and the
            tables of the rotation, on the device.
        arrived: int32 [B·G] or more, zeros, and zeros again afterwards; of no other kernel that may run meanwhile.
        longest: the most tokens of any row, which bounds the number of splits; the largest capacity unless given.

    Returns:
        [B,H,head_dim].
    """
    groups, width = rows.groups, rows.head_dim
    batch, heads = qkv.shape[0], qkv.shape[1] // width - 2 * groups
    keys, values, capacities = rows.pointers()
    pages, table, page = page_operands(rows)
    padded = max(16, triton.next_power_of_2(width))
    block = min(BLOCK, TILE // (padded * qkv.element_size()))
    pairs = batch * groups
    longest = rows.longest if longest is None else longest
    programs = PROGRAMS if 2 * pairs <= PROGRAMS else 2 * PROGRAMS
    splits = max(1, min(programs // pairs, MAX_SPLITS, triton.cdiv(longest, 2 * block)))
    share = heads // groups
    share_pad = triton.next_power_of_2(share)
    # what two warps have registers for: numbers that are multiplied as they are read
    small = share <= 16 and padded <= 128 and qkv.dtype == rows.dtype != torch.float32
    ahead = 2 if pairs * splits <= PROGRAMS else 1  # blocks of slots on their way, and of numbers of pages before them
    partial = qkv.new_empty((batch, heads, splits, width), dtype=torch.float32)
    weights = qkv.new_empty((batch, heads, splits), dtype=torch.float32)
    out = qkv.new_empty(batch, heads, width)
    scale = width**-0.5 * 1.4426950408889634  # exp(x) = 2^(x·log2 e)
    _attention_kernel[(pairs, splits)](
        qkv, keys, values, capacities, pages, context.lengths, *context.rotary, partial, weights, arrived, out, scale,
        HEADS=heads, GROUPS=groups, SHARE=share, SHARE_PAD=max(16, share_pad), HEADS_PAD=share_pad,
        WIDTH=width, WIDTH_PAD=padded, HALF_PAD=triton.next_power_of_2(width // 2), SLOT=rows.slots.width(width),
        SPLITS=splits, TOGETHER=max(1, JOINED // (share_pad * padded)),
        BLOCK=block, OPERAND=operand(qkv.dtype), WEIGHT=weight_operand(qkv.dtype, rows.dtype), TYPE=TYPES[rows.dtype],
        STAGES=1 + ahead * (2 if page else 1), TABLE=table, PAGE=page, OVERLAP=overlap,
        launch_pdl=overlap, num_warps=2 if small else 4,
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
