"""The operator with explicit taps, backward: one kernel for the gradient of z and partial sums of all parameters'.

With the names of ``explicit``, and chunks as matrices [C,BC]::

    dg[c] = dy[c]·u2[c]        dw[c] = Σ_d A_dᵀ dg[c+d] + skip·dg[c]        dA_d = Σ_c dg[c] w[c-d]ᵀ

A program walks through its run from the last chunk to the first: dg of later chunks and w of earlier ones stay in
registers. It begins one chunk late, since the short filter reaches K-1 steps ahead: the gradients of u go through a
buffer of the program's own, three chunks long, so that one barrier a chunk orders its writes and reads. Gradients of
parameters are summed per program, and by the launcher over programs: no atomics, the same sums on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import load_taps
from hyaena.ops.triton.hyena.explicit import (
    add_product,
    convolve_chunks,
    filter_inputs,
    gated,
    load_toeplitz,
)


@triton.jit
def spread_chunks(matrices, dgs, docs, start, T, C: tl.constexpr, HAS_RESET: tl.constexpr):
    """``Σ_d A_dᵀ dgs[d]``, float32: dgs are chunks at start, start + C, …; the chunk at start may lie before step 0."""
    total = tl.zeros((C, dgs[0].shape[1]), tl.float32)
    if HAS_RESET:
        j = start + tl.arange(0, C)[:, None].to(tl.int64)
        origin = tl.load(docs + j, mask=(j >= 0) & (j < T), other=0)
        first = 0
        last = 0
        if start >= 0:
            first = tl.load(docs + start)
        if start + C > 0:
            last = tl.load(docs + tl.minimum(start + C, T) - 1)
        for doc in range(first, last + 1):
            part = tl.zeros_like(total)
            for d in tl.static_range(len(dgs)):
                i = j + d * C
                to = tl.load(docs + i, mask=(i >= 0) & (i < T), other=0)
                part = add_product(part, matrices[d], tl.where(to == doc, dgs[d], 0.0).to(dgs[d].dtype))
            total = tl.where(origin == doc, part, total)
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
def add_outers(totals, dg, ws, docs, start, T, C: tl.constexpr, HAS_RESET: tl.constexpr):
    """Add the gradients of A_0, A_1, … that the chunk at ``start`` makes."""
    if HAS_RESET:
        i = start + tl.arange(0, C)[:, None].to(tl.int64)
        to = tl.load(docs + i, mask=i < T, other=-1)
        first = tl.load(docs + start)
        last = tl.load(docs + tl.minimum(start + C, T) - 1)
        for doc in range(first, last + 1):
            here = tl.where(to == doc, dg, 0.0).to(dg.dtype)
            out = ()
            for d in tl.static_range(len(ws)):
                j = i - d * C
                origin = tl.load(docs + j, mask=(j >= 0) & (j < T), other=0)
                out = out + (add_outer(totals[d], here, tl.where(origin == doc, ws[d], 0.0).to(dg.dtype)),)
            totals = out
    else:
        out = ()
        for d in tl.static_range(len(ws)):
            out = out + (add_outer(totals[d], dg, ws[d]),)
        totals = out
    return totals


@triton.jit
def spread_inputs(buffer, ages, taps, at, t, T, column, C: tl.constexpr, BC: tl.constexpr, HAS_RESET: tl.constexpr):
    """The gradient of one block's inputs at steps t [.,1] from those of u: ``Σ_k taps[S-k]·du[t+k]``.

    ``buffer`` holds du of steps modulo 3C, rows of 3·BC numbers; ``at`` is the row of step t.
    """
    S: tl.constexpr = len(taps) - 1
    out = tl.zeros((t.shape[0], BC), tl.float32)
    for k in tl.static_range(S + 1):
        here = (t + k >= 0) & (t + k < T)
        if HAS_RESET and k > 0:
            here = here & (tl.load(ages + t + k, mask=here, other=0) >= k)
        du = tl.load(buffer + (at + k) % (3 * C) * (3 * BC) + column, mask=here & (column >= 0), other=0.0)
        out = tl.fma(taps[S - k], du.to(tl.float32), out)
    return out


@triton.jit
def fold(x):
    """Sums of every two rows [C/2,BC] that lie eight apart: those that a thread holds of a product's result."""
    C: tl.constexpr = x.shape[0]
    BC: tl.constexpr = x.shape[1]
    return tl.reshape(tl.sum(tl.reshape(x, (C // 16, 2, 8, BC)), axis=1), (C // 2, BC))


@triton.jit
def add_taps(totals, du, xs):
    """Add du[t]·z[t-k], k = 0 … K-1, and du[t] itself, to partial sums over time: a tuple of K+1 [C/2,BC]."""
    out = ()
    for k in tl.static_range(len(xs)):
        out = out + (totals[k] + fold(du * xs[k]),)
    return out + (totals[len(xs)] + fold(du),)


@triton.jit
def store_taps(sums, totals, row: tl.constexpr, D: tl.constexpr, place, mine):
    """Store what ``add_taps`` summed for block ``row`` of the short filter, the oldest tap first, then its bias."""
    K: tl.constexpr = len(totals) - 1
    for k in tl.static_range(K):
        tl.store(sums + (row * K + K - 1 - k) * D + place, tl.sum(totals[k], axis=0), mask=mine)
    tl.store(sums + (3 * K + row) * D + place, tl.sum(totals[K], axis=0), mask=mine)


@triton.jit(do_not_specialize=["T", "run"])
def explicit_backward_kernel(z, dy, weight, bias, taps, skip, short, long, keep, ages, docs, dlong, buffer,
                             dz, sums, dshort_in, dlong_in, T, run,
                             D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
                             C: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr, TERMS: tl.constexpr,
                             TYPE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                             HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr,
                             HAS_RESET: tl.constexpr, HAS_DLONG: tl.constexpr,
                             PARAMETERS: tl.constexpr):  # fmt: skip
    """All gradients but that of the taps. Grid: (blocks of channels, runs of time, rows).

    Every program has a piece of ``buffer`` [3·C,3,BC] in the dtype of z. ``sums`` [B,runs,3K+4,D]: the short filter's
    taps block by block, the oldest first, the three biases, skip. ``dlong`` is the gradient of the state after z; that
    of the short filter's state is the launcher's.
    """
    BLOCKS: tl.constexpr = (WIDTH + BC - 1) // BC
    WHOLE: tl.constexpr = WIDTH % BC == 0
    S: tl.constexpr = K - 1
    group = tl.program_id(0) // BLOCKS
    place = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)[None, :]
    channel = group * WIDTH + place
    inside = place < WIDTH
    row = tl.program_id(2).to(tl.int64)
    program = (row * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    buffer += program * (9 * C * BC)
    z += row * T * 3 * D
    dz += row * T * 3 * D
    dy += row * T * D
    short += row * S * 3 * D
    long += row * D * (W - 1)
    dlong += row * D * (W - 1)
    keep += row * T
    ages += row * T
    docs += row * T
    taps2, off2 = load_taps(weight, bias, channel, inside, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    gain = tl.zeros_like(off0)
    if HAS_SKIP:
        gain = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    matrices = ()
    turned = ()
    for d in tl.static_range(BACK + 1):
        matrices = matrices + (load_toeplitz(taps + group * W, d, W, C, TERMS, TYPE, False),)
        turned = turned + (load_toeplitz(taps + group * W, d, W, C, TERMS, TYPE, True),)

    first = tl.program_id(1).to(tl.int64) * run * C
    after = tl.minimum(first + run * C, (tl.cast(T, tl.int64) + C - 1) // C * C)  # the chunk behind the run
    column = tl.arange(0, BC)[None, :]
    later = ()  # dg of the chunks behind the one that is next
    for d in tl.static_range(1, BACK + 1):
        t = after + d * C + tl.arange(0, C)[:, None].to(tl.int64)
        u2, _ = filter_inputs(z, short, keep, ages, taps2, off2, t, T, channel, inside, D, WHOLE, HAS_SHORT, HAS_MASK,
                              HAS_RESET)  # fmt: skip
        slope = tl.load(dy + t * D + channel, mask=(t < T) & inside, other=0.0).to(tl.float32)
        later = later + ((slope * u2).to(TYPE),)
    ws = ()  # w of the chunk that is next, and of those before it but one
    for d in tl.static_range(BACK):
        w = gated(z, short, long, keep, ages, taps1, off1, taps0, off0, after - d * C, T, channel, inside, D, W, C,
                  TYPE, WHOLE, HAS_SHORT, HAS_LONG, HAS_MASK, HAS_RESET)  # fmt: skip
        ws = ws + (w.to(TYPE),)
    dgain = tl.zeros((C // 2, BC), tl.float32)
    dtaps2 = ()
    dtaps1 = ()
    dtaps0 = ()
    if PARAMETERS:
        for _ in tl.static_range(K + 1):
            dtaps2 = dtaps2 + (dgain,)
            dtaps1 = dtaps1 + (dgain,)
            dtaps0 = dtaps0 + (dgain,)
    for back in range(0, tl.cdiv(after - first, C) + 1):
        start = after - back * C
        t = start + tl.arange(0, C)[:, None].to(tl.int64)
        earliest = gated(z, short, long, keep, ages, taps1, off1, taps0, off0, start - BACK * C, T, channel, inside, D,
                         W, C, TYPE, WHOLE, HAS_SHORT, HAS_LONG, HAS_MASK, HAS_RESET)  # fmt: skip
        ws = ws + (earliest.to(TYPE),)
        u2, x2 = filter_inputs(z, short, keep, ages, taps2, off2, t, T, channel, inside, D, WHOLE, HAS_SHORT, HAS_MASK,
                               HAS_RESET)  # fmt: skip
        u1, x1 = filter_inputs(z + D, short + D, keep, ages, taps1, off1, t, T, channel, inside, D, WHOLE, HAS_SHORT,
                               HAS_MASK, HAS_RESET)  # fmt: skip
        u0, x0 = filter_inputs(z + 2 * D, short + 2 * D, keep, ages, taps0, off0, t, T, channel, inside, D, WHOLE,
                               HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
        live = t < T
        if not WHOLE:
            live = live & inside
        slope = tl.load(dy + t * D + channel, mask=live, other=0.0).to(tl.float32)
        dg = slope * u2
        dgs = (dg.to(TYPE),) + later
        if HAS_RESET:
            g = tl.zeros((C, BC), tl.float32)
            dw = tl.zeros((C, BC), tl.float32)
            if start < T:
                g = convolve_chunks(matrices, ws, docs, start, T, C, 1, HAS_RESET)
                dw = spread_chunks(turned, dgs, docs, start, T, C, HAS_RESET)
        else:
            g = convolve_chunks(matrices, ws, docs, start, T, C, 1, HAS_RESET)
            dw = spread_chunks(turned, dgs, docs, start, T, C, HAS_RESET)
        w = u1 * u0
        g = tl.fma(gain, w, g)
        dw = tl.fma(gain, dg, dw)
        if HAS_DLONG:
            kept = live & (t > T - W)
            if HAS_RESET:
                kept = kept & (tl.load(docs + t, mask=t < T, other=-1) == tl.load(docs + T - 1))
            dw += tl.load(dlong + channel * (W - 1) + t - T + W - 1, mask=kept & inside, other=0.0)
        du2 = slope * g
        du1 = dw * u0
        du0 = dw * u1
        if HAS_MASK:
            real = tl.load(keep + t, mask=t < T, other=0) != 0
            du2 = tl.where(real, du2, 0.0)
            du1 = tl.where(real, du1, 0.0)
            du0 = tl.where(real, du0, 0.0)
        du2 = tl.where(live, du2, 0.0)
        du1 = tl.where(live, du1, 0.0)
        du0 = tl.where(live, du0, 0.0)
        at = t % (3 * C)
        place_of = buffer + at * (3 * BC) + column
        tl.store(place_of, du2.to(dz.dtype.element_ty))
        tl.store(place_of + BC, du1.to(dz.dtype.element_ty))
        tl.store(place_of + 2 * BC, du0.to(dz.dtype.element_ty))
        tl.debug_barrier()
        if back > 0:
            if PARAMETERS:
                dtaps2 = add_taps(dtaps2, du2, x2)
                dtaps1 = add_taps(dtaps1, du1, x1)
                dtaps0 = add_taps(dtaps0, du0, x0)
                dgain += fold(dg * w)
            dz2 = spread_inputs(buffer, ages, taps2, at, t, T, column, C, BC, HAS_RESET)
            dz1 = spread_inputs(buffer + BC, ages, taps1, at, t, T, column, C, BC, HAS_RESET)
            dz0 = spread_inputs(buffer + 2 * BC, ages, taps0, at, t, T, column, C, BC, HAS_RESET)
            if HAS_MASK:
                real = tl.load(keep + t, mask=t < T, other=0) != 0
                dz2 = tl.where(real, dz2, 0.0)
                dz1 = tl.where(real, dz1, 0.0)
                dz0 = tl.where(real, dz0, 0.0)
            out = dz + t * (3 * D) + channel
            tl.store(out, dz2.to(dz.dtype.element_ty), mask=live)
            tl.store(out + D, dz1.to(dz.dtype.element_ty), mask=live)
            tl.store(out + 2 * D, dz0.to(dz.dtype.element_ty), mask=live)
        later = dgs[:BACK]
        ws = ws[1:]

    if first == 0:
        if S > 0:  # the steps before step 0 that the short filter saw
            t = tl.arange(0, 8)[:, None].to(tl.int64) - S
            kept = (t < 0) & inside
            at = t + 3 * C
            to = dshort_in + row * (3 * D * S) + channel * S + t + S
            dz2 = spread_inputs(buffer, ages, taps2, at, t, T, column, C, BC, HAS_RESET)
            dz1 = spread_inputs(buffer + BC, ages, taps1, at, t, T, column, C, BC, HAS_RESET)
            dz0 = spread_inputs(buffer + 2 * BC, ages, taps0, at, t, T, column, C, BC, HAS_RESET)
            tl.store(to, dz2, mask=kept)
            tl.store(to + D * S, dz1, mask=kept)
            tl.store(to + 2 * D * S, dz0, mask=kept)
        for n in tl.static_range(1, BACK + 1):  # and those that the long filter saw
            start = tl.cast(0, tl.int64) - n * C
            t = start + tl.arange(0, C)[:, None].to(tl.int64)
            dw = tl.zeros((C, BC), tl.float32)
            for m in tl.static_range(BACK + 1 - n):
                dg = later[m]
                if HAS_RESET:
                    i = m * C + tl.arange(0, C)[:, None]
                    dg = tl.where(tl.load(docs + i, mask=i < T, other=-1) == 0, dg, 0.0).to(TYPE)
                dw = add_product(dw, turned[n + m], dg)
            if HAS_DLONG:
                kept = inside & (t > T - W) & (t > -W)
                if HAS_RESET:
                    kept = kept & (tl.load(docs + T - 1) == 0)
                dw += tl.load(dlong + channel * (W - 1) + t - T + W - 1, mask=kept, other=0.0)
            tl.store(dlong_in + row * D * (W - 1) + channel * (W - 1) + t + W - 1, dw, mask=inside & (t > -W))

    if PARAMETERS:
        place = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
        mine = place < WIDTH
        sums += (row * tl.num_programs(1) + tl.program_id(1)) * (3 * K + 4) * D + group * WIDTH
        store_taps(sums, dtaps2, 0, D, place, mine)
        store_taps(sums, dtaps1, 1, D, place, mine)
        store_taps(sums, dtaps0, 2, D, place, mine)
        tl.store(sums + (3 * K + 3) * D + place, tl.sum(dgain, axis=0), mask=mine)


@triton.jit(do_not_specialize=["T", "run"])
def explicit_taps_kernel(z, dy, weight, bias, short, long, keep, ages, docs, outers, dtaps, T, run,
                         D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, WIDTH: tl.constexpr,
                         C: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr, TYPE: tl.constexpr,
                         STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORT: tl.constexpr,
                         HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """The gradient of the taps: ``dtaps`` [B,runs,blocks,W]. Grid: (blocks of channels, runs of time, rows).

    Every program has a piece of ``outers`` float32 [BACK+1,C,C]. WP is W rounded up to a power of two.
    """
    BLOCKS: tl.constexpr = (WIDTH + BC - 1) // BC
    WHOLE: tl.constexpr = WIDTH % BC == 0
    group = tl.program_id(0) // BLOCKS
    place = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)[None, :]
    channel = group * WIDTH + place
    inside = place < WIDTH
    row = tl.program_id(2).to(tl.int64)
    program = (row * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    outers += program * ((BACK + 1) * C * C)
    z += row * T * 3 * D
    dy += row * T * D
    short += row * (K - 1) * 3 * D
    long += row * D * (W - 1)
    keep += row * T
    ages += row * T
    docs += row * T
    taps2, off2 = load_taps(weight, bias, channel, inside, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    first = tl.program_id(1).to(tl.int64) * run * C
    past = ()
    totals = (tl.zeros((C, C), tl.float32),)
    for d in tl.static_range(1, BACK + 1):
        w = gated(z, short, long, keep, ages, taps1, off1, taps0, off0, first - d * C, T, channel, inside, D, W, C,
                  TYPE, WHOLE, HAS_SHORT, HAS_LONG, HAS_MASK, HAS_RESET)  # fmt: skip
        past = past + (w.to(TYPE),)
        totals = totals + (tl.zeros((C, C), tl.float32),)
    for start in tl.range(first, tl.minimum(first + run * C, T), C, num_stages=STAGES):
        t = start + tl.arange(0, C)[:, None].to(tl.int64)
        u2, _ = filter_inputs(z, short, keep, ages, taps2, off2, t, T, channel, inside, D, WHOLE, HAS_SHORT, HAS_MASK,
                              HAS_RESET)  # fmt: skip
        u1, _ = filter_inputs(z + D, short + D, keep, ages, taps1, off1, t, T, channel, inside, D, WHOLE, HAS_SHORT,
                              HAS_MASK, HAS_RESET)  # fmt: skip
        u0, _ = filter_inputs(z + 2 * D, short + 2 * D, keep, ages, taps0, off0, t, T, channel, inside, D, WHOLE,
                              HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
        live = t < T
        if not WHOLE:
            live = live & inside
        slope = tl.load(dy + t * D + channel, mask=live, other=0.0).to(tl.float32)
        ws = (tl.where(t < T, u1 * u0, 0.0).to(TYPE),) + past
        totals = add_outers(totals, (slope * u2).to(TYPE), ws, docs, start, T, C, HAS_RESET)
        past = ws[:BACK]

    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for d in tl.static_range(BACK + 1):
        tl.store(outers + (d * C + i) * C + j, totals[d])
    tl.debug_barrier()
    lag = tl.arange(0, WP)
    found = tl.zeros((WP,), tl.float32)
    for step in range(C):
        for d in tl.static_range(BACK + 1):  # a tap is a diagonal
            row_of = lag - d * C + step
            at = outers + (d * C + row_of) * C + step
            found += tl.load(at, mask=(row_of >= 0) & (row_of < C), other=0.0)
    tl.store(dtaps + program * W + lag, found, mask=lag < W)
