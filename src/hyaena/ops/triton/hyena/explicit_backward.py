"""The operator with many explicit taps, backward: the long filter's share, before the walk back of ``direct_backward``.

With the names of ``explicit``, and chunks as matrices [C,RUNS·channels]::

    g[c]  = Σ_d A_d  w[c-d]        its output, for the gradient of x2
    dw[c] = Σ_d A_dᵀ dg[c+d]       dg = dy·u2, and the gradient of w, both without the skip
    dA_d  = Σ_c dg[c] w[c-d]ᵀ      a tap's gradient is the sum of its diagonal

This kernel makes g and dw in the dtype of z, and the walk the gradients of z, of the short filter and of the skip. That
moves 15 numbers a token and channel where one kernel for all would move 7, and has not the registers for both. A
program goes through its runs chunk by chunk, and BACK chunks further, for dw. What it forms of dw before step 0 is the
gradient of the state. Sums of gradients are its own, and the launcher's over programs: no atomics, the same on every
run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import load_taps
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.explicit import (
    add_product,
    before_zero,
    convolve_chunks,
    filter_segments,
    from_matrix,
    gated,
    hold,
    load_segments,
    load_toeplitz,
    times,
    to_matrix,
)
from hyaena.ops.triton.hyena.words import store_numbers, unpack, unstack


@triton.jit
def document(docs, t, T, outside):
    """The documents of steps t; ``outside`` at T and later, 0 before step 0."""
    return tl.where(t < T, tl.load(docs + t, mask=(t >= 0) & (t < T), other=0), outside)


@triton.jit
def spread_chunks(matrices, dgs, docs, start, stride, T, C: tl.constexpr, RUNS: tl.constexpr,
                  HAS_RESET: tl.constexpr):  # fmt: skip
    """``Σ_d A_dᵀ dgs[d]``, float32: dgs are chunks at start, start + C, … of every run; ``start`` may lie before 0."""
    COLUMNS: tl.constexpr = dgs[0].shape[1]
    total = tl.zeros((C, COLUMNS), tl.float32)
    if HAS_RESET:
        begin = start + tl.arange(0, COLUMNS)[None, :] // (COLUMNS // RUNS) * stride
        t = begin + tl.arange(0, C)[:, None]
        origin = document(docs, t, T, -1)
        first = document(docs, begin, T, 0)
        last = tl.maximum(document(docs, tl.minimum(begin + C, T) - 1, T, 0), first)
        for n in range(0, tl.max(last - first) + 1):
            part = tl.zeros_like(total)
            for d in tl.static_range(len(dgs)):
                here = document(docs, t + d * C, T, -1) == first + n
                part = add_product(part, matrices[d], tl.where(here, dgs[d], 0.0).to(dgs[d].dtype))
            total = tl.where(origin == first + n, part, total)
    else:
        for d in tl.static_range(len(dgs)):
            total = add_product(total, matrices[d], dgs[d])
    return total


@triton.jit
def add_outer(total, dg, w):
    """``total + dg·wᵀ``."""
    if dg.dtype == tl.float32:
        return tl.dot(dg, tl.trans(w), total, input_precision="tf32x3")
    return tl.dot(dg, tl.trans(w), total)


@triton.jit
def add_outers(totals, dg, ws, docs, start, stride, T, C: tl.constexpr, RUNS: tl.constexpr, HAS_RESET: tl.constexpr):
    """Add the gradients of A_0, A_1, … that the chunks at ``start`` make."""
    COLUMNS: tl.constexpr = dg.shape[1]
    if HAS_RESET:
        begin = start + tl.arange(0, COLUMNS)[None, :] // (COLUMNS // RUNS) * stride
        t = begin + tl.arange(0, C)[:, None]
        to = document(docs, t, T, -1)
        first = document(docs, begin, T, 0)
        last = tl.maximum(document(docs, tl.minimum(begin + C, T) - 1, T, 0), first)
        for n in range(0, tl.max(last - first) + 1):
            here = tl.where(to == first + n, dg, 0.0).to(dg.dtype)
            out = ()
            for d in tl.static_range(len(ws)):
                from_here = document(docs, t - d * C, T, -1) == first + n
                out = out + (add_outer(totals[d], here, tl.where(from_here, ws[d], 0.0).to(dg.dtype)),)
            totals = out
    else:
        out = ()
        for d in tl.static_range(len(ws)):
            out = out + (add_outer(totals[d], dg, ws[d]),)
        totals = out
    return totals


@triton.jit(do_not_specialize=["T", "stride"])
def explicit_backward_kernel(z, dy, weight, bias, taps, short, long, keep, bounds, docs, outers, g, dw, dtaps, dlong_in,
                             T, stride, TYPE: tl.constexpr, FACTOR: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
                             W: tl.constexpr, WP: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BW: tl.constexpr,
                             RUNS: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BACK: tl.constexpr,
                             TERMS: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
                             HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr,
                             HAS_RESET: tl.constexpr, PARAMETERS: tl.constexpr):  # fmt: skip
    """From z and dy to g and dw. Grid: (blocks of words, sets of runs, rows); arguments as of the forward kernel.

    ``dy``, ``g`` and ``dw`` [B,T,D] are in words; WP is W as a power of two. Every program has a piece of ``outers``
    float32 [BACK+1,C,C]; ``dtaps`` is [B,sets,blocks,W], ``dlong_in`` [B,D,W-1] the gradient of the state before z.
    """
    S: tl.constexpr = RUNS * (C // L)
    ROW: tl.constexpr = 3 * D // P
    BLOCKS: tl.constexpr = (WIDTH + BW * P - 1) // (BW * P)
    group = tl.program_id(0) // BLOCKS
    place = tl.program_id(0) % BLOCKS * BW + tl.arange(0, BW)[:, None]
    inside = place < WIDTH // P
    word = group * (WIDTH // P) + place
    channel = word[:, :, None] * P + tl.arange(0, P)[None, None, :]
    real = inside[:, :, None]
    row = tl.program_id(2).to(tl.int64)
    program = (row * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    outers += program * ((BACK + 1) * C * C)
    z_2, z_1, z_0 = thirds(z + row * T * ROW, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW, ROW)
    dy += row * T * (D // P)
    g += row * T * (D // P)
    dw += row * T * (D // P)
    long += row * D * (W - 1)
    dlong_in += row * D * (W - 1) + W - 1
    keep += row * (T // L + 1)
    bounds += row * (T // L + 1)
    docs += row * T
    T = tl.cast(T, tl.int32)
    taps2, off2 = load_taps(weight, bias, channel, real, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, real, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, real, K, HAS_BIAS)
    matrices = ()
    turned = ()
    for d in tl.static_range(BACK + 1):
        matrices = matrices + (load_toeplitz(taps + group * W, d, W, C, TERMS, FACTOR, False),)
        turned = turned + (load_toeplitz(taps + group * W, d, W, C, TERMS, FACTOR, True),)

    first = tl.program_id(1) * (stride * RUNS)
    past = ()
    none = ()
    totals = ()
    for d in tl.static_range(1, BACK + 1):
        before = first - d * C
        older, _, _ = gated(z_1, z_0, short_1, short_0, keep, bounds, taps1, off1, taps0, off0, word, inside, before,
                            stride, T, S, L, C, ROW, P, TYPE, HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
        older = before_zero(older, long, channel, real, before, stride, S, L, C, W, HAS_LONG)
        past = past + (to_matrix(older, RUNS, FACTOR),)
        none = none + (tl.zeros_like(past[0]),)
    if PARAMETERS:
        for _ in tl.static_range(BACK + 1):
            totals = totals + (tl.zeros((C, C), tl.float32),)
    held = hold(past)  # w of the chunks before the next one
    slopes = hold(none)  # dg of them, the oldest first
    at = times(0, stride, 0, 1, S, L, C)
    for start in tl.range(first, first + stride + BACK * C, C, num_stages=STAGES):
        ws, bits, bound = gated(z_1, z_0, short_1, short_0, keep, bounds, taps1, off1, taps0, off0, word, inside, start,
                                stride, T, S, L, C, ROW, P, TYPE, HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
        past2 = load_segments(z_2, short_2, word, inside, start, stride, T, bits, 1 - K, K - 1, S, L, C, K - 1, ROW,
                              HAS_SHORT, HAS_MASK)  # fmt: skip
        words2 = load_segments(z_2, short_2, word, inside, start, stride, T, bits, 0, L, S, L, C, K - 1, ROW,
                               HAS_SHORT, HAS_MASK)  # fmt: skip
        ds = load_segments(dy, dy, word, inside, start, stride, T, bits, 0, L, S, L, C, 0, D // P, False, False)
        us = filter_segments(past2, words2, bits, bound, taps2, off2, P, TYPE, HAS_MASK, HAS_RESET)
        own = ()
        for i in tl.static_range(L):
            own = own + (unpack(ds[i], P, TYPE) * us[i],)
        chunks = (to_matrix(ws, RUNS, FACTOR),) + unstack(held)[:BACK]
        dgs = unstack(slopes)[:BACK] + (to_matrix(own, RUNS, FACTOR),)
        inner = start < first + stride
        out = convolve_chunks(matrices, chunks, docs, start, stride, T, C, RUNS, HAS_RESET)
        outs = from_matrix(out, RUNS, P, L)
        to = tl.cast(start, tl.int64) * (D // P) + (at * (D // P) + word)
        for i in tl.static_range(L):
            store_numbers(g + to + i * (D // P), outs[i], inside & inner & (start + at + i < T), P, TYPE)
        begin = start - BACK * C
        outs = from_matrix(spread_chunks(turned, dgs, docs, begin, stride, T, C, RUNS, HAS_RESET), RUNS, P, L)
        to -= BACK * C * (D // P)
        for i in tl.static_range(L):
            store_numbers(dw + to + i * (D // P), outs[i], inside & (begin >= first) & (begin + at + i < T), P, TYPE)
        if begin < 0:  # the first run: the steps before step 0 that the filter saw
            earliest = tl.arange(0, S)[None, :] < C // L
            for i in tl.static_range(L):
                t = (begin + at + i)[:, :, None]
                kept = real & earliest[:, :, None] & (t < 0) & (t > -W)
                tl.store(dlong_in + channel * (W - 1) + t, outs[i], mask=kept)
        if PARAMETERS:
            last = tl.where(inner, dgs[BACK], 0.0).to(FACTOR)
            totals = add_outers(totals, last, chunks, docs, start, stride, T, C, RUNS, HAS_RESET)
        held = hold(chunks[:BACK])
        slopes = hold(dgs[1:])

    if PARAMETERS:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        for d in tl.static_range(BACK + 1):
            tl.store(outers + (d * C + i) * C + j, totals[d])
        tl.debug_barrier()
        lag = tl.arange(0, WP)
        found = tl.zeros((WP,), tl.float32)
        for d in tl.static_range(BACK + 1):
            j = i + d * C - lag[None, :]
            found += tl.sum(tl.load(outers + (d * C + i) * C + j, mask=(j >= 0) & (j < C), other=0.0), axis=0)
        tl.store(dtaps + program * W + lag, found, mask=lag < W)
