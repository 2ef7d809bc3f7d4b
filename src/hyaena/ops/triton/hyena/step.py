"""The step kernels: T = 1, from z [B,3D] to y [B,D]; both states move in place, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import load_poles, load_residues
from hyaena.ops.triton.decode.pdl import gdc_launch_dependents, gdc_wait


@triton.jit
def read_filter(weight, bias, channel, inside, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The taps of the short filter, oldest first, and its bias: a tuple of K + 1 float32 [BD]."""
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(weight + channel * K + k, mask=inside, other=0.0).to(tl.float32),)
    if HAS_BIAS:  # noqa: SIM108, one branch is compiled
        taps = taps + (tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32),)
    else:
        taps = taps + (0.0,)
    return taps


@triton.jit
def state_of(state, places, row, stride, SIZE: tl.constexpr, PLACES: tl.constexpr):
    """Where the state of a row begins: at its place of a state of many rows, ``stride`` numbers apart, or its row."""
    if PLACES:
        state += tl.load(places + row).to(tl.int64) * stride
    else:
        state += row * SIZE
    return state


@triton.jit
def read_window(z, short, channel, inside, K: tl.constexpr):
    """The last K inputs of the short filter, oldest first: a tuple of K [BD], as they are stored."""
    W: tl.constexpr = K - 1
    window = ()
    for k in tl.static_range(W):
        window = window + (tl.load(short + channel * W + k, mask=inside, other=0.0),)
    return window + (tl.load(z + channel, mask=inside, other=0.0),)


@triton.jit
def filter_step(taps, window, K: tl.constexpr):
    """The short filter at one step, float32 [BD]."""
    out = taps[K]
    for k in tl.static_range(K):
        out += taps[k] * window[k].to(tl.float32)
    return out


@triton.jit
def write_window(window, short, channel, inside, K: tl.constexpr):
    """Store the window that the next step reads."""
    W: tl.constexpr = K - 1
    for k in tl.static_range(W):
        tl.store(short + channel * W + k, window[k + 1].to(short.dtype.element_ty), mask=inside)


@triton.jit
def hyena_step_kernel(z, weight, bias, poles, residues, skip, short, long, y, short_out, long_out,
                      sources, targets, short_stride, long_stride,
                      D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
                      HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, OVERLAP: tl.constexpr,
                      REAL: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` at T = 1. The outputs may be the very states that are read. Grid: (channels / BD, rows).

    With PLACES the states are of more rows, which lie apart by strides: a row reads that at its source, and writes that
    at its target. Everything is read before anything is written: a read behind a write would wait for what the write
    waits for.
    """
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    taps2 = read_filter(weight, bias, channel, inside, K, HAS_BIAS)
    taps1 = read_filter(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0 = read_filter(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    if HAS_SKIP:
        direct = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    p_re, p_im = load_poles(poles, channel, inside, N, REAL)
    r_re, r_im = load_residues(residues, channel, inside, N, REAL)
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    z += row * 3 * D
    short = state_of(short, sources, row, short_stride, 3 * D * (K - 1), PLACES)
    long = state_of(long, sources, row, long_stride, D * N * 2, PLACES)
    short_out = state_of(short_out, targets, row, short_stride, 3 * D * (K - 1), PLACES)
    long_out = state_of(long_out, targets, row, long_stride, D * N * 2, PLACES)
    window2 = read_window(z, short, channel, inside, K)
    window1 = read_window(z, short, D + channel, inside, K)
    window0 = read_window(z, short, 2 * D + channel, inside, K)
    states = ()
    for n in tl.static_range(N):
        at = (channel * N + n) * 2
        states = states + (tl.load(long + at, mask=inside, other=0.0), tl.load(long + at + 1, mask=inside, other=0.0))

    w = filter_step(taps1, window1, K) * filter_step(taps0, window0, K)
    out = tl.zeros((BD,), tl.float32)
    if HAS_SKIP:
        out = direct * w
    for n in tl.static_range(N):
        if REAL:
            new_re = p_re[n] * states[2 * n] + w
            new_im = p_im[n] * states[2 * n + 1] + w
        else:
            new_re = p_re[n] * states[2 * n] - p_im[n] * states[2 * n + 1] + w
            new_im = p_re[n] * states[2 * n + 1] + p_im[n] * states[2 * n]
        at = (channel * N + n) * 2
        tl.store(long_out + at, new_re, mask=inside)
        tl.store(long_out + at + 1, new_im, mask=inside)
        out += r_re[n] * new_re - r_im[n] * new_im
    out *= filter_step(taps2, window2, K)
    tl.store(y + row * D + channel, out.to(y.dtype.element_ty), mask=inside)
    write_window(window2, short_out, channel, inside, K)
    write_window(window1, short_out, D + channel, inside, K)
    write_window(window0, short_out, 2 * D + channel, inside, K)


@triton.jit
def explicit_step_kernel(z, weight, bias, taps, skip, short, long, y, short_out, long_out,
                         sources, targets, short_stride, long_stride,
                         D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, WIDTH: tl.constexpr,
                         BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                         OVERLAP: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """``hyena_step_kernel`` for W explicit taps; WP is W rounded up to a power of two, WIDTH channels share a filter.

    The window moves by one number: every number of it is read once and written once.
    """
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    taps2 = read_filter(weight, bias, channel, inside, K, HAS_BIAS)
    taps1 = read_filter(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0 = read_filter(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    place = tl.arange(0, WP)[None, :]  # in the window, the oldest input first; the newest is w itself
    older = inside[:, None] & (place < W - 1)
    h = tl.load(taps + channel[:, None] // WIDTH * W + (W - 1 - place), mask=older, other=0.0).to(tl.float32)
    direct = tl.load(taps + channel // WIDTH * W, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        direct += tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    z += row * 3 * D
    short = state_of(short, sources, row, short_stride, 3 * D * (K - 1), PLACES)
    long = state_of(long, sources, row, long_stride, D * (W - 1), PLACES)
    short_out = state_of(short_out, targets, row, short_stride, 3 * D * (K - 1), PLACES)
    long_out = state_of(long_out, targets, row, long_stride, D * (W - 1), PLACES)
    window2 = read_window(z, short, channel, inside, K)
    window1 = read_window(z, short, D + channel, inside, K)
    window0 = read_window(z, short, 2 * D + channel, inside, K)
    at = channel[:, None] * (W - 1) + place
    past = tl.load(long + at, mask=older, other=0.0)
    w = filter_step(taps1, window1, K) * filter_step(taps0, window0, K)
    out = (direct * w + tl.sum(h * past, axis=1)) * filter_step(taps2, window2, K)
    tl.store(y + row * D + channel, out.to(y.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # the window may move in place
    tl.store(long_out + at - 1, past, mask=older & (place > 0))
    tl.store(long_out + channel * (W - 1) + W - 2, w, mask=inside & (W > 1))
    write_window(window2, short_out, channel, inside, K)
    write_window(window1, short_out, D + channel, inside, K)
    write_window(window0, short_out, 2 * D + channel, inside, K)
