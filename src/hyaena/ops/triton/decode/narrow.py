"""Products of a narrow weight matrix (``ops.Narrow``) and one vector: read narrow, widened in registers.

As in ``gemv``, a program owns a few rows of the matrix, loads the first pieces of them before it waits for x, and sums
in float32; an RMSNorm before it, a second matrix, bias and residual cost no pass of their own.

What bounds it beside memory is the number of operations for a weight. A thread takes *units* of 16 bytes, the 32 columns
of 4 bits or 16 of 8 that lie there. Bits become a number by a shift and one logical operation, which put them behind the
leading one of a float32: v = 1.5 + q/256 in 8 bits; in 4 bits 1 + q/16 and 1 + q/256, of two numbers by one shift (an
e4m3 number becomes a float16 256 times smaller). With x[d] 16 times larger where v is 1 + q/256, and a sum of x that
says what the ones add,

    Σ_d (scale·q[d] + minimum)·x[d]  =  scale·C·(Σ_d v[d]·x[d] - offset) + minimum·Σ_d x[d]

so that scale and minimum are applied once for a unit, and sums of x are formed once for all rows of a program. Several vectors are
further programs, which find the weights in the cache of the device; ``few_rows`` multiplies vectors of 16 bits together.
The reference is ``ops.narrow_linear``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.narrow import Narrow
from hyaena.ops.step import RMSNormWeight
from hyaena.ops.triton.common import activate
from hyaena.ops.triton.decode.gemv import norm_scale, scaled
from hyaena.ops.triton.decode.pdl import gdc_launch_dependents, gdc_wait

MOST_ROWS = 8
"""Vectors up to which products are computed here."""

UNIT = 8
"""Bytes of a unit: with vectors of 16 bits, the numbers of x that meet them are a load of 16 bytes of the same thread."""

LEADING = {8: 0x3FC00000, 4: 0x3F800000}
"""By bits: a float32 in which the bits of q are put. An argument of kernels and not a constant in them: from two
constants ptxas makes two logical operations."""


@dataclass(frozen=True)
class Tile:
    """What a program reads: ``rows`` of each matrix, ``units`` of each of them at a time, both powers of two.

    Attributes:
        ahead: pieces of so many units that are loaded into registers before anything else.
    """

    rows: int
    units: int
    warps: int
    ahead: int


def choose_tile(matrices: int, rows: int, units: int) -> Tile:
    """For some matrices of so many rows and units in a row: eight units of 16 bytes for a thread, before it waits."""
    if units < 128:
        return Tile(rows=4, units=triton.next_power_of_2(units), warps=4, ahead=1)
    return Tile(rows=8 // matrices, units=128, warps=4, ahead=2)


@triton.jit
def read_units(w, s, m, rows, inside, u, UNITS: tl.constexpr, GROUPS: tl.constexpr, GROUPED: tl.constexpr,
               MINIMA: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Words [BN,NU,2] of the program's rows, and with GROUPED the scales and the minima of their groups [BN,NU]."""
    at = rows.to(tl.int64)[:, None, None] * (UNITS * 2) + (u * 2)[None, :, None] + tl.arange(0, 2)[None, None, :]
    here = inside[:, None] & (u < UNITS)[None, :]
    if WHOLE:
        words = tl.load(w + at, eviction_policy="evict_first")
    else:
        words = tl.load(w + at, mask=here[:, :, None], other=0, eviction_policy="evict_first")
    scale, least = 1.0, 0.0
    if GROUPED:
        place = rows.to(tl.int64)[:, None] * GROUPS + (u * GROUPS // UNITS)[None, :]
        scale = tl.load(s + place, mask=None if WHOLE else here)
        if MINIMA:
            least = tl.load(m + place, mask=None if WHOLE else here)
    return words, scale, least


@triton.jit
def number(words, i: tl.constexpr, leading, BITS: tl.constexpr, FLOATING: tl.constexpr):
    """v of the numbers i of words, float32."""
    if FLOATING:
        odd = words << 8 if i % 2 == 0 else words
        pair = (odd & -0x7FFF8000) | ((odd >> 1) & 0x3F803F80)
        return (pair >> 16 * (i // 2)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        SHIFT: tl.constexpr = 15 - 8 * i if BITS == 8 else 15 - 8 * (i // 2)
        moved = words << SHIFT if SHIFT >= 0 else words >> -SHIFT
        if BITS == 8:
            bits = (moved & 0x007F8000) ^ leading
        else:
            bits = (moved & (0x00078000 if i % 2 == 0 else 0x00780000)) | leading
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def read_eight(x, g, k, inside, HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):
    """Eight numbers for each unit, float32 [NU,8]: x times the norm's weight, and the squares of x."""
    k = k[:, None] + tl.arange(0, 8)[None, :]
    v = tl.load(x + k, mask=None if WHOLE else inside[:, None], other=None if WHOLE else 0.0).to(tl.float32)
    squares = v * v
    if HAS_NORM:
        v *= tl.load(g + k, mask=None if WHOLE else inside[:, None], other=None if WHOLE else 0.0).to(tl.float32)
    return v, squares


@triton.jit
def bytes_of(v):
    """[NU,8] -> for each byte of a word [NU,2]."""
    even, odd = tl.split(tl.reshape(v, (v.shape[0], 2, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def read_vector(x, g, u, NU: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, MINIMA: tl.constexpr,
                HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """x times the norm's weight, as it meets the numbers of words.

    Returns:
        A tuple of float32 [NU,2] for each number of a word; the squares of x [NU,8]; the sums of x times g, and
        those of what the ones and halves in v add [NU].
    """
    if BITS == 8:
        v, squares = read_eight(x, g, u * 8, u < UNITS, HAS_NORM, WHOLE)
        total = tl.sum(v, axis=1)
        return bytes_of(v), squares, total, 1.5 * total
    else:  # halves of a byte are 16 columns apart
        low, squares = read_eight(x, g, u // 2 * 32 + u % 2 * 8, u < UNITS, HAS_NORM, WHOLE)
        high, more = read_eight(x, g, u // 2 * 32 + u % 2 * 8 + 16, u < UNITS, HAS_NORM, WHOLE)
        lows, highs = tl.sum(low, axis=1), tl.sum(high, axis=1)
        l0, l1, l2, l3 = bytes_of(low * 16.0)
        h0, h1, h2, h3 = bytes_of(high)
        offset = 16.0 * lows + highs + (0.0 if MINIMA else 0.5) * (lows + highs)
        return (l0, h0, l1, h1, l2, h2, l3, h3), squares + more, lows + highs, offset


@triton.jit
def add_units(sums, squares, offsets, pieces, leading, x, g, u, NU: tl.constexpr, UNITS: tl.constexpr,
              BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPED: tl.constexpr, MINIMA: tl.constexpr,
              HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Add to each sum [BN,NU,2] its piece times x, to the squares those of x, and to the offsets what is not scaled."""
    v, square, total, offset = read_vector(x, g, u, NU, UNITS, BITS, MINIMA, HAS_NORM, WHOLE)
    out = ()
    for i in tl.static_range(len(sums)):
        words, scale, least = pieces[i]
        products = sums[i]
        if GROUPED:
            products = tl.zeros(words.shape, tl.float32)
            if not FLOATING:
                products -= (0.5 * offset)[None, :, None]
        for j in tl.static_range(len(v)):
            products += number(words, j, leading, BITS, FLOATING) * v[j][None, :, :]
        if GROUPED:
            scale = scale.to(tl.float32) * (256.0 if BITS == 8 else 16.0)
            products = sums[i] + tl.sum(products, axis=2) * scale
            if MINIMA:
                products += least.to(tl.float32) * total[None, :]
        out = out + (products,)
    if not GROUPED:
        offsets += offset
    if HAS_NORM:
        squares += square
    return out, squares, offsets


@triton.jit
def narrow_products(x, g, w, s, m, eps, leading, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, NU: tl.constexpr,
                    AHEAD: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPS: tl.constexpr,
                    MINIMA: tl.constexpr, HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr,
                    OVERLAP: tl.constexpr):  # fmt: skip
    """The program's rows of ``w[i]·norm(x)`` for every matrix i: a tuple of float32 [BN].

    Args:
        x: [K].
        g: the norm's weight [K].
        w, s, m: tuples of words, scales and minima of matrices [N,K].
    """
    UNITS: tl.constexpr = K * BITS // 64
    WHOLE: tl.constexpr = (N % BN == 0) & (UNITS % NU == 0)
    GROUPED: tl.constexpr = (GROUPS > 1) | MINIMA
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = rows < N
    pieces = ()
    for piece in tl.static_range(AHEAD):
        u = piece * NU + tl.arange(0, NU)
        for i in tl.static_range(len(w)):
            pieces = pieces + (read_units(w[i], s[i], m[i], rows, inside, u, UNITS, GROUPS, GROUPED, MINIMA, WHOLE),)
    gdc_wait(OVERLAP)
    sums = ()
    for _ in tl.static_range(len(w)):
        sums = sums + (tl.zeros((BN, NU), tl.float32) if GROUPED else tl.zeros((BN, NU, 2), tl.float32),)
    squares = tl.zeros((NU, 8), tl.float32)
    offsets = tl.zeros((NU,), tl.float32)
    for piece in tl.static_range(AHEAD):
        u = piece * NU + tl.arange(0, NU)
        here = pieces[piece * len(w) : (piece + 1) * len(w)]
        sums, squares, offsets = add_units(sums, squares, offsets, here, leading, x, g, u, NU, UNITS, BITS, FLOATING,
                                           GROUPED, MINIMA, HAS_NORM, WHOLE)  # fmt: skip
    for start in range(AHEAD * NU, UNITS, NU):
        u = start + tl.arange(0, NU)
        here = ()
        for i in tl.static_range(len(w)):
            here = here + (read_units(w[i], s[i], m[i], rows, inside, u, UNITS, GROUPS, GROUPED, MINIMA, WHOLE),)
        sums, squares, offsets = add_units(sums, squares, offsets, here, leading, x, g, u, NU, UNITS, BITS, FLOATING,
                                           GROUPED, MINIMA, HAS_NORM, WHOLE)  # fmt: skip
    gdc_launch_dependents(OVERLAP)
    out = ()
    for i in tl.static_range(len(w)):
        if GROUPED:
            y = tl.sum(sums[i], axis=1)
        else:
            y = tl.sum(sums[i], axis=2)
            if not FLOATING:
                y -= offsets[None, :]
            y = tl.sum(y, axis=1) * tl.load(s[i] + rows, mask=inside, other=0.0) * 256.0
        out = out + (y,)
    if HAS_NORM:
        out = scaled(out, norm_scale(tl.reshape(squares, (NU * 8,)), x, eps, K, EPS_INSIDE))
    return out


@triton.jit
def _linear_kernel(x, g, w, s, m, bias, residual, out, eps, leading, N: tl.constexpr, K: tl.constexpr,
                   BN: tl.constexpr, NU: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr,
                   FLOATING: tl.constexpr, GROUPS: tl.constexpr, MINIMA: tl.constexpr, HAS_NORM: tl.constexpr,
                   EPS_INSIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                   OVERLAP: tl.constexpr):  # fmt: skip
    r = tl.program_id(0)
    y = narrow_products(x + r * K, g, (w,), (s,), (m,), eps, leading, N, K, BN, NU, AHEAD, BITS, FLOATING, GROUPS,
                        MINIMA, HAS_NORM, EPS_INSIDE, OVERLAP)[0]  # fmt: skip
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = rows < N
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + r * N + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + r * N + rows, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(x, g, w, s, m, w2, s2, m2, out, eps, leading, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
                 NU: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
                 GROUPS: tl.constexpr, MINIMA: tl.constexpr, HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr,
                 ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    r = tl.program_id(0)
    a, b = narrow_products(x + r * K, g, (w, w2), (s, s2), (m, m2), eps, leading, N, K, BN, NU, AHEAD, BITS, FLOATING,
                           GROUPS, MINIMA, HAS_NORM, EPS_INSIDE, OVERLAP)  # fmt: skip
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tl.store(out + r * N + rows, (activate(a, ACTIVATION) * b).to(out.dtype.element_ty), mask=rows < N)


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
    tile, options = _options(layer, 1, norm, tile)
    _linear_kernel[(len(x), triton.cdiv(out.shape[1], tile.rows))](
        x, x if norm is None else norm.weight, *_matrix(layer), x if layer.bias is None else layer.bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps, LEADING[layer.bits], **options,
        HAS_BIAS=layer.bias is not None, HAS_RESIDUAL=residual is not None, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=tile.warps,
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
    tile, options = _options(gate, 2, norm, tile)
    _gate_kernel[(len(x), triton.cdiv(out.shape[1], tile.rows))](
        x, x if norm is None else norm.weight, *_matrix(gate), *_matrix(up), out, 0.0 if norm is None else norm.eps,
        LEADING[gate.bits], **options, ACTIVATION=activation, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=tile.warps,
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


def _options(
    layer: Narrow, matrices: int, norm: RMSNormWeight | None, tile: Tile | None
) -> tuple[Tile, dict[str, int | bool]]:
    outputs, inputs = layer.shape
    units = layer.codes.shape[1] // UNIT
    tile = tile or choose_tile(matrices, outputs, units)
    return tile, {
        "N": outputs, "K": inputs, "BN": tile.rows, "NU": tile.units,
        "AHEAD": min(tile.ahead, triton.cdiv(units, tile.units)), "BITS": layer.bits, "FLOATING": layer.floating,
        "GROUPS": layer.scale.shape[1], "MINIMA": layer.minimum is not None, "HAS_NORM": norm is not None,
        "EPS_INSIDE": norm is None or norm.eps_inside_root,
    }  # fmt: skip
