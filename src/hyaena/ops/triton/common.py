"""Pieces that the kernels share: loads at the edges of time, short filters, modes, powers.

A *cell* is one channel of one segment of time; tensors are [S,BD], S segments of BD neighbouring channels, or [1,BD]
where a number belongs to the channel. What a cell has per mode or per tap is a tuple of such tensors, so that it stays
in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
"""Triton's type of the numbers in a tensor."""


@triton.jit
def load_taps(weight, bias, channel, inside, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The K taps (oldest first) and the bias of one of the three blocks, float32 [1,BD]; bias 0 where there is none."""
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(weight + channel * K + k, mask=inside, other=0.0).to(tl.float32),)
    offset = tl.zeros_like(taps[0])
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def pole(poles, at, inside, REAL: tl.constexpr):
    """The pole at one place, a float64 pair; with REAL, the two real poles whose logarithms stand there."""
    re = tl.load(poles + at, mask=inside, other=0.0).to(tl.float64)
    im = tl.load(poles + at + 1, mask=inside, other=0.0).to(tl.float64)
    if REAL:
        re = tl.exp(re)
        im = tl.exp(im)
    return re, im


@triton.jit
def load_modes(pairs, channel, inside, N: tl.constexpr):
    """Complex [D,N], stored as real pairs, as two tuples of N tensors."""
    re = ()
    im = ()
    for n in tl.static_range(N):
        re = re + (tl.load(pairs + (channel * N + n) * 2, mask=inside, other=0.0),)
        im = im + (tl.load(pairs + (channel * N + n) * 2 + 1, mask=inside, other=0.0),)
    return re, im


@triton.jit
def load_poles(poles, channel, inside, N: tl.constexpr, REAL: tl.constexpr):
    """The poles, two tuples; with REAL, pairs of real ones, whose logarithms are stored."""
    re, im = load_modes(poles, channel, inside, N)
    if REAL:
        out_re = ()
        out_im = ()
        for n in tl.static_range(N):
            out_re = out_re + (tl.exp(re[n].to(tl.float64)).to(tl.float32),)
            out_im = out_im + (tl.exp(im[n].to(tl.float64)).to(tl.float32),)
        re = out_re
        im = out_im
    return re, im


@triton.jit
def load_residues(residues, channel, inside, N: tl.constexpr, REAL: tl.constexpr):
    """The residues, two tuples; with REAL the second is negated, so that ``Σ r_re·s_re - r_im·s_im`` is the output."""
    re, im = load_modes(residues, channel, inside, N)
    if REAL:
        minus = ()
        for n in tl.static_range(N):
            minus = minus + (-im[n],)
        im = minus
    return re, im


@triton.jit
def store_modes(pairs, channel, inside, re, im, N: tl.constexpr):
    """The inverse of ``load_modes``."""
    for n in tl.static_range(N):
        tl.store(pairs + (channel * N + n) * 2, re[n], mask=inside)
        tl.store(pairs + (channel * N + n) * 2 + 1, im[n], mask=inside)


@triton.jit
def load_step(
    pointer,
    short,
    keep,
    t,
    T,
    inside,
    W: tl.constexpr,
    EDGE: tl.constexpr,
    HAS_SHORT: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """One input of the short filter, float32 [S,BD].

    Args:
        pointer: the step's place in z.
        short: the state of the short filter at this channel, W = K-1 numbers, oldest first.
        keep: the padding mask of this row, 1 byte per step.
        t: int [S,1], the step; before 0 it comes from ``short``.
        EDGE: the step may lie before 0, or at T or later, where the result is 0.
    """
    here = inside
    if EDGE:
        here = inside & (t >= 0) & (t < T)
    if HAS_MASK:
        here = here & (tl.load(keep + t, mask=(t >= 0) & (t < T), other=0) != 0)
    value = tl.load(pointer, mask=here, other=0.0).to(tl.float32)
    if EDGE and HAS_SHORT:
        before = inside & (t < 0)
        value += tl.load(short + (t + W), mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def convolve(taps, offset, history, now):
    """``offset + Σ_k taps[k]·window[k]`` over the window ``history ++ now``, and the history after this step."""
    out = tl.fma(taps[len(history)], now, offset)
    for k in tl.static_range(len(history)):
        out = tl.fma(taps[k], history[k], out)
    return out, (history + (now,))[1:]


@triton.jit
def advance(p_re, p_im, s_re, s_im, x, REAL: tl.constexpr = False):
    """``p·s + x`` for every mode, x real. With REAL a pair is not a complex number but two real ones."""
    re = ()
    im = ()
    for n in tl.static_range(len(p_re)):
        if REAL:
            re = re + (tl.fma(p_re[n], s_re[n], x),)
            im = im + (tl.fma(p_im[n], s_im[n], x),)
        else:
            re = re + (tl.fma(p_re[n], s_re[n], tl.fma(-p_im[n], s_im[n], x)),)
            im = im + (tl.fma(p_re[n], s_im[n], p_im[n] * s_re[n]),)
    return re, im


@triton.jit
def gather(ladder, s_re, s_im, x, REAL: tl.constexpr = False):
    """``p^G·s + Σ_g p^(G-1-g) x_g``: G steps of ``advance`` together, for fewer multiplications.

    ``ladder`` holds p^1 … p^G, each as two tuples over the modes; ``x`` is a tuple of G real tensors.
    """
    G: tl.constexpr = len(x)
    re = ()
    im = ()
    for n in tl.static_range(len(s_re)):
        q_re = ladder[G - 1][0][n]
        q_im = ladder[G - 1][1][n]
        if REAL:
            new_re = tl.fma(q_re, s_re[n], x[G - 1])
            new_im = tl.fma(q_im, s_im[n], x[G - 1])
        else:
            new_re = tl.fma(q_re, s_re[n], tl.fma(-q_im, s_im[n], x[G - 1]))
            new_im = tl.fma(q_re, s_im[n], q_im * s_re[n])
        for g in tl.static_range(G - 1):
            new_re = tl.fma(ladder[G - 2 - g][0][n], x[g], new_re)
            new_im = tl.fma(ladder[G - 2 - g][1][n], x[g], new_im)
        re = re + (new_re,)
        im = im + (new_im,)
    return re, im


@triton.jit
def pole_ladder(p_re, p_im, G: tl.constexpr, REAL: tl.constexpr = False):
    """p^1 … p^G of every mode for ``gather``, formed in float64."""
    wide_re = ()
    wide_im = ()
    for n in tl.static_range(len(p_re)):
        wide_re = wide_re + (p_re[n].to(tl.float64),)
        wide_im = wide_im + (p_im[n].to(tl.float64),)
    ladder = ((p_re, p_im),)
    at_re = wide_re
    at_im = wide_im
    for _ in tl.static_range(G - 1):
        re = ()
        im = ()
        narrow_re = ()
        narrow_im = ()
        for n in tl.static_range(len(p_re)):
            if REAL:
                re = re + (at_re[n] * wide_re[n],)
                im = im + (at_im[n] * wide_im[n],)
            else:
                re = re + (at_re[n] * wide_re[n] - at_im[n] * wide_im[n],)
                im = im + (at_re[n] * wide_im[n] + at_im[n] * wide_re[n],)
            narrow_re = narrow_re + (re[n].to(tl.float32),)
            narrow_im = narrow_im + (im[n].to(tl.float32),)
        at_re = re
        at_im = im
        ladder = ladder + ((narrow_re, narrow_im),)
    return ladder


@triton.jit
def power(re, im, exponent, BITS: tl.constexpr = 31, REAL: tl.constexpr = False):
    """``p^exponent`` of a complex tensor, by squaring; 0 <= exponent < 2^BITS. With REAL of two real ones."""
    out_re = tl.full(re.shape, 1.0, re.dtype)
    out_im = tl.full(re.shape, 1.0 if REAL else 0.0, re.dtype)
    for bit in range(BITS):
        odd = (exponent >> bit) % 2 == 1
        if REAL:
            out_re = tl.where(odd, out_re * re, out_re)
            out_im = tl.where(odd, out_im * im, out_im)
            re, im = re * re, im * im
        else:
            new_re = out_re * re - out_im * im
            new_im = out_re * im + out_im * re
            out_re = tl.where(odd, new_re, out_re)
            out_im = tl.where(odd, new_im, out_im)
            re, im = re * re - im * im, 2.0 * re * im
    return out_re, out_im


@triton.jit
def forget(numbers, condition):
    """A tuple of tensors, zero where a condition holds."""
    out = ()
    for i in tl.static_range(len(numbers)):
        out = out + (tl.where(condition, 0.0, numbers[i]),)
    return out


@triton.jit
def split_double(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def rms_scale(squares, eps, K: tl.constexpr, EPS_INSIDE: tl.constexpr):
    """1 / rms of a vector of K numbers, from their squares."""
    mean = tl.sum(squares, axis=0) / K
    if EPS_INSIDE:
        return 1.0 / tl.sqrt(mean + eps)
    return 1.0 / (tl.sqrt(mean) + eps)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """An activation of ``ops.ACTIVATIONS``, by its name."""
    if ACTIVATION == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    if ACTIVATION == "silu":
        return v / (1.0 + tl.exp(-v))
    return v
