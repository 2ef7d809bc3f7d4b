"""The thin products of a LoRA update, with a wide tensor that is read once.

``u = x·pᵀ`` sums over features and ``v = qᵀ·x`` over tokens, for x [T,F] and r columns of p and q, at most 64. A
program has BF features of a run of tokens; it adds v up over its tokens, and writes its share of u for every token. The
shares are then added in a fixed order, so results are the same on every run.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 64
TOKENS = 32
"""Tokens of a tile: with 512 features of 16 bits, 32 KiB, three of which are in flight."""
FEATURES = 512
PROGRAMS = 264
"""Two for each multiprocessor of an H100; more programs make more shares of v."""


@triton.jit(do_not_specialize=["T", "run"])
def _products_kernel(x, p, q, u, v, T, F, run, p_row, p_col, R: tl.constexpr, RANKS: tl.constexpr, BT: tl.constexpr,
                     BF: tl.constexpr, HAS_P: tl.constexpr, HAS_Q: tl.constexpr):  # fmt: skip
    """Shares of u [features / BF,T,R] and v [runs,R,F], float32. Grid: (features / BF, runs)."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    r = tl.arange(0, RANKS)
    inside = f < F
    first = tl.program_id(1) * run
    total = tl.zeros((RANKS, BF), tl.float32)
    if HAS_P:
        factor = tl.load(
            p + f[:, None] * p_col + r[None, :] * p_row, mask=inside[:, None] & (r < R)[None, :], other=0.0
        )
    for start in range(first, tl.minimum(first + run, T), BT):
        t = start + tl.arange(0, BT)
        here = (t < T)[:, None]
        tile = tl.load(x + t[:, None].to(tl.int64) * F + f[None, :], mask=here & inside[None, :], other=0.0)
        if HAS_P:
            share = tl.dot(tile, factor, input_precision="ieee")  # [BT,RANKS]
            at = (tl.program_id(0).to(tl.int64) * T + t[:, None]) * R + r[None, :]
            tl.store(u + at, share, mask=here & (r < R)[None, :])
        if HAS_Q:
            weights = tl.load(q + r[:, None] + t[None, :] * R, mask=(r < R)[:, None] & (t < T)[None, :], other=0.0)
            total = tl.dot(weights, tile, total, input_precision="ieee")
    if HAS_Q:
        at = (tl.program_id(1) * R + r[:, None]) * F + f[None, :]
        tl.store(v + at, total, mask=(r < R)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["count", "shares"])
def _sum_kernel(u, out, count, shares, scale, BLOCK: tl.constexpr):
    """``scale·Σ u`` over the shares of u [shares,count], in the dtype of ``out``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(shares):
        total += tl.load(u + tl.cast(share, tl.int64) * count + i, mask=i < count, other=0.0)
    tl.store(out + i, (scale * total).to(out.dtype.element_ty), mask=i < count)


def takes(x: Tensor, p: Tensor | None, q: Tensor | None) -> bool:
    """Whether the kernels are meant for these operands: 16-bit numbers, many rows, few columns."""
    rank = p.shape[0] if p is not None else q.shape[1] if q is not None else 0
    return x.dtype.itemsize == 2 and 0 < rank <= MAX_RANK and x.shape[0] >= 16 * TOKENS


def products(x: Tensor, p: Tensor | None, q: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor | None]:
    """``scale·x·pᵀ`` [T,r] in the dtype of x, and ``qᵀ·x`` float32 [r,F]: x [T,F], p [r,F], q [T,r].

    Without p, the first is None; without q, the second.
    """
    x = x.contiguous()
    length, width = x.shape
    rank = p.shape[0] if p is not None else q.shape[1]  # type: ignore[union-attr]
    blocks = triton.cdiv(width, FEATURES)
    run = triton.cdiv(triton.cdiv(length, max(1, PROGRAMS // blocks)), TOKENS) * TOKENS
    runs = triton.cdiv(length, run)
    shares = None if p is None else x.new_empty(blocks, length, rank, dtype=torch.float32)
    u = None if p is None else x.new_empty(length, rank)
    v = None if q is None else x.new_empty(runs, rank, width, dtype=torch.float32)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _products_kernel[(blocks, runs)](
            x, x if p is None else p, x if q is None else q.contiguous(), x if shares is None else shares,
            x if v is None else v, length, width, run, *((0, 0) if p is None else p.stride()), R=rank,
            RANKS=max(16, triton.next_power_of_2(rank)), BT=TOKENS, BF=FEATURES, HAS_P=p is not None,
            HAS_Q=q is not None, num_warps=8, num_stages=3,
        )  # fmt: skip
        if u is not None:
            _sum_kernel[(triton.cdiv(u.numel(), 256),)](shares, u, u.numel(), blocks, scale, BLOCK=256, num_warps=4)
    return u, (None if v is None else v.sum(0))
