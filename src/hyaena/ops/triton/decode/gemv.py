"""Products of a weight matrix and one vector, bound by the speed at which memory streams the matrix.

A program owns a few rows of the matrix and reads them along K, 16 bytes a thread; sums are float32. What stands
around the product costs no pass of its own:

- the RMSNorm before it: ``W·(x·g/rms(x)) = (W·(x·g))/rms(x)``, and a program that reads all of x knows its rms;
- a second matrix on the same x with ``act(a)·b`` after it (gate and up of an MLP);
- bias and residual.

Numbers whose squares overflow float32 are normalised all the same. Sums of products are of the numbers as they are:
near the end of float32 they overflow, and the result is not finite.

For several vectors a library's matrix product is faster. The references are ``DecodeOperators.linear`` and ``.gate``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.linear import Dense
from hyaena.ops.norm import BOUND
from hyaena.ops.step import RMSNormWeight
from hyaena.ops.triton.common import activate, rms_scale
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

SHRINK = tl.constexpr(BOUND * 2.0**-128)
"""Scales the largest float32 down to the largest number whose square is summed."""


@dataclass(frozen=True)
class Tile:
    """What a program reads: ``rows`` of each matrix, ``width`` of K at a time, both powers of two.

    Attributes:
        ahead: pieces of ``width`` that are loaded into registers before anything else.
    """

    rows: int
    width: int
    warps: int
    ahead: int


def choose_tile(matrices: int, width: int) -> Tile:
    """For some matrices of ``width`` columns each.

    Whole rows where they fit: every thread loads 64 numbers before it waits for anything.
    """
    if width < 2048:
        return Tile(rows=4, width=max(32, triton.next_power_of_2(width)), warps=4, ahead=1)
    pieces = triton.cdiv(width, 2048)
    warps = 4 if matrices * pieces <= 4 else 8
    rows = max(1, warps // triton.next_power_of_2(matrices * pieces))
    return Tile(rows=rows, width=2048, warps=warps, ahead=min(pieces, 8))


@triton.jit
def read_rows(w, at, k, inside, K: tl.constexpr, WHOLE: tl.constexpr):
    """A piece [BN,BK] of the program's rows; WHOLE where nothing of it lies outside, so that no read is guarded."""
    if WHOLE:
        return tl.load(w + at + k[None, :], eviction_policy="evict_first")
    else:
        return tl.load(w + at + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0,
                       eviction_policy="evict_first")  # fmt: skip


@triton.jit
def read_vector(x, k, K: tl.constexpr, WHOLE: tl.constexpr):
    """A piece [BK] of a vector, float32."""
    if WHOLE:
        return tl.load(x + k).to(tl.float32)
    else:
        return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def add_piece(sums, squares, pieces, x, g, k, K: tl.constexpr, HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):
    """Add to each sum [BN,BK] its piece times x, and to the squares [BK] those of x."""
    v = read_vector(x, k, K, WHOLE)
    if HAS_NORM:
        squares += v * v
        v *= read_vector(g, k, K, WHOLE)
    next_sums = ()
    for i in tl.static_range(len(sums)):
        next_sums = next_sums + (sums[i] + pieces[i].to(tl.float32) * v[None, :],)
    return next_sums, squares


@triton.jit
def norm_scale(squares, x, eps, K: tl.constexpr, EPS_INSIDE: tl.constexpr):
    """1 / rms of x [K], from its squares [BK]; x is read again, and scaled down, only where they overflowed."""
    scale = rms_scale(squares, eps, K, EPS_INSIDE)
    if scale == 0.0:
        small = tl.zeros((128,), tl.float32)
        for start in tl.range(0, K, 128, loop_unroll_factor=1):  # few registers, or fewer programs would run beside
            k = start + tl.arange(0, 128)
            v = tl.load(x + k, mask=k < K, other=0.0, volatile=True).to(tl.float32) * SHRINK
            small += v * v
        scale = rms_scale(small, 0.0, K, True) * SHRINK  # eps is nothing beside such numbers
    return scale


@triton.jit
def scaled(numbers, scale):
    """A tuple of tensors, each times a number."""
    out = ()
    for i in tl.static_range(len(numbers)):
        out = out + (numbers[i] * scale,)
    return out


