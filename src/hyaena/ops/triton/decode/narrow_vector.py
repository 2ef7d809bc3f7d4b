"""Products of a narrow weight matrix (``ops.Narrow``) and one vector of 16 bits, on the matrix units.

Memory streams 4-bit weights faster than other units can make numbers of them and multiply: there is time for some four
operations a weight. Here two weights take a shift and one logical operation, which put bits behind the leading one of
two numbers of 16 bits, and matrix units multiply. A row is cut into *units* of 16 bytes, which belong to one group. The vector becomes a matrix with 8 columns, one for each of 8 neighbouring units and zero outside of it, so that
the sum of every unit comes out by itself and is scaled in float32:

    v[d] = 1 + q[d]/16      y = Σ_u scale·16·(Σ_(d in u) v[d]·x[d] - offset_u) + minimum·Σ_(d in u) x[d]

Numbers of 8 bits are two of 4 bits, of which the upper ones meet a vector that is 16 times larger; e4m3 numbers become
wider ones by a shift. SLICES runs of 8 units are multiplied side by side, by warps of their own.

A norm's weight is multiplied into x, which is rounded to its dtype again, and the sums are divided by its rms.

For several vectors see ``few_rows``. The references are ``DecodeOperators.linear`` and ``.gate``.
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

UNIT = 16
"""Bytes of a unit."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of vectors."""


@dataclass(frozen=True)
class Tile:
    """What a program reads: ``rows`` of each matrix, ``slices`` of 8 units of each of them at a time.

    Attributes:
        rows: a power of two, at least 16.
        slices: a power of two.
        stages: pieces in flight, the one that is multiplied among them.
    """

    rows: int = 32
    slices: int = 8
    warps: int = 8
    stages: int = 2


def choose_tile(matrices: int, rows: int, units: int) -> Tile:
    """For some matrices of so many rows and units in a row."""
    if units < 64:
        return Tile(rows=16, slices=triton.next_power_of_2(triton.cdiv(units, 8)), warps=1)
    return Tile()


def instructions(bits: int, floating: bool, half: bool) -> tuple[str, ...]:
    """For each number of pairs of bytes, what makes an operand of two weights in a register; see ``operand``."""
    if floating:
        move, mask = (1, 0x3F803F80) if half else (4, 0x07F007F0)
        widest = (
            "{.reg .b32 p, z; mov.b32 p, 0x7B807B80; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, t, p, z;}"  # by 2^120
        )
        end = "mov.b32 $0, t;" if half else widest
        return tuple(
            f"{{.reg .b32 t, s; {first} and.b32 s, t, 0x80008000; shr.u32 t, t, {move}; and.b32 t, t, {mask}; "
            f"or.b32 t, t, s; {end}}}"
            for first in ("shl.b32 t, $1, 8;", "mov.b32 t, $1;")
        )
    place, one = (6, 0x3C00) if half else (3, 0x3F80)
    out = []
    for i in range(4):
        shift, sign = place - 4 * i, 8 << place if bits == 8 and i % 2 else 0
        move = f"shl.b32 t, $1, {shift};" if shift >= 0 else f"shr.u32 t, $1, {-shift};"
        mask, lead = ((15 << place) * 0x10001, (one + sign) * 0x10001)
        out.append(f"{{.reg .b32 t; {move} lop3.b32 $0, t, {mask}, {lead}, 0x6A;}}")  # (t & mask) ^ lead
    return tuple(out)


