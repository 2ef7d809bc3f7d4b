"""Products of narrow weights (``ops.Narrow``) with one to eight vectors: read narrow, widened in registers.

As in ``gemv``, a program owns a few rows of the matrix and sums in float32; an RMSNorm before it, the gate of an MLP,
bias and residual cost no pass of their own. The next piece of a row is loaded while the last one is multiplied, and the
first before the kernel waits for x. The reference is ``ops.narrow_linear``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.narrow import Narrow
from hyaena.ops.step import RMSNormWeight
from hyaena.ops.triton.common import activate
from hyaena.ops.triton.decode.gemv import norm_scale
from hyaena.ops.triton.decode.pdl import gdc_launch_dependents, gdc_wait

MOST_ROWS = 8
"""Vectors up to which a product is computed here."""


@triton.jit
def read_codes(w, at, j, inside, LINE: tl.constexpr):
    """A piece [BN,BW] of the program's rows."""
    mask = inside[:, None] & (j < LINE)[None, :]
    return tl.load(w + at + j[None, :], mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def narrow_products(x, g, w, s, m, eps, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
                    BW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr,
                    HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, WAITS: tl.constexpr):  # fmt: skip
    """The program's rows of ``w·norm(x)`` for R vectors: a tuple of float32 [BN].

    Args:
        x: [R,K].
        g: the norm's weight [K].
        w, s, m: codes, scales and minima of the matrix [N,K].
        BW: bytes of a row that are read at a time.
    """
    LINE: tl.constexpr = K * BITS // 8
    GROUPS: tl.constexpr = K // GROUP
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    at = rows.to(tl.int64)[:, None] * LINE
    scales = rows.to(tl.int64)[:, None] * GROUPS
    codes = read_codes(w, at, tl.arange(0, BW), inside, LINE)
    gdc_wait(WAITS)
    sums, squares = (), ()
    for _ in tl.static_range(R):
        sums = sums + (tl.zeros((BN, BW), tl.float32),)
        squares = squares + (tl.zeros((BW,), tl.float32),)
    for start in range(0, LINE, BW):
        j = start + tl.arange(0, BW)
        following = read_codes(w, at, j + BW, inside, LINE)
        k = j if BITS == 8 else j // 16 * 32 + j % 16
        here = j < LINE
        where = inside[:, None] & here[None, :]
        scale = tl.load(s + scales + (k // GROUP)[None, :], mask=where, other=0.0).to(tl.float32)
        low = tl.zeros((BN, BW), tl.float32)
        high = low
        if BITS == 8:
            low = codes.to(tl.float32) * scale
        else:
            low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
            if MINIMA:
                least = tl.load(m + scales + (k // GROUP)[None, :], mask=where, other=0.0).to(tl.float32)
                low, high = low * scale + least, high * scale + least
            else:
                low, high = (low - 8.0) * scale, (high - 8.0) * scale
        next_sums, next_squares = (), ()
        for r in tl.static_range(R):
            v = tl.load(x + r * K + k, mask=here, other=0.0).to(tl.float32)
            square = v * v
            if HAS_NORM:
                v *= tl.load(g + k, mask=here, other=0.0).to(tl.float32)
            total = sums[r] + low * v[None, :]
            if BITS == 4:
                u = tl.load(x + r * K + k + 16, mask=here, other=0.0).to(tl.float32)
                square += u * u
                if HAS_NORM:
                    u *= tl.load(g + k + 16, mask=here, other=0.0).to(tl.float32)
                total += high * u[None, :]
            next_sums = next_sums + (total,)
            next_squares = next_squares + (squares[r] + square,)
        sums, squares, codes = next_sums, next_squares, following
    out = ()
    for r in tl.static_range(R):
        y = tl.sum(sums[r], axis=1)
        if HAS_NORM:
            y *= norm_scale(squares[r], x + r * K, eps, K, EPS_INSIDE)
        out = out + (y,)
    return out


@triton.jit
def _linear_kernel(x, g, w, s, m, bias, residual, out, eps, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                   BN: tl.constexpr, BW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr,
                   HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
                   HAS_RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    y = narrow_products(x, g, w, s, m, eps, R, N, K, BN, BW, BITS, GROUP, MINIMA, HAS_NORM, EPS_INSIDE, OVERLAP)
    gdc_launch_dependents(OVERLAP)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    for r in tl.static_range(R):
        value = y[r]
        if HAS_BIAS:
            value += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + r * N + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + r * N + rows, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(x, g, w, s, m, w2, s2, m2, out, eps, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                 BN: tl.constexpr, BW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr,
                 HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, ACTIVATION: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    a = narrow_products(x, g, w, s, m, eps, R, N, K, BN, BW, BITS, GROUP, MINIMA, HAS_NORM, EPS_INSIDE, OVERLAP)
    b = narrow_products(x, g, w2, s2, m2, eps, R, N, K, BN, BW, BITS, GROUP, MINIMA, HAS_NORM, EPS_INSIDE, False)
    gdc_launch_dependents(OVERLAP)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    for r in tl.static_range(R):
        value = activate(a[r], ACTIVATION) * b[r]
        tl.store(out + r * N + rows, value.to(out.dtype.element_ty), mask=rows < N)


def linear(
    x: Tensor,
    layer: Narrow,
    *,
    norm: RMSNormWeight | None = None,
    residual: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """``residual + weight·norm(x) + bias``: x [R,D], R <= 8 -> [R,E]."""
    outputs = layer.shape[0]
    out = x.new_empty(len(x), outputs)
    options = _options(x, layer, norm)
    _linear_kernel[(triton.cdiv(outputs, options["BN"]),)](
        x, x if norm is None else norm.weight, *_matrix(layer), x if layer.bias is None else layer.bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps, **options,
        HAS_BIAS=layer.bias is not None, HAS_RESIDUAL=residual is not None, OVERLAP=overlap, launch_pdl=overlap,
        num_warps=4,
    )  # fmt: skip
    return out


def gate(
    x: Tensor,
    gate: Narrow,
    up: Narrow,
    *,
    norm: RMSNormWeight | None = None,
    activation: str,
    overlap: bool = False,
) -> Tensor:
    """``act(gate·norm(x)) · (up·norm(x))``: x [R,D], R <= 8 -> [R,E]; both matrices of one scheme and shape."""
    outputs = gate.shape[0]
    out = x.new_empty(len(x), outputs)
    options = _options(x, gate, norm)
    _gate_kernel[(triton.cdiv(outputs, options["BN"]),)](
        x, x if norm is None else norm.weight, *_matrix(gate), *_matrix(up), out, 0.0 if norm is None else norm.eps,
        **options, ACTIVATION=activation, OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
    )  # fmt: skip
    return out


def alike(a: Narrow, b: Narrow) -> bool:
    """Whether two layers without biases have one scheme and one shape, so that one kernel reads both."""
    same = a.codes.dtype == b.codes.dtype and a.scale.dtype == b.scale.dtype and a.scale.shape == b.scale.shape
    plain = a.bias is None and b.bias is None
    return same and plain and a.shape == b.shape and (a.minimum is None) == (b.minimum is None)


def _matrix(layer: Narrow) -> tuple[Tensor, Tensor, Tensor]:
    return layer.codes, layer.scale, layer.scale if layer.minimum is None else layer.minimum


def _options(x: Tensor, layer: Narrow, norm: RMSNormWeight | None) -> dict[str, int | bool]:
    """Sizes of the matrix, and a tile: some 4,096 bytes for one vector, fewer for several, whose sums are kept."""
    outputs, inputs = layer.shape
    width = min(1024, max(32, triton.next_power_of_2(layer.codes.shape[1])))
    rows = max(1, (4 if len(x) == 1 else 2 if len(x) <= 4 else 1) * 1024 // width)
    return {
        "R": len(x), "N": outputs, "K": inputs, "BN": min(rows, 16), "BW": width, "BITS": layer.bits,
        "GROUP": inputs // layer.scale.shape[1], "MINIMA": layer.minimum is not None, "HAS_NORM": norm is not None,
        "EPS_INSIDE": norm is None or norm.eps_inside_root,
    }  # fmt: skip
