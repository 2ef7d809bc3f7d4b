"""Pieces of the backward kernels: windows of the short filter, the adjoint recurrence, rows of states."""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import load_step


@triton.jit
def load_window(pointer, short, keep, t, T, inside, D: tl.constexpr, W: tl.constexpr, U: tl.constexpr,
                HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """Steps t-W … t+U-1 of one block of z; ``pointer`` is step 0."""
    window = ()
    for j in tl.static_range(W + U):
        at = t + (j - W)
        window = window + (load_step(pointer + at * 3 * D, short, keep, at, T, inside, W, True, HAS_SHORT, HAS_MASK),)
    return window


@triton.jit
def load_ages(ages, t, T, U: tl.constexpr, HAS_RESET: tl.constexpr):
    """The ages of steps t … t+U-1, a tuple; large at T and later, and where there are no documents."""
    out = ()
    for j in tl.static_range(U):
        age = 1 << 30
        if HAS_RESET:
            age = tl.load(ages + t + j, mask=t + j < T, other=1 << 30)
        out = out + (age,)
    return out


@triton.jit
def tap_input(window, age, j: tl.constexpr, k: tl.constexpr, W: tl.constexpr, HAS_RESET: tl.constexpr):
    """What tap k, the oldest first, multiplies at step j of a window: zero before the document of that step."""
    x = window[j + k]
    if HAS_RESET and k < W:
        x = tl.where(age >= W - k, x, 0.0)
    return x


@triton.jit
def filter_window(taps, offset, window, ages, keep, t, T, U: tl.constexpr, HAS_MASK: tl.constexpr,
                  HAS_RESET: tl.constexpr):  # fmt: skip
    """The short filter's output at steps t … t+U-1, zero where a step is padding."""
    W: tl.constexpr = len(taps) - 1
    out = ()
    for j in tl.static_range(U):
        value = offset + taps[0] * tap_input(window, ages[j], j, 0, W, HAS_RESET)
        for k in tl.static_range(1, W + 1):
            value += taps[k] * tap_input(window, ages[j], j, k, W, HAS_RESET)
        if HAS_MASK:
            value = tl.where(tl.load(keep + t + j, mask=t + j < T, other=0) != 0, value, 0.0)
        out = out + (value,)
    return out


@triton.jit
def retreat(p_re, p_im, r_re, r_im, nu_re, nu_im, dg):
    """λ from ν of the step after and dg of this one: two tuples over the modes."""
    re = ()
    im = ()
    for n in tl.static_range(len(p_re)):
        re = re + (nu_re[n] + r_re[n] * dg,)
        im = im + (nu_im[n] - r_im[n] * dg,)
    return re, im


@triton.jit
def turn_back(p_re, p_im, re, im, REAL: tl.constexpr):
    """``conj(p)·λ``; with REAL of two real modes."""
    out_re = ()
    out_im = ()
    for n in tl.static_range(len(p_re)):
        if REAL:
            out_re = out_re + (p_re[n] * re[n],)
            out_im = out_im + (p_im[n] * im[n],)
        else:
            out_re = out_re + (p_re[n] * re[n] + p_im[n] * im[n],)
            out_im = out_im + (p_re[n] * im[n] - p_im[n] * re[n],)
    return out_re, out_im


@triton.jit
def rotate(p_re, p_im, re, im, TURNED: tl.constexpr, REAL: tl.constexpr):
    """``p·s``, or ``conj(p)·s`` with TURNED, of one mode; with REAL of two real modes."""
    if REAL:
        out_re = p_re * re
        out_im = p_im * im
    elif TURNED:
        out_re = p_re * re + p_im * im
        out_im = p_re * im - p_im * re
    else:
        out_re = p_re * re - p_im * im
        out_im = p_re * im + p_im * re
    return out_re, out_im


@triton.jit
def scale(numbers, factors):
    """A tuple times a tuple."""
    out = ()
    for n in tl.static_range(len(numbers)):
        out = out + (numbers[n] * factors[n],)
    return out


@triton.jit
def negate(numbers):
    """Minus a tuple."""
    out = ()
    for n in tl.static_range(len(numbers)):
        out = out + (-numbers[n],)
    return out


@triton.jit
def zeros(N: tl.constexpr, BD: tl.constexpr):
    """N tensors of zeros, float32 [BD]."""
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros((BD,), tl.float32),)
    return out


@triton.jit
def load_rows(buffer, channel, inside, N: tl.constexpr, D: tl.constexpr):
    """Complex numbers laid out [N,2,D]."""
    re = ()
    im = ()
    for n in tl.static_range(N):
        re = re + (tl.load(buffer + 2 * n * D + channel, mask=inside, other=0.0),)
        im = im + (tl.load(buffer + (2 * n + 1) * D + channel, mask=inside, other=0.0),)
    return re, im


@triton.jit
def store_rows(buffer, channel, inside, re, im, N: tl.constexpr, D: tl.constexpr):
    """The inverse of ``load_rows``."""
    for n in tl.static_range(N):
        tl.store(buffer + 2 * n * D + channel, re[n], mask=inside)
        tl.store(buffer + (2 * n + 1) * D + channel, im[n], mask=inside)


@triton.jit
def add_taps(total, du, window, age, j: tl.constexpr, HAS_RESET: tl.constexpr):
    """Add du[t]·z[t-k] to the gradient of every tap; j is the step's place in its batch of steps."""
    W: tl.constexpr = len(total) - 1
    out = ()
    for k in tl.static_range(W + 1):
        out = out + (total[k] + du * tap_input(window, age, j, k, W, HAS_RESET),)
    return out


@triton.jit
def spread(taps, du, later):
    """The gradient of z at the step of du: ``Σ_k taps[W-k]·du[t+k]``; ``later`` holds du of the W steps after it."""
    W: tl.constexpr = len(later)
    out = taps[W] * du
    for k in tl.static_range(W):
        out += taps[W - 1 - k] * later[k]
    return out, ((du,) + later)[:W]
