"""The ends of a decoding step: from tokens to the residual stream, and from logits to the most probable tokens.

The plain twins are ``DecodeOperators.begin`` and ``.greedy``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.step import Slots
from hyaena.ops.triton.decode.pdl import release, wait

BLOCK = 32768
"""The most logits that a program holds at once, 32 for each of its threads."""


@triton.jit
def _begin_kernel(ids, table, used, x, D: tl.constexpr, PAD: tl.constexpr, OVERLAP: tl.constexpr):
    """The embedding of one row's token; one more slot is in use."""
    wait(OVERLAP)
    release(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    if row == 0:
        tl.store(used, tl.load(used) + 1)
    token = tl.load(ids + row)
    tl.store(x + row * D + i, tl.load(table + token * D + i, mask=i < D, other=0.0), mask=i < D)


@triton.jit
def _greedy_kernel(logits, ids, said, V: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row: the largest logit, the first place of it, and Σ exp(logit - largest), block by block."""
    wait(OVERLAP)
    release(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    best = -float("inf")
    token = 0
    total = 0.0
    for start in tl.static_range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + i, mask=i < V, other=-float("inf")).to(tl.float32)
        highest = tl.max(value, axis=0)
        first = tl.min(tl.where(value == highest, i, V), axis=0)
        token = tl.where(highest > best, first, token)
        higher = tl.maximum(best, highest)
        shift = tl.where(higher > -float("inf"), higher, 0.0)
        total = total * tl.exp(best - shift) + tl.sum(tl.exp(value - shift), axis=0)
        best = higher
    good = total > 0.0  # NaN where any logit is NaN or +infinity, 0 where all are -infinity
    token = tl.where(good, token, 0)
    tl.store(ids + row, token.to(tl.int64))
    tl.store(said + row * 3, token.to(tl.float64))
    tl.store(said + row * 3 + 1, -tl.log(total).to(tl.float64))
    tl.store(said + row * 3 + 2, good.to(tl.float64))


def begin(ids: Tensor, table: Tensor, slots: Slots, *, overlap: bool = False) -> Tensor:
    """The rows of table [V,D] at ids [B]: [B,D]. ``slots.used`` goes up by one."""
    width = table.shape[1]
    x = table.new_empty(ids.shape[0], width)
    _begin_kernel[(ids.shape[0],)](
        ids, table, slots.used, x,
        D=width, PAD=triton.next_power_of_2(width), OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return x


def greedy(logits: Tensor, ids: Tensor, *, overlap: bool = False) -> Tensor:
    """The largest of logits [B,V] into ids [B]; float64 [B,3]: token, its log-probability, whether all was finite."""
    rows, vocabulary = logits.shape
    said = torch.empty(rows, 3, dtype=torch.float64, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    _greedy_kernel[(rows,)](
        logits, ids, said,
        V=vocabulary, BLOCK=block, OVERLAP=overlap, launch_pdl=overlap, num_warps=max(1, block // 1024),
    )  # fmt: skip
    return said