@triton.jit
def operand(c, i: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """The numbers i of pairs of bytes c, int16, for the matrix units: bfloat16, or float16 with HALF.

    With instructions (ASM) two of them are made at once; the interpreter has none.
    """
    if len(ASM) > 0:
        return tl.inline_asm_elementwise(
            ASM[i], "=r,r", [c], dtype=tl.float16 if HALF else tl.bfloat16, is_pure=True, pack=2
        )
    elif FLOATING:
        t = c << 8 if i == 0 else c
        if HALF:
            return ((t & -0x8000) | ((t >> 1) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            return ((t & -0x8000) | ((t >> 4) & 0x07F0)).to(tl.int16).to(tl.bfloat16, bitcast=True).to(
                tl.float32
            ) * 2.0**120
    else:
        PLACE: tl.constexpr = 6 if HALF else 3
        SHIFT: tl.constexpr = PLACE - 4 * i
        SIGN: tl.constexpr = 8 << PLACE if BITS == 8 and i % 2 == 1 else 0
        t = c << SHIFT if SHIFT >= 0 else c >> -SHIFT
        t = ((t & (15 << PLACE)) ^ ((0x3C00 if HALF else 0x3F80) + SIGN)).to(tl.int16)
        return t.to(tl.float16, bitcast=True) if HALF else t.to(tl.bfloat16, bitcast=True)


@triton.jit
def column(u, byte, i: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr):
    """The column of the number i of the pair of bytes ``byte`` and ``byte + 1`` of unit u."""
    if FLOATING:
        return u * 16 + byte + i
    elif BITS == 8:
        return u * 16 + byte + i // 2
    else:
        return u * 32 + byte + i // 2 + 16 * (i % 2)


@triton.jit
def read_vector(x, g, k, inside, HAS_NORM: tl.constexpr, WHOLE: tl.constexpr):
    """x times the norm's weight in places k, in the dtype of x; and x as it is."""
    v = tl.load(x + k, mask=None if WHOLE else inside, other=None if WHOLE else 0.0)
    if HAS_NORM:
        weight = tl.load(g + k, mask=None if WHOLE else inside, other=None if WHOLE else 0.0)
        return (v.to(tl.float32) * weight.to(tl.float32)).to(x.dtype.element_ty), v
    return v, v


@triton.jit
def vector_products(x, g, w, s, m, eps, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr,
                    STAGES: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr, GROUPS: tl.constexpr,
                    MINIMA: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr, HAS_NORM: tl.constexpr,
                    EPS_INSIDE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The program's rows of ``w[i]·norm(x)`` for every matrix i: a tuple of float32 [BN].

    Args:
        x: [K].
        g: the norm's weight [K].
        w, s, m: tuples of the pairs of bytes, scales and minima of matrices [N,K].
    """
    UNITS: tl.constexpr = K * BITS // 128
    COLUMNS: tl.constexpr = 128 // BITS
    WHOLE: tl.constexpr = (N % BN == 0) & (UNITS % (8 * SLICES) == 0)
    GROUPED: tl.constexpr = (GROUPS > 1) | MINIMA
    COUNT: tl.constexpr = 2 if FLOATING else 4
    # what (v - 1) has to be multiplied with, and what the ones, and an excess of 8 or 128, add for a sum of x of 1
    FACTOR: tl.constexpr = (256.0 if HALF else 1.0) if FLOATING else 16.0
    OFFSET: tl.constexpr = 0.0 if FLOATING else 25.0 if BITS == 8 else 1.0 if MINIMA else 1.5
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = n.to(tl.int64)[None, :, None]
    inside = (n < N)[None, :, None]
    gdc_wait(OVERLAP)  # before the loop, whose first loads of x are launched with those of weights
    t = tl.arange(0, SLICES)[:, None]
    h = tl.arange(0, 64)[None, :]
    c = tl.arange(0, 8)
    diagonal = (h // 8)[:, :, None] == c[None, None, :]
    sums = ()
    for _ in tl.static_range(len(w)):
        sums = sums + (tl.zeros((SLICES, BN, 8), tl.float32),)
    squares = tl.zeros((SLICES, 8, COLUMNS), tl.float32)
    for start in tl.range(0, UNITS, 8 * SLICES, num_stages=STAGES):
        unit = start + t * 8 + c[None, :]
        here = (unit < UNITS)[:, None, :]
        pairs, scales, minima = (), (), ()
        for i in tl.static_range(len(w)):
            at = row * (UNITS * 8) + ((start + t * 8) * 8 + h)[:, None, :]
            mask = inside & (start + t * 8 + h // 8 < UNITS)[:, None, :]
            pairs = pairs + (tl.load(w[i] + at, mask=None if WHOLE else mask, other=None if WHOLE else 0,
                                     eviction_policy="evict_first"),)  # fmt: skip
            if GROUPED:
                place = row * GROUPS + (unit // (UNITS // GROUPS))[:, None, :]
                scales = scales + (tl.load(s[i] + place, mask=None if WHOLE else inside & here,
                                           other=None if WHOLE else 0.0),)  # fmt: skip
                if MINIMA:
                    minima = minima + (tl.load(m[i] + place, mask=None if WHOLE else inside & here,
                                               other=None if WHOLE else 0.0),)  # fmt: skip
        k = unit[:, :, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
        v, raw = read_vector(x, g, k, (unit < UNITS)[:, :, None], HAS_NORM, WHOLE)
        total = tl.sum(v.to(tl.float32), axis=2)[:, None, :]
        if HAS_NORM:
            squares += raw.to(tl.float32) * raw.to(tl.float32)
        found = ()
        for _ in tl.static_range(len(w)):
            found = found + (tl.zeros((SLICES, BN, 8), tl.float32),)
        for j in tl.static_range(COUNT):
            u = start + t * 8 + h // 8
            k = column(u, h % 8 * 2, j, BITS, FLOATING)[:, :, None] + 0 * c[None, None, :]
            b, raw = read_vector(x, g, k, diagonal & (u < UNITS)[:, :, None], HAS_NORM, False)
            if BITS == 8 and not FLOATING and j % 2 == 1:
                b = (b.to(tl.float32) * 16.0).to(b.dtype)
            more = ()
            for i in tl.static_range(len(w)):
                a = operand(pairs[i], j, BITS, FLOATING, HALF, ASM)
                if len(ASM) == 0:  # the interpreter multiplies no bfloat16
                    more = more + (tl.dot(a.to(tl.float32), b.to(tl.float32), found[i]),)
                else:
                    more = more + (tl.dot(a, b, found[i]),)
            found = more
        next_sums = ()
        for i in tl.static_range(len(w)):
            y = (found[i] - OFFSET * total) * FACTOR
            if GROUPED:
                y *= scales[i].to(tl.float32)
                if MINIMA:
                    y += minima[i].to(tl.float32) * total
            next_sums = next_sums + (sums[i] + y,)
        sums = next_sums
    gdc_launch_dependents(OVERLAP)
    out = ()
    for i in tl.static_range(len(w)):
        y = tl.sum(tl.sum(sums[i], axis=2), axis=0)
        if not GROUPED:
            y *= tl.load(s[i] + n, mask=n < N, other=0.0)
        out = out + (y,)
    if HAS_NORM:
        out = scaled(out, norm_scale(tl.reshape(squares, (SLICES * 8 * COLUMNS,)), x, eps, K, EPS_INSIDE))
    return out


@triton.jit
def _linear_kernel(x, g, w, s, m, bias, residual, out, eps, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
                   SLICES: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
                   GROUPS: tl.constexpr, MINIMA: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr,
                   HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
                   HAS_RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    y = vector_products(x, g, (w,), (s,), (m,), eps, N, K, BN, SLICES, STAGES, BITS, FLOATING, GROUPS, MINIMA, HALF,
                        ASM, HAS_NORM, EPS_INSIDE, OVERLAP)[0]  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _gate_kernel(x, g, w, s, m, w2, s2, m2, out, eps, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
                 SLICES: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
                 GROUPS: tl.constexpr, MINIMA: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr,
                 HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, ACTIVATION: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    a, b = vector_products(x, g, (w, w2), (s, s2), (m, m2), eps, N, K, BN, SLICES, STAGES, BITS, FLOATING, GROUPS,
                           MINIMA, HALF, ASM, HAS_NORM, EPS_INSIDE, OVERLAP)  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(out + n, (activate(a, ACTIVATION) * b).to(out.dtype.element_ty), mask=n < N)


def linear(
    x: Tensor,
    layer: Narrow,
    *,
    norm: RMSNormWeight | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """``residual + weight·norm(x) + bias``: x [1,D] -> [1,E]."""
    out = x.new_empty(1, layer.shape[0])
    tile, options = _options(x, layer, 1, norm, tile)
    _linear_kernel[(triton.cdiv(out.shape[1], tile.rows),)](
        x, x if norm is None else norm.weight, *_matrix(layer), x if layer.bias is None else layer.bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps, **options,
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
    """``act(gate·norm(x)) · (up·norm(x))``: x [1,D] -> [1,E]; both matrices of one scheme and shape."""
    out = x.new_empty(1, gate.shape[0])
    tile, options = _options(x, gate, 2, norm, tile)
    _gate_kernel[(triton.cdiv(out.shape[1], tile.rows),)](
        x, x if norm is None else norm.weight, *_matrix(gate), *_matrix(up), out, 0.0 if norm is None else norm.eps,
        **options, ACTIVATION=activation, OVERLAP=overlap, launch_pdl=overlap, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _matrix(layer: Narrow) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of bytes, scales, and minima or something in their place."""
    return layer.codes.view(torch.int16), layer.scale, layer.scale if layer.minimum is None else layer.minimum


def _options(
    x: Tensor, layer: Narrow, matrices: int, norm: RMSNormWeight | None, tile: Tile | None
) -> tuple[Tile, dict[str, object]]:
    (outputs, inputs), half = layer.shape, x.dtype == torch.float16
    tile = tile or choose_tile(matrices, outputs, layer.codes.shape[1] // UNIT)
    interpreted = triton.knobs.runtime.interpret
    return tile, {
        "N": outputs, "K": inputs, "BN": tile.rows, "SLICES": tile.slices, "STAGES": tile.stages, "BITS": layer.bits,
        "FLOATING": layer.floating, "GROUPS": layer.scale.shape[1], "MINIMA": layer.minimum is not None, "HALF": half,
        "ASM": () if interpreted else instructions(layer.bits, layer.floating, half), "HAS_NORM": norm is not None,
        "EPS_INSIDE": norm is None or norm.eps_inside_root,
    }  # fmt: skip
