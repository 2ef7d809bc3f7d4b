"""Gradients of all parameters of the kernels of ``segments``, from sums over segments and rows.

With P, X, Y and Z as ``segments_gate`` and ``segments_inputs`` make them, and c[t] = Σ_j P[t+j,j]::

    conj dr = Σ_t p^t c[t] + Σ_i p^(i+1) Y[i]
    conj dp = r (Σ_t t p^(t-1) c[t] + Σ_i (i+1) p^i Y[i] + Σ_i (15-i) p^(14-i) X[i] + 16 p^15 Z)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import power
from hyaena.ops.triton.hyena.adjoint import rotate
from hyaena.ops.triton.pdl import gdc_wait


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
    c = tl.zeros((16, 16), tl.float32)
    x_re = tl.zeros((16, NP), tl.float32)  # X of 15-i
    x_im = tl.zeros((16, NP), tl.float32)
    y_re = tl.zeros((16, NP), tl.float32)
    y_im = tl.zeros((16, NP), tl.float32)
    z_re = tl.zeros((1, NP), tl.float32)
    z_im = tl.zeros((1, NP), tl.float32)
    for row in range(ROWS):
        owner = tl.cast(row, tl.int64) * D + channel
        c += tl.load(outers + (owner * 16 + i + j) * 16 + j, mask=i + j < 16, other=0.0)
        place = ((owner * 16 + i) * N + mode) * 2
        y_re += tl.load(of_g + place, mask=inside, other=0.0)
        y_im += tl.load(of_g + place + 1, mask=inside, other=0.0)
        place = ((owner * 16 + 15 - i) * N + mode) * 2
        x_re += tl.load(of_w + place, mask=inside, other=0.0)
        x_im += tl.load(of_w + place + 1, mask=inside, other=0.0)
        place = (owner * N + mode) * 2
        z_re += tl.load(of_states + place, mask=inside, other=0.0)
        z_im += tl.load(of_states + place + 1, mask=inside, other=0.0)
    if REAL:
        p_re = tl.exp(p_re)
        p_im = tl.exp(p_im)
    none = tl.zeros((16, NP), tl.float64)
    wide_re, wide_im = power(p_re + none, p_im + none, tl.maximum(i - 1, 0), 4, REAL)
    down_re = i * wide_re.to(tl.float32)  # i p^(i-1)
    down_im = i * wide_im.to(tl.float32)
    re, im = rotate(wide_re, wide_im, p_re, p_im, False, REAL)  # p^i, where i is not 0
    re = tl.where(i == 0, 1.0, re)
    im = tl.where(i == 0, 1.0 if REAL else 0.0, im)
    up_re, up_im = rotate(re, im, p_re, p_im, False, REAL)
    re, im = re.to(tl.float32), im.to(tl.float32)
    up_re, up_im = up_re.to(tl.float32), up_im.to(tl.float32)  # p^(i+1)
    c = tl.sum(c, axis=1)[:, None]
    tl.store(dskip + channel + i, c, mask=i == 0)
    weight = (i + 1) * y_re, (i + 1) * y_im
    first_re, first_im = rotate(up_re, up_im, y_re, y_im, False, REAL)  # of dr
    first_re = tl.sum(first_re + c * re, axis=0)[None, :]
    first_im = tl.sum(first_im + c * im, axis=0)[None, :]
    then_re, then_im = rotate(re, im, weight[0], weight[1], False, REAL)  # of dp
    add_re, add_im = rotate(down_re, down_im, x_re, x_im, False, REAL)
    last_re, last_im = rotate(re, im, 16.0 * z_re, 16.0 * z_im, False, REAL)
    last = i == 15
    then_re = tl.sum(then_re + add_re + c * down_re + tl.where(last, last_re, 0.0), axis=0)[None, :]
    then_im = tl.sum(then_im + add_im + c * down_im + tl.where(last, last_im, 0.0), axis=0)[None, :]
    if REAL:
        then_re *= r_re * p_re.to(tl.float32)
        then_im *= r_im * p_im.to(tl.float32)
    else:
        then_re, then_im = rotate(r_re, r_im, then_re, then_im, False, REAL)
        then_im = -then_im
        first_im = -first_im
    tl.store(dpoles + at, then_re, mask=inside)
    tl.store(dpoles + at + 1, then_im, mask=inside)
    tl.store(dresidues + at, first_re, mask=inside)
    tl.store(dresidues + at + 1, first_im, mask=inside)
