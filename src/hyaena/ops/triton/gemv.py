"""Products of a weight matrix and a few vectors, bound by the speed at which memory streams the matrix.

A program owns a few rows of the matrix and reads them along K, 16 bytes a thread; sums are float32. What stands
around the product costs no pass of its own:

- the RMSNorm before it: ``W·(x·g/rms(x)) = (W·(x·g))/rms(x)``, and a program that reads all of x knows its rms;
- a second matrix on the same x with ``act(a)·b`` after it (gate and up of an MLP);
- bias and residual.

The plain twins are ``DecodeOperators.project`` and ``.gate``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.decode import Norm

MAX_ROWS = 1
"""Vectors that one pass over the matrix serves; for four, on an H100, cuBLAS is 17 times as fast."""


@dataclass(frozen=True)
class Tile:
    """What a program reads at a time: ``rows`` of each matrix by ``width`` of K, both powers of two."""

    rows: int
    width: int
    warps: int
    stages: int


def choose_tile(rows: int, width: int, vectors: int) -> Tile:
    """For matrices [rows,width]: many short programs, since their number evens out the load."""
    narrow = min(1024, max(32, triton.next_power_of_2(width)))
    return Tile(rows=4 if vectors == 1 else 2, width=narrow, warps=4, stages=3)


@triton.jit
def rms_scale(squares, eps, K: tl.constexpr, EPS_INSIDE: tl.constexpr):
    """1 / rms of a vector of K numbers, from their squares."""
    mean = tl.sum(squares, axis=0) / K
    if EPS_INSIDE:
        return 1.0 / tl.sqrt(mean + eps)
    return 1.0 / (tl.sqrt(mean) + eps)


@triton.jit
def products(x, g, w, rows, eps, limit,
             M: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_NORM: tl.constexpr,
             EPS_INSIDE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """``w[i][rows]·norm(x[m])`` for every matrix i and vector m: a tuple of float32 [BN], matrix by matrix.

    Args:
        x: [M,K].
        g: the norm's weight [K].
        w: a tuple of matrices [.,K].
        rows: int [BN], those of this program; not read from ``limit`` on.
    """
    W: tl.constexpr = len(w)
    inside = rows < limit
    at = rows.to(tl.int64)[:, None] * K
    sums = ()
    for _ in tl.static_range(W * M):
        sums = sums + (tl.zeros((BN, BK), tl.float32),)
    squares = ()
    for _ in tl.static_range(M):
        squares = squares + (tl.zeros((BK,), tl.float32),)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        real = k < K
        tiles = ()
        for i in tl.static_range(W):
            tile = tl.load(w[i] + at + k[None, :], mask=inside[:, None] & real[None, :], other=0.0,
                           eviction_policy="evict_first")  # fmt: skip
            tiles = tiles + (tile.to(tl.float32),)
        if HAS_NORM:
            gain = tl.load(g + k, mask=real, other=0.0).to(tl.float32)
        next_sums = ()
        next_squares = ()
        vectors = ()
        for m in tl.static_range(M):
            v = tl.load(x + m * K + k, mask=real, other=0.0).to(tl.float32)
            if HAS_NORM:
                next_squares = next_squares + (squares[m] + v * v,)
                v = v * gain
            else:
                next_squares = next_squares + (squares[m],)
            vectors = vectors + (v,)
        for i in tl.static_range(W):
            for m in tl.static_range(M):
                next_sums = next_sums + (sums[i * M + m] + tiles[i] * vectors[m][None, :],)
        sums = next_sums
        squares = next_squares
    out = ()
    for i in tl.static_range(W):
        for m in tl.static_range(M):
            y = tl.sum(sums[i * M + m], axis=1)
            if HAS_NORM:
                y = y * rms_scale(squares[m], eps, K, EPS_INSIDE)
            out = out + (y,)
    return out


@triton.jit
def _project_kernel(x, g, w, bias, residual, out, eps,
                    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
                    HAS_RESIDUAL: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    ys = products(x, g, (w,), rows, eps, N, M, K, BN, BK, HAS_NORM, EPS_INSIDE, STAGES)
    if HAS_BIAS:
        offset = tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        y = ys[m]
        if HAS_BIAS:
            y += offset
        if HAS_RESIDUAL:
            y += tl.load(residual + m * N + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + m * N + rows, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(x, g, gate, up, out, eps,
                 M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, GELU: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ys = products(x, g, (gate, up), rows, eps, N, M, K, BN, BK, HAS_NORM, EPS_INSIDE, STAGES)
    for m in tl.static_range(M):
        a = ys[m]
        if GELU:  # noqa: SIM108, one branch is compiled
            a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
        else:
            a = a / (1.0 + tl.exp(-a))
        tl.store(out + m * N + rows, (a * ys[M + m]).to(out.dtype.element_ty), mask=rows < N)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``residual + weight·norm(x) + bias``: x [B,D] with B at most ``MAX_ROWS``, weight [E,D] -> [B,E]."""
    (count, width), rows = x.shape, weight.shape[0]
    out = x.new_empty(count, rows)
    tile = tile or choose_tile(rows, width, count)
    _project_kernel[(triton.cdiv(rows, tile.rows),)](
        x, x if norm is None else norm.weight, weight, x if bias is None else bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps,
        M=count, N=rows, K=width, BN=tile.rows, BK=tile.width, HAS_NORM=norm is not None,
        EPS_INSIDE=norm is None or norm.eps_inside_root, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def gate(
    x: Tensor, gate: Tensor, up: Tensor, *, norm: Norm | None = None, activation: str, tile: Tile | None = None
) -> Tensor:
    """``act(gate·norm(x)) · (up·norm(x))``: x [B,D] with B at most ``MAX_ROWS``, weights [E,D] -> [B,E]."""
    (count, width), rows = x.shape, gate.shape[0]
    out = x.new_empty(count, rows)
    tile = tile or choose_tile(rows, width, 2 * count)
    _gate_kernel[(triton.cdiv(rows, tile.rows),)](
        x, x if norm is None else norm.weight, gate, up, out, 0.0 if norm is None else norm.eps,
        M=count, N=rows, K=width, BN=tile.rows, BK=tile.width, HAS_NORM=norm is not None,
        EPS_INSIDE=norm is None or norm.eps_inside_root, GELU=activation == "gelu",
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
