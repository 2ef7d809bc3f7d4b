"""The step kernel: T = 1, from z [B,3D] to y [B,D]; both states move in place, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def filter_step(z, weight, bias, fir, fir_out, channel, row, inside,
                D: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """The short filter at one step, float32 [BD]; its window moves on by one."""
    W: tl.constexpr = K - 1
    now = tl.load(z + row * 3 * D + channel, mask=inside, other=0.0)
    out = tl.load(weight + channel * K + W, mask=inside, other=0.0).to(tl.float32) * now.to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    window = (row * 3 * D + channel) * W
    for k in tl.static_range(W):
        old = tl.load(fir + window + k, mask=inside, other=0.0)
        out += tl.load(weight + channel * K + k, mask=inside, other=0.0).to(tl.float32) * old.to(tl.float32)
        if k > 0:
            tl.store(fir_out + window + k - 1, old.to(fir_out.dtype.element_ty), mask=inside)
    if W > 0:
        tl.store(fir_out + window + W - 1, now.to(fir_out.dtype.element_ty), mask=inside)
    return out


@triton.jit
def hyena_step_kernel(z, weight, bias, poles, residues, skip, fir, iir, y, fir_out, iir_out,
                      D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
                      HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` at T = 1. The outputs may be the very states that are read. Grid: (channels / BD, rows)."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    x2 = filter_step(z, weight, bias, fir, fir_out, channel, row, inside, D, K, HAS_BIAS)
    x1 = filter_step(z, weight, bias, fir, fir_out, D + channel, row, inside, D, K, HAS_BIAS)
    x0 = filter_step(z, weight, bias, fir, fir_out, 2 * D + channel, row, inside, D, K, HAS_BIAS)
    w = x1 * x0
    out = tl.zeros((BD,), tl.float32)
    if HAS_SKIP:
        out = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32) * w
    for n in tl.static_range(N):
        at = (channel * N + n) * 2
        p_re = tl.load(poles + at, mask=inside, other=0.0)
        p_im = tl.load(poles + at + 1, mask=inside, other=0.0)
        s_re = tl.load(iir + row * D * N * 2 + at, mask=inside, other=0.0)
        s_im = tl.load(iir + row * D * N * 2 + at + 1, mask=inside, other=0.0)
        new_re = p_re * s_re - p_im * s_im + w
        new_im = p_re * s_im + p_im * s_re
        tl.store(iir_out + row * D * N * 2 + at, new_re, mask=inside)
        tl.store(iir_out + row * D * N * 2 + at + 1, new_im, mask=inside)
        out += tl.load(residues + at, mask=inside, other=0.0) * new_re
        out -= tl.load(residues + at + 1, mask=inside, other=0.0) * new_im
    tl.store(y + row * D + channel, (out * x2).to(y.dtype.element_ty), mask=inside)