@triton.jit
def products(x, g, w, eps,
             N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_NORM: tl.constexpr,
             EPS_INSIDE: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The program's rows of ``w[i]·norm(x)`` for every matrix i: a tuple of float32 [BN].

    Args:
        x: [K].
        g: the norm's weight [K].
        w: a tuple of matrices [N,K]. Their first pieces are loaded before the kernel waits for x.
    """
    WHOLE: tl.constexpr = (N % BN == 0) & (K % BK == 0)
    first = tl.program_id(0) * BN
    rows = first + tl.arange(0, BN)
    inside = rows < N
    at = rows.to(tl.int64)[:, None] * K
    pieces = ()
    for piece in tl.static_range(AHEAD):
        k = piece * BK + tl.arange(0, BK)
        for i in tl.static_range(len(w)):
            pieces = pieces + (read_rows(w[i], at, k, inside, K, WHOLE),)
    gdc_wait(OVERLAP)
    sums = ()
    for _ in tl.static_range(len(w)):
        sums = sums + (tl.zeros((BN, BK), tl.float32),)
    squares = tl.zeros((BK,), tl.float32)
    for piece in tl.static_range(AHEAD):
        k = piece * BK + tl.arange(0, BK)
        here = pieces[piece * len(w) : (piece + 1) * len(w)]
        sums, squares = add_piece(sums, squares, here, x, g, k, K, HAS_NORM, WHOLE)
    for start in range(AHEAD * BK, K, BK):
        k = start + tl.arange(0, BK)
        here = ()  # issue the weight loads first: DRAM latency
        for i in tl.static_range(len(w)):
            here = here + (read_rows(w[i], at, k, inside, K, WHOLE),)
        sums, squares = add_piece(sums, squares, here, x, g, k, K, HAS_NORM, WHOLE)
    gdc_launch_dependents(OVERLAP)
    out = ()
    for i in tl.static_range(len(w)):
        out = out + (tl.sum(sums[i], axis=1),)
    if HAS_NORM:  # only now: the branch inside would keep all sums in registers
        out = scaled(out, norm_scale(squares, x, eps, K, EPS_INSIDE))
    return out


@triton.jit
def _linear_kernel(x, g, w, bias, residual, out, eps,
                    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_NORM: tl.constexpr,
                    EPS_INSIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                    AHEAD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    y = products(x, g, (w,), eps, N, K, BN, BK, HAS_NORM, EPS_INSIDE, AHEAD, OVERLAP)[0]
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(x, g, gate, up, out, eps,
                 N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_NORM: tl.constexpr,
                 EPS_INSIDE: tl.constexpr, ACTIVATION: tl.constexpr, AHEAD: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    a, b = products(x, g, (gate, up), eps, N, K, BN, BK, HAS_NORM, EPS_INSIDE, AHEAD, OVERLAP)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(out + rows, (activate(a, ACTIVATION) * b).to(out.dtype.element_ty), mask=rows < N)


def linear(
    x: Tensor,
    layer: Dense,
    *,
    norm: RMSNormWeight | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """``residual + weight·norm(x) + bias``: x [1,D], weight [E,D] -> [1,E]."""
    weight, bias = layer
    rows, width = weight.shape
    out = x.new_empty(1, rows)
    tile = tile or choose_tile(1, width)
    _linear_kernel[(triton.cdiv(rows, tile.rows),)](
        x, x if norm is None else norm.weight, weight, x if bias is None else bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps,
        N=rows, K=width, BN=tile.rows, BK=tile.width, HAS_NORM=norm is not None,
        EPS_INSIDE=norm is None or norm.eps_inside_root, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        AHEAD=min(tile.ahead, triton.cdiv(width, tile.width)), OVERLAP=overlap, launch_pdl=overlap,
        num_warps=tile.warps,
    )  # fmt: skip
    return out


def gate(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    norm: RMSNormWeight | None = None,
    activation: str,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """``act(gate·norm(x)) · (up·norm(x))``: x [1,D], weights [E,D] -> [1,E]."""
    rows, width = gate.shape
    out = x.new_empty(1, rows)
    tile = tile or choose_tile(2, width)
    _gate_kernel[(triton.cdiv(rows, tile.rows),)](
        x, x if norm is None else norm.weight, gate, up, out, 0.0 if norm is None else norm.eps,
        N=rows, K=width, BN=tile.rows, BK=tile.width, HAS_NORM=norm is not None,
        EPS_INSIDE=norm is None or norm.eps_inside_root, ACTIVATION=activation,
        AHEAD=min(tile.ahead, triton.cdiv(width, tile.width)), OVERLAP=overlap, launch_pdl=overlap,
        num_warps=tile.warps,
    )  # fmt: skip
    return out
