"""Products of a narrow weight matrix (``ops.Narrow``) and one vector: read narrow, multiplied in registers.

As in ``gemv``, a program owns a few rows of the matrix, loads the first pieces of them before it waits for x, and sums
in float32; an RMSNorm before it, a second matrix, bias and residual cost no pass of their own.

Memory streams narrow weights faster than a GPU can make float32 numbers of them and multiply: at 4 bits there is time
for some four operations a weight. So integers are multiplied as integers. A thread takes *units* of 16 bytes, the 16
columns of 8 bits or 32 of 4 bits that lie there, and the numbers of x that meet them. It rounds those to 16 bits of the
largest of them, as high and low bytes, and an instruction multiplies four bytes with four and adds them up (dp4a):

    x[d] = step·(256·high[d] + low[d])      Σ_(d in unit) q[d]·x[d] = step·(256·Σ q·high + Σ q·low)

exactly in int32. Scales and minima are applied once for a unit, in float32. e4m3 numbers become pairs of float16 by a
shift and meet x as pairs of float16; the sums of a unit are float16, too. No number changes threads before the last
sum. Programs stay and take one block of rows after another, of which the next is on its way: x is prepared once. Blocks
further ahead are on their way to the cache of the device, also while a program waits for its predecessor.

Several vectors are further programs, which find the weights in the cache of the device; ``few_rows`` multiplies vectors
of 16 bits together. The reference is ``ops.narrow_linear``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.narrow import Narrow
from hyaena.ops.step import RMSNormWeight
from hyaena.ops.triton.common import activate
from hyaena.ops.triton.decode.gemv import norm_scale
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

MOST_ROWS = 8
"""Vectors up to which products are computed here."""

UNIT = 16
"""Bytes of a unit, which belong to one group."""


@dataclass(frozen=True)
class Tile:
    """What a program reads.

    Attributes:
        rows: of each matrix, at a time; a power of two.
        units: of a row that threads share; a power of two.
        programs: on a processor; together they take one block of rows after another.
        ahead: blocks on their way to the cache of the device, beyond those on their way to registers.
        lead: blocks that are left when the next kernel is launched.
    """

    rows: int
    units: int
    warps: int
    programs: int
    ahead: int = 0
    lead: int = 1


def choose_tile(bits: int, matrices: int, units: int) -> Tile:
    """For some matrices of numbers of so many bits, with so many units in a row.

    Whole rows, or half of those that would leave no registers for a second block; as many programs as their registers
    let run at the same time. Only numbers of 4 bits, whose blocks are short, gain by what is fetched further ahead.
    """
    width = triton.next_power_of_2(units)
    if matrices == 2:
        return Tile(rows=2, units=min(128, width), warps=4, programs=4)
    ahead = 4 if bits == 4 else 0
    if units <= 256:
        return Tile(rows=2, units=width, warps=max(4, width // 32), programs=5 if width <= 128 else 4, ahead=ahead)
    width = min(512, width // 2)
    return Tile(rows=2, units=width, warps=width // 32, programs=1, ahead=ahead, lead=4 if ahead else 1)


@triton.jit
def prefetch(p, size, here):
    """Let the cache of the device fetch so many bytes from p on, both multiples of 16, if here; one thread does."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, $2; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0;}",
        "=r,l,r,r", [p.to(tl.int64), here.to(tl.int32), size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_block(w, s, m, block, N: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr, MINIMA: tl.constexpr,
                   BN: tl.constexpr):  # fmt: skip
    """Let the cache of the device fetch a block of rows of each matrix, and what belongs to them."""
    here = (block + 1) * BN <= N
    first = (block * BN).to(tl.int64)
    SCALES: tl.constexpr = BN * GROUPS * 2
    for i in tl.static_range(len(w)):
        prefetch(w[i] + first * (UNITS * 4), tl.full((), BN * UNITS * 16, tl.int32), here)
        if (GROUPS > 1) & (SCALES % 16 == 0):
            prefetch(s[i] + first * GROUPS, tl.full((), SCALES, tl.int32), here)
            if MINIMA:
                prefetch(m[i] + first * GROUPS, tl.full((), SCALES, tl.int32), here)


@triton.jit
def read_units(w, s, m, first, N: tl.constexpr, u, BN: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr,
               MINIMA: tl.constexpr):  # fmt: skip
    """Words [BN,NU,4] of rows from the first on; scales and minima of their groups [BN,NU], where there are groups."""
    row = tl.arange(0, BN)  # products of 32 bits, which are constants beside those of a thread
    here = (first + row < N)[:, None] & (u < UNITS)[None, :]
    at = row[:, None, None] * (UNITS * 4) + (u * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    words = tl.load(w + first.to(tl.int64) * (UNITS * 4) + at, mask=here[:, :, None], other=0,
                    eviction_policy="evict_first")  # fmt: skip
    scale, least = 1.0, 0.0
    if (GROUPS > 1) | MINIMA:
        place = row[:, None] * GROUPS + (u * GROUPS // UNITS)[None, :]
        scale = tl.load(s + first.to(tl.int64) * GROUPS + place, mask=here, other=0.0)
        if MINIMA:
            least = tl.load(m + first.to(tl.int64) * GROUPS + place, mask=here, other=0.0)
    return words, scale, least


@triton.jit
def half_of(pair, i: tl.constexpr):
    """The low or the high float16 of words, float32."""
    return (pair >> 16 * i).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dot_halves(a, b, c, ODD: tl.constexpr, ASM: tl.constexpr):
    """Pairs of float16 ``c + a·b``, with the even or odd e4m3 bytes of words a, 256 times smaller; c is float32 sums of
    pairs where there are no instructions."""
    if ASM:
        return tl.inline_asm_elementwise(
            ("{.reg .b32 t, s; mov.b32 t, $1;" if ODD else "{.reg .b32 t, s; shl.b32 t, $1, 8;")
            + " and.b32 s, t, 0x80008000; shr.u32 t, t, 1; and.b32 t, t, 0x3F803F80; or.b32 t, t, s;"
            + " fma.rn.f16x2 $0, t, $2, $3;}",
            "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        t = a if ODD else a << 8
        t = (t & -0x7FFF8000) | ((t >> 1) & 0x3F803F80)
        return c + half_of(t, 0) * half_of(b, 0) + half_of(t, 1) * half_of(b, 1)


@triton.jit
def dot_bytes(a, b, c, SIGNED: tl.constexpr, OTHER_SIGNED: tl.constexpr, ASM: tl.constexpr):
    """``c + Σ_i a_i·b_i`` of the four bytes of words: one instruction; the interpreter has none."""
    if ASM:
        return tl.inline_asm_elementwise(
            ("dp4a.s32" if SIGNED else "dp4a.u32") + (".s32" if OTHER_SIGNED else ".u32") + " $0, $1, $2, $3;",
            "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for i in tl.static_range(4):
            x, y = (a >> (8 * i)) & 255, (b >> (8 * i)) & 255
            x = (x ^ 128) - 128 if SIGNED else x
            y = (y ^ 128) - 128 if OTHER_SIGNED else y
            c += x * y
        return c


@triton.jit
def read_eight(x, g, k, inside, HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):
    """Eight numbers for each unit, float32 [NU,8]: x times the norm's weight; and the sum of the squares of x [NU]."""
    k = k[:, None] + tl.arange(0, 8)[None, :]
    v = tl.load(x + k, mask=None if WHOLE else inside[:, None], other=None if WHOLE else 0.0).to(tl.float32)
    squares = tl.sum(v * v, axis=1)
    if HAS_NORM:
        v *= tl.load(g + k, mask=None if WHOLE else inside[:, None], other=None if WHOLE else 0.0).to(tl.float32)
    return v, squares


@triton.jit
def split_four(v):
    """[...,4] -> four tensors [...]."""
    even, odd = tl.split(tl.reshape(v, v.shape[:-1] + [2, 2]))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def split_eight(v):
    """[NU,8] -> eight tensors [NU]."""
    low, high = tl.split(tl.permute(tl.reshape(v, (v.shape[0], 2, 4)), (0, 2, 1)))
    return split_four(low) + split_four(high)


@triton.jit
def rounding(largest):
    """What makes integers of 16 bits of numbers up to this one, and its inverse, which is infinite where this is."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True) * 0.9999  # none is rounded up to 2^15
    step = tl.where(exponent == 255, 0x7F800000, (exponent - 14) << 23).to(tl.float32, bitcast=True)
    return inverse, step * (1.0 / 0.9999)


@triton.jit
def planes(v, inverse):
    """v [NU,8] as integers: two words [NU] of signed high bytes, and two of low ones."""
    q = (v * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)  # the sum's last bits are v rounded
    a = split_eight(q)
    high, low = (), ()
    for i in tl.static_range(2):
        b = a[4 * i : 4 * i + 4]
        low = low + ((b[0] & 255) | ((b[1] & 255) << 8) | ((b[2] & 255) << 16) | (b[3] << 24),)
        high = high + (((b[0] >> 8) & 255) | (b[1] & 0xFF00) | ((b[2] & 0xFF00) << 8) | ((b[3] & 0xFF00) << 16),)
    return high, low


@triton.jit
def multiply(words, high, low, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """``Σ q·x/step`` of the bytes of some words, int32 [BN,NU]."""
    zero = tl.zeros(words[0].shape, tl.int32)
    upper, lower = zero, zero
    for i in tl.static_range(len(words)):
        upper = dot_bytes(words[i], high[i][None, :] + zero, upper, SIGNED, True, ASM)
        lower = dot_bytes(words[i], low[i][None, :] + zero, lower, SIGNED, False, ASM)
    return (upper << 8) + lower


@triton.jit
def halves(v, inverse):
    """v [NU,8] as pairs of float16, at most 1: four words [NU], of columns 0 and 2, 1 and 3, 4 and 6, 5 and 7."""
    a = split_eight((v * (inverse * 2.0**-15)[:, None]).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    return a[0] | (a[2] << 16), a[1] | (a[3] << 16), a[4] | (a[6] << 16), a[5] | (a[7] << 16)


@triton.jit
def multiply_halves(words, pairs, ASM: tl.constexpr):
    """``Σ q·x/step`` of e4m3 numbers, float32 [BN,NU]; sixteen of them are summed in pairs of float16."""
    total = tl.zeros(words[0].shape, tl.int32 if ASM else tl.float32)
    zero = tl.zeros(words[0].shape, tl.int32)
    for i in tl.static_range(8):
        total = dot_halves(words[i // 2], pairs[i][None, :] + zero, total, i % 2 == 1, ASM)
    if ASM:
        return (half_of(total, 0) + half_of(total, 1)) * 2.0**23
    else:
        return total * 2.0**23


@triton.jit
def read_vector(x, g, u, NU: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
                HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """x as it meets units u.

    Returns:
        Tuples of high and of low words [NU] for ``multiply``, of columns that follow one another, or pairs for
        ``multiply_halves`` and nothing; the step and the sum of x times g [NU]; the sum of the squares of x [NU].
    """
    here = u < UNITS
    COLUMNS: tl.constexpr = 128 // BITS
    eights = ()
    squares, total, largest = tl.zeros((NU,), tl.float32), tl.zeros((NU,), tl.float32), tl.zeros((NU,), tl.float32)
    for i in tl.static_range(COLUMNS // 8):
        v, more = read_eight(x, g, u * COLUMNS + 8 * i, here, HAS_NORM, WHOLE)
        eights = eights + (v,)
        squares += more
        total += tl.sum(v, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(v), axis=1))
    inverse, step = rounding(tl.where(total == total, largest, float("inf")))  # not by a maximum that drops NaN
    high, low = (), ()
    for i in tl.static_range(COLUMNS // 8):
        if FLOATING:
            high = high + halves(eights[i], inverse)
        else:
            a, b = planes(eights[i], inverse)
            high, low = high + a, low + b
    return high, low, step, total, squares


@triton.jit
def add_units(sums, piece, vector, BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPED: tl.constexpr,
              MINIMA: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Add to sums [BN,NU] a piece of a matrix times x."""
    words, scale, least = piece
    high, low, step, total, _ = vector
    words = split_four(words)
    if FLOATING:
        return sums + multiply_halves(words, high, ASM) * step[None, :]
    else:
        if BITS == 4:  # halves of a byte are 16 columns apart
            a, b, c, d = words
            words = (a & 0x0F0F0F0F, b & 0x0F0F0F0F, c & 0x0F0F0F0F, d & 0x0F0F0F0F, (a >> 4) & 0x0F0F0F0F,
                     (b >> 4) & 0x0F0F0F0F, (c >> 4) & 0x0F0F0F0F, (d >> 4) & 0x0F0F0F0F)  # fmt: skip
        y = multiply(words, high, low, BITS == 8, ASM).to(tl.float32) * step[None, :]
        if BITS == 4 and not MINIMA:
            y -= 8.0 * total[None, :]
        if GROUPED:
            y *= scale.to(tl.float32)
            if MINIMA:
                y += least.to(tl.float32) * total[None, :]
        return sums + y


@triton.jit
def read_block(w, s, m, block, N: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr, MINIMA: tl.constexpr,
               BN: tl.constexpr, NU: tl.constexpr):  # fmt: skip
    """The pieces of a block of rows, one after another, of each matrix; nothing is read of rows behind the last."""
    out = ()
    for piece in tl.static_range((UNITS + NU - 1) // NU):
        u = piece * NU + tl.arange(0, NU)
        for i in tl.static_range(len(w)):
            out = out + (read_units(w[i], s[i], m[i], block * BN, N, u, BN, UNITS, GROUPS, MINIMA),)
    return out


@triton.jit
def read_whole_vector(x, g, eps, K: tl.constexpr, UNITS: tl.constexpr, NU: tl.constexpr, BITS: tl.constexpr,
                      FLOATING: tl.constexpr, HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr):  # fmt: skip
    """``read_vector`` for every piece, and 1 / rms of x."""
    WHOLE: tl.constexpr = UNITS % NU == 0
    out = ()
    squares = tl.zeros((NU,), tl.float32)
    for piece in tl.static_range((UNITS + NU - 1) // NU):
        found = read_vector(x, g, piece * NU + tl.arange(0, NU), NU, UNITS, BITS, FLOATING, HAS_NORM,
                            WHOLE)  # fmt: skip
        squares += found[4]
        out = out + (found,)
    factor = 1.0
    if HAS_NORM:
        factor = norm_scale(squares, x, eps, K, EPS_INSIDE)
    return out, factor


@triton.jit
def products(pieces, vector, factor, s, rows, N: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr,
             NU: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, MINIMA: tl.constexpr,
             ASM: tl.constexpr):  # fmt: skip
    """A block of rows of ``w[i]·norm(x)`` for every matrix i: a tuple of float32 [BN]."""
    GROUPED: tl.constexpr = (GROUPS > 1) | MINIMA
    factors = ()
    for i in tl.static_range(len(s)):  # before the products, which take as long as the reads
        factors = factors + (factor if GROUPED else factor * tl.load(s[i] + rows, mask=rows < N, other=0.0),)
    out = ()
    for i in tl.static_range(len(s)):
        sums = tl.zeros((BN, NU), tl.float32)
        for piece in tl.static_range(len(vector)):
            sums = add_units(sums, pieces[piece * len(s) + i], vector[piece], BITS, FLOATING, GROUPED, MINIMA, ASM)
        out = out + (tl.sum(sums, axis=1) * factors[i],)
    return out


@triton.jit
def _linear_kernel(x, g, w, s, m, bias, residual, out, eps, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
                   NU: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPS: tl.constexpr,
                   MINIMA: tl.constexpr, HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, ASM: tl.constexpr,
                   HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, AHEAD: tl.constexpr, LEAD: tl.constexpr,
                   OVERLAP: tl.constexpr):  # fmt: skip
    UNITS: tl.constexpr = K * BITS // 128
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    r = tl.program_id(0)
    pieces = read_block((w,), (s,), (m,), tl.program_id(1), N, UNITS, GROUPS, MINIMA, BN, NU)
    if HAS_NORM and AHEAD > 0:
        prefetch(g, tl.full((), K * (g.dtype.element_ty.primitive_bitwidth // 8), tl.int32), tl.program_id(1) == 0)
    for i in tl.static_range(AHEAD):
        prefetch_block((w,), (s,), (m,), tl.program_id(1) + (i + 1) * tl.num_programs(1), N, UNITS, GROUPS, MINIMA, BN)
    gdc_wait(OVERLAP)
    vector, factor = read_whole_vector(x + r * K, g, eps, K, UNITS, NU, BITS, FLOATING, HAS_NORM, EPS_INSIDE)
    for block in range(tl.program_id(1), BLOCKS, tl.num_programs(1)):
        following = read_block((w,), (s,), (m,), block + tl.num_programs(1), N, UNITS, GROUPS, MINIMA, BN, NU)
        if AHEAD > 0:
            prefetch_block((w,), (s,), (m,), block + (AHEAD + 1) * tl.num_programs(1), N, UNITS, GROUPS, MINIMA, BN)
        if block + LEAD * tl.num_programs(1) >= BLOCKS:
            gdc_launch_dependents(OVERLAP)
        rows = block * BN + tl.arange(0, BN)
        more = tl.zeros((BN,), tl.float32)
        if HAS_BIAS:
            more += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            more += tl.load(residual + r * N + rows, mask=rows < N, other=0.0).to(tl.float32)
        y = more + products(pieces, vector, factor, (s,), rows, N, GROUPS, BN, NU, BITS, FLOATING, MINIMA, ASM)[0]
        tl.store(out + r * N + rows, y.to(out.dtype.element_ty), mask=rows < N)
        pieces = following


@triton.jit
def _gate_kernel(x, g, w, s, m, w2, s2, m2, out, eps, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
                 NU: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPS: tl.constexpr,
                 MINIMA: tl.constexpr, HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, ASM: tl.constexpr,
                 ACTIVATION: tl.constexpr, AHEAD: tl.constexpr, LEAD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    UNITS: tl.constexpr = K * BITS // 128
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    r = tl.program_id(0)
    pieces = read_block((w, w2), (s, s2), (m, m2), tl.program_id(1), N, UNITS, GROUPS, MINIMA, BN, NU)
    if HAS_NORM and AHEAD > 0:
        prefetch(g, tl.full((), K * (g.dtype.element_ty.primitive_bitwidth // 8), tl.int32), tl.program_id(1) == 0)
    for i in tl.static_range(AHEAD):
        prefetch_block(
            (w, w2), (s, s2), (m, m2), tl.program_id(1) + (i + 1) * tl.num_programs(1), N, UNITS, GROUPS, MINIMA, BN
        )
    gdc_wait(OVERLAP)
    vector, factor = read_whole_vector(x + r * K, g, eps, K, UNITS, NU, BITS, FLOATING, HAS_NORM, EPS_INSIDE)
    for block in range(tl.program_id(1), BLOCKS, tl.num_programs(1)):
        following = read_block((w, w2), (s, s2), (m, m2), block + tl.num_programs(1), N, UNITS, GROUPS, MINIMA, BN, NU)
        if AHEAD > 0:
            prefetch_block(
                (w, w2), (s, s2), (m, m2), block + (AHEAD + 1) * tl.num_programs(1), N, UNITS, GROUPS, MINIMA, BN
            )
        if block + LEAD * tl.num_programs(1) >= BLOCKS:
            gdc_launch_dependents(OVERLAP)
        rows = block * BN + tl.arange(0, BN)
        a, b = products(pieces, vector, factor, (s, s2), rows, N, GROUPS, BN, NU, BITS, FLOATING, MINIMA, ASM)
        tl.store(out + r * N + rows, (activate(a, ACTIVATION) * b).to(out.dtype.element_ty), mask=rows < N)
        pieces = following


def linear(
    x: Tensor,
    layer: Narrow,
    *,
    norm: RMSNormWeight | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """``residual + weight·norm(x) + bias``: x [R,D] -> [R,E]."""
    out = x.new_empty(len(x), layer.shape[0])
    tile, options = _options(1, norm, tile, overlap, layer)
    _linear_kernel[_grid(out, tile)](
        x, x if norm is None else norm.weight, *_matrix(layer), x if layer.bias is None else layer.bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps, **options,
        HAS_BIAS=layer.bias is not None, HAS_RESIDUAL=residual is not None,
        launch_pdl=overlap, num_warps=tile.warps,
    )  # fmt: skip
    return out


def gate(
    x: Tensor,
    gate: Narrow,
    up: Narrow,
    *,
    norm: RMSNormWeight | None = None,
    activation: str,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """``act(gate·norm(x)) · (up·norm(x))``: x [R,D] -> [R,E]; both matrices of one scheme and shape."""
    out = x.new_empty(len(x), gate.shape[0])
    tile, options = _options(2, norm, tile, overlap, gate, up)
    _gate_kernel[_grid(out, tile)](
        x, x if norm is None else norm.weight, *_matrix(gate), *_matrix(up), out, 0.0 if norm is None else norm.eps,
        **options, ACTIVATION=activation, launch_pdl=overlap, num_warps=tile.warps,
    )  # fmt: skip
    return out


def takes(layer: Narrow) -> bool:
    """Whether the rows of a matrix are whole units, each of one group."""
    inputs, columns = layer.shape[1], 8 * UNIT // layer.bits
    return inputs % columns == 0 and inputs // layer.scale.shape[1] % columns == 0


def alike(a: Narrow, b: Narrow) -> bool:
    """Whether two layers without biases have one scheme and one shape, so that one kernel reads both."""
    same = a.codes.dtype == b.codes.dtype and a.scale.dtype == b.scale.dtype and a.scale.shape == b.scale.shape
    plain = a.bias is None and b.bias is None
    return same and plain and a.shape == b.shape and (a.minimum is None) == (b.minimum is None)


def _matrix(layer: Narrow) -> tuple[Tensor, Tensor, Tensor]:
    """Words of four bytes, scales, and minima or something in their place."""
    return layer.codes.view(torch.int32), layer.scale, layer.scale if layer.minimum is None else layer.minimum


def _grid(out: Tensor, tile: Tile) -> tuple[int, int]:
    """Vectors, and the programs that share the rows of a matrix."""
    return out.shape[0], min(triton.cdiv(out.shape[1], tile.rows), tile.programs * processors(out.device))


@functools.cache
def processors(device: torch.device) -> int:
    """Of a device; one under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _options(
    matrices: int, norm: RMSNormWeight | None, tile: Tile | None, overlap: bool, *layers: Narrow
) -> tuple[Tile, dict[str, int | bool]]:
    layer, (outputs, inputs) = layers[0], layers[0].shape
    tile = tile or choose_tile(layer.bits, matrices, layer.codes.shape[1] // UNIT)
    tensors = [*layers[0][:3], *layers[-1][:3], None if norm is None else norm.weight]
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    return tile, {
        "N": outputs, "K": inputs, "BN": tile.rows, "NU": tile.units, "BITS": layer.bits, "FLOATING": layer.floating,
        "GROUPS": layer.scale.shape[1], "MINIMA": layer.minimum is not None, "HAS_NORM": norm is not None,
        "AHEAD": tile.ahead if overlap and aligned else 0, "LEAD": tile.lead, "OVERLAP": overlap,
        "EPS_INSIDE": norm is None or norm.eps_inside_root, "ASM": not triton.knobs.runtime.interpret,
    }  # fmt: skip
