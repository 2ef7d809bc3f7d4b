"""Gradients of all parameters of the kernels of ``segments``, from sums over segments and rows.

With P, X, Y and Z as ``segments_gate`` and ``segments_inputs`` make them, and c[t] = Σ_i P[i+t,i]::

    conj dr = Σ_t p^t c[t] + Σ_i p^(i+1) Y[i]
    conj dp = r (Σ_t t p^(t-1) c[t] + Σ_i (i+1) p^i Y[i] + Σ_i (15-i) p^(14-i) X[i] + 16 p^15 Z)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import power
from hyaena.ops.triton.decode.pdl import gdc_wait


@triton.jit
def sum_filters(of_filters, dweight, dbias, channel, ROWS, D: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sum the gradients of a channel's three short filters over rows, to [3D,K] and [3D]."""
    line = tl.arange(0, 32)
    j = line % 8
    block = line // 8
    place = channel + block * D
    inside = (block < 3) & (j < (K + 1 if HAS_BIAS else K))
    total = tl.zeros((32,), tl.float32)
    for row in range(ROWS):
        at = of_filters + (tl.cast(row, tl.int64) * (K + 1) + j) * (3 * D) + place
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(dweight + place * K + j, total, mask=inside & (j < K))
    if HAS_BIAS:
        tl.store(dbias + place, total, mask=inside & (j == K))


@triton.jit
def segments_gradients_kernel(poles, residues, outers, of_w, of_g, of_states, of_filters, dpoles, dresidues, dskip,
                              dweight, dbias, ROWS, REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
                              NP: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
                              OVERLAP: tl.constexpr):  # fmt: skip
    """The gradients of a channel's poles (of real modes: of their logarithms), residues, skip and short filters.

    Grid: (D,). K is at most 7. The parameters, which no kernel before writes, are read before the wait.
    """
    channel = tl.program_id(0)
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    mode = tl.arange(0, NP)[None, :]
    inside = mode < N
    at = (channel * N + mode) * 2
    p_re = tl.load(poles + at, mask=inside, other=0.0).to(tl.float64)
    p_im = tl.load(poles + at + 1, mask=inside, other=0.0).to(tl.float64)
    r_re = tl.load(residues + at, mask=inside, other=0.0)
    r_im = tl.load(residues + at + 1, mask=inside, other=0.0)
    gdc_wait(OVERLAP)
    sum_filters(of_filters, dweight, dbias, channel, ROWS, D, K, HAS_BIAS)
    if REAL:
        p_re = tl.exp(p_re)
        p_im = tl.exp(p_im)
    none = tl.zeros((16, NP), tl.float64)
    wide_re, wide_im = power(p_re + none, p_im + none, i, 4, REAL)  # p^i
    if REAL:
        next_re, next_im = wide_re * p_re, wide_im * p_im
    else:
        next_re = wide_re * p_re - wide_im * p_im
        next_im = wide_re * p_im + wide_im * p_re
    re = wide_re.to(tl.float32)
    im = wide_im.to(tl.float32)
    up_re = next_re.to(tl.float32)  # p^(i+1)
    up_im = next_im.to(tl.float32)
    outer = tl.zeros((16, 16), tl.float32)
    x_re = tl.zeros((16, NP), tl.float32)  # X of 15-i
    x_im = tl.zeros((16, NP), tl.float32)
    y_re = tl.zeros((16, NP), tl.float32)
    y_im = tl.zeros((16, NP), tl.float32)
    z_re = tl.zeros((1, NP), tl.float32)
    z_im = tl.zeros((1, NP), tl.float32)
    for row in range(ROWS):
        owner = tl.cast(row, tl.int64) * D + channel
        outer += tl.load(outers + (owner * 16 + i) * 16 + j)
        place = ((owner * 16 + i) * N + mode) * 2
        y_re += tl.load(of_g + place, mask=inside, other=0.0)
        y_im += tl.load(of_g + place + 1, mask=inside, other=0.0)
        place = ((owner * 16 + 15 - i) * N + mode) * 2
        x_re += tl.load(of_w + place, mask=inside, other=0.0)
        x_im += tl.load(of_w + place + 1, mask=inside, other=0.0)
        place = (owner * N + mode) * 2
        z_re += tl.load(of_states + place, mask=inside, other=0.0)
        z_im += tl.load(of_states + place + 1, mask=inside, other=0.0)
    tl.store(dskip + channel, tl.sum(tl.where(i == j, outer, 0.0)))
    weight = i.to(tl.float32)
    first_re = tl.zeros((1, NP), tl.float32)  # of dr
    first_im = tl.zeros((1, NP), tl.float32)
    then_re = tl.zeros((1, NP), tl.float32)  # of dp
    then_im = tl.zeros((1, NP), tl.float32)
    for t in tl.static_range(16):
        c = tl.sum(tl.where(i - j == t, outer, 0.0))
        here = i == t
        at_re = tl.sum(tl.where(here, re, 0.0), axis=0)[None, :]
        at_im = tl.sum(tl.where(here, im, 0.0), axis=0)[None, :]
        first_re += c * at_re
        first_im += c * at_im
        here = i == t - 1
        at_re = tl.sum(tl.where(here, re, 0.0), axis=0)[None, :]
        at_im = tl.sum(tl.where(here, im, 0.0), axis=0)[None, :]
        then_re += t * c * at_re
        then_im += t * c * at_im
    wide_re, wide_im = power(p_re + none, p_im + none, tl.maximum(i - 1, 0), 4, REAL)
    down_re = weight * wide_re.to(tl.float32)  # i p^(i-1)
    down_im = weight * wide_im.to(tl.float32)
    last = i == 15
    z_weight_re = 16.0 * tl.sum(tl.where(last, re, 0.0), axis=0)[None, :]
    z_weight_im = 16.0 * tl.sum(tl.where(last, im, 0.0), axis=0)[None, :]
    if REAL:
        first_re += tl.sum(up_re * y_re, axis=0)[None, :]
        first_im += tl.sum(up_im * y_im, axis=0)[None, :]
        then_re += tl.sum((weight + 1) * re * y_re, axis=0)[None, :]
        then_im += tl.sum((weight + 1) * im * y_im, axis=0)[None, :]
        then_re += tl.sum(down_re * x_re, axis=0)[None, :] + z_weight_re * z_re
        then_im += tl.sum(down_im * x_im, axis=0)[None, :] + z_weight_im * z_im
        then_re *= r_re * p_re.to(tl.float32)
        then_im *= r_im * p_im.to(tl.float32)
    else:
        first_re += tl.sum(up_re * y_re - up_im * y_im, axis=0)[None, :]
        first_im += tl.sum(up_re * y_im + up_im * y_re, axis=0)[None, :]
        then_re += tl.sum((weight + 1) * (re * y_re - im * y_im), axis=0)[None, :]
        then_im += tl.sum((weight + 1) * (re * y_im + im * y_re), axis=0)[None, :]
        then_re += tl.sum(down_re * x_re - down_im * x_im, axis=0)[None, :] + z_weight_re * z_re - z_weight_im * z_im
        then_im += tl.sum(down_re * x_im + down_im * x_re, axis=0)[None, :] + z_weight_re * z_im + z_weight_im * z_re
        then_re, then_im = r_re * then_re - r_im * then_im, -(r_re * then_im + r_im * then_re)
        first_im = -first_im
    tl.store(dpoles + at, then_re, mask=inside)
    tl.store(dpoles + at + 1, then_im, mask=inside)
    tl.store(dresidues + at, first_re, mask=inside)
    tl.store(dresidues + at + 1, first_im, mask=inside)
