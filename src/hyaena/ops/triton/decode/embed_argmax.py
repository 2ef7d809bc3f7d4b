"""Embedding lookup and greedy argmax of a decoding step.

The references are ``DecodeOperators.embed`` and ``.argmax``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.step import StepContext
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

BLOCK = 32768
"""The most logits that a program reads in one step, 32 for each of its threads."""


@triton.jit
def _embed_kernel(ids, table, lengths, limits, x, D: tl.constexpr, PAD: tl.constexpr, OVERLAP: tl.constexpr):
    """Look up the embedding of one row's token and count the token."""
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    tl.store(lengths + row, tl.minimum(tl.load(lengths + row) + 1, tl.load(limits + row)))
    token = tl.load(ids + row)
    tl.store(x + row * D + i, tl.load(table + token * D + i, mask=i < D, other=0.0), mask=i < D)


@triton.jit
def _argmax_kernel(logits, ids, out, V: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row: the largest logit, the first place of it, and Σ exp(logit - largest), block by block."""
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
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
    tl.store(out + row * 3, token.to(tl.float64))
    tl.store(out + row * 3 + 1, -tl.log(total).to(tl.float64))
    tl.store(out + row * 3 + 2, good.to(tl.float64))


def embed(ids: Tensor, table: Tensor, context: StepContext, *, overlap: bool = False) -> Tensor:
    """Look up ids [B] in table [V,D]: [B,D]; ``context.lengths`` goes up by one, to its limits at most."""
    width = table.shape[1]
    x = table.new_empty(ids.shape[0], width)
    _embed_kernel[(ids.shape[0],)](
        ids, table, context.lengths, context.limits, x,
        D=width, PAD=triton.next_power_of_2(width), OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return x


def argmax(logits: Tensor, ids: Tensor, *, overlap: bool = False) -> Tensor:
    """Write the argmax of logits [B,V] into ids [B]; float64 [B,3]: token, log-probability, all finite."""
    rows, vocabulary = logits.shape
    out = torch.empty(rows, 3, dtype=torch.float64, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    _argmax_kernel[(rows,)](
        logits, ids, out,
        V=vocabulary, BLOCK=block, OVERLAP=overlap, launch_pdl=overlap, num_warps=max(1, block // 1024),
    )  # fmt: skip
    return out
