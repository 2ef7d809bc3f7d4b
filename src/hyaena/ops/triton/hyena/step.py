"""The step kernels: T = 1, from z [B,3D] to y [B,D]; both states move in place, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait


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
def split_pairs(pairs, BD: tl.constexpr, NP: tl.constexpr):
    """[BD,2·NP] numbers, real and imaginary parts in turn -> both parts [BD,NP]."""
    return tl.split(tl.reshape(pairs, (BD, NP, 2)))


@triton.jit(do_not_specialize=["rows"])
def hyena_step_kernel(z, weight, bias, poles, residues, skip, short, long, y, short_out, long_out,
                      sources, targets, short_stride, long_stride, rows,
                      D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
                      ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, OVERLAP: tl.constexpr,
                      REAL: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` at T = 1. The outputs may be the very states that are read. NP is N rounded up to a power of
    two. Grid: (channels / BD, rows / ROWS); a program reads the filters once for its rows.

    With PLACES the states are of more rows, which lie apart by strides: a row reads that at its source, and writes that
    at its target. Everything of a row is read before anything is written: a read behind a write would wait for what the
    write waits for.
    """
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    taps2 = read_filter(weight, bias, channel, inside, K, HAS_BIAS)
    taps1 = read_filter(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0 = read_filter(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    if HAS_SKIP:
        direct = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    number = tl.arange(0, 2 * NP)[None, :]  # of a channel's state
    at = channel[:, None] * (2 * N) + number
    kept = inside[:, None] & (number < 2 * N)
    p = tl.load(poles + at, mask=kept, other=0.0)
    r = tl.load(residues + at, mask=kept, other=0.0)
    if REAL:  # their logarithms are stored
        p = tl.exp(p.to(tl.float64)).to(tl.float32)
    else:
        p_re, p_im = split_pairs(p, BD, NP)
        r_re, r_im = split_pairs(r, BD, NP)
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for i in tl.range(0, tl.minimum(ROWS, rows - first)):
        row = first + i
        here = z + row * 3 * D
        old_short = state_of(short, sources, row, short_stride, 3 * D * (K - 1), PLACES)
        new_short = state_of(short_out, targets, row, short_stride, 3 * D * (K - 1), PLACES)
        old_long = state_of(long, sources, row, long_stride, D * N * 2, PLACES)
        new_long = state_of(long_out, targets, row, long_stride, D * N * 2, PLACES)
        window2 = read_window(here, old_short, channel, inside, K)
        window1 = read_window(here, old_short, D + channel, inside, K)
        window0 = read_window(here, old_short, 2 * D + channel, inside, K)
        state = tl.load(old_long + at, mask=kept, other=0.0)
        w = filter_step(taps1, window1, K) * filter_step(taps0, window0, K)
        if REAL:
            state = p * state + w[:, None]
            out = tl.sum(r * state, axis=1)
        else:
            re, im = split_pairs(state, BD, NP)
            now_re = p_re * re - p_im * im + w[:, None]
            now_im = p_re * im + p_im * re
            out = tl.sum(r_re * now_re - r_im * now_im, axis=1)
            state = tl.reshape(tl.join(now_re, now_im), (BD, 2 * NP))
        if HAS_SKIP:
            out += direct * w
        out *= filter_step(taps2, window2, K)
        tl.store(y + row * D + channel, out.to(y.dtype.element_ty), mask=inside)
        tl.store(new_long + at, state, mask=kept)
        write_window(window2, new_short, channel, inside, K)
        write_window(window1, new_short, D + channel, inside, K)
        write_window(window0, new_short, 2 * D + channel, inside, K)


@triton.jit
def explicit_step_kernel(z, weight, bias, taps, skip, short, long, y, short_out, long_out,
                         sources, targets, short_stride, long_stride,
                         D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, WIDTH: tl.constexpr,
                         BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                         OVERLAP: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """``hyena_step_kernel`` for W explicit taps; WP is W rounded up to a power of two, WIDTH channels share a filter.

    The window moves by one number: every number of it is read once and written once. Grid: (channels / BD, rows), since
    a row has more numbers than the filters. Channels are counted from the program's first: offsets that the compiler
    knows to be small share one address. Where the channels of a program share a filter, its taps are read once.
    """
    start = tl.program_id(0) * BD
    channel = tl.arange(0, BD)
    inside = start + channel < D if D % BD else channel < BD
    taps2 = read_filter(weight + start * K, bias + start, channel, inside, K, HAS_BIAS)
    taps1 = read_filter(weight + (D + start) * K, bias + D + start, channel, inside, K, HAS_BIAS)
    taps0 = read_filter(weight + (2 * D + start) * K, bias + 2 * D + start, channel, inside, K, HAS_BIAS)
    number = tl.arange(0, WP)[None, :]  # in the window, the oldest input first; the newest is w itself
    older = inside[:, None] & (number < W - 1)
    at = channel[:, None] * (W - 1) + number
    if WIDTH % BD == 0:
        filter = taps + start // WIDTH * W
        h = tl.load(filter + (W - 1 - number), mask=number < W - 1, other=0.0).to(tl.float32)
        direct = tl.load(filter).to(tl.float32)
    else:
        filter = taps + (start + channel) // WIDTH * W
        h = tl.load(filter[:, None] + (W - 1 - number), mask=older, other=0.0).to(tl.float32)
        direct = tl.load(filter, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        direct += tl.load(skip + start + channel, mask=inside, other=0.0).to(tl.float32)
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    here = z + row * 3 * D + start
    old_short = state_of(short, sources, row, short_stride, 3 * D * (K - 1), PLACES) + start * (K - 1)
    new_short = state_of(short_out, targets, row, short_stride, 3 * D * (K - 1), PLACES) + start * (K - 1)
    old_long = state_of(long, sources, row, long_stride, D * (W - 1), PLACES) + start * (W - 1)
    new_long = state_of(long_out, targets, row, long_stride, D * (W - 1), PLACES) + start * (W - 1)
    window2 = read_window(here, old_short, channel, inside, K)
    window1 = read_window(here + D, old_short + D * (K - 1), channel, inside, K)
    window0 = read_window(here + 2 * D, old_short + 2 * D * (K - 1), channel, inside, K)
    past = tl.load(old_long + at, mask=older, other=0.0)
    w = filter_step(taps1, window1, K) * filter_step(taps0, window0, K)
    out = (direct * w + tl.sum(h * past, axis=1)) * filter_step(taps2, window2, K)
    tl.store(y + row * D + start + channel, out.to(y.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # the window may move in place
    tl.store(new_long + at - 1, past, mask=older & (number > 0))
    tl.store(new_long + channel * (W - 1) + W - 2, w, mask=inside & (W > 1))
    write_window(window2, new_short, channel, inside, K)
    write_window(window1, new_short + D * (K - 1), channel, inside, K)
    write_window(window0, new_short + 2 * D * (K - 1), channel, inside, K)
