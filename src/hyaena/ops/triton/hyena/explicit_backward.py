"""The operator with explicit taps, backward: the long filter's share, between two walks of ``direct``.

With the names of ``explicit``, and chunks as matrices [C,BC]::

    g[c]  = Σ_d A_d  w[c-d] + skip·w          its output, for the gradient of x2
    dw[c] = Σ_d A_dᵀ dg[c+d] + skip·dg        dg = dy·u2, and the gradient of w
    dA_d  = Σ_c dg[c] w[c-d]ᵀ                 a tap's gradient is the sum of its diagonal

A walk through time writes w and dg in the dtype of z, this kernel turns them into g and dw, and a walk back makes the
gradients of z and of the short filter of those. That moves 19 numbers a token and channel where one kernel for all
would move 7, and is still faster than that one was: it has the registers for neither. A program goes through its run
chunk by chunk; sums of gradients are its own, and the launcher's over programs: no atomics, the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.hyena.explicit import add_product, convolve_chunks, load_toeplitz


@triton.jit
def load_chunk(x, start, T, channel, inside, D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """Steps start … start+C-1 of x [T,D], zero before the first and after the last: [C,BC]."""
    t = start + tl.arange(0, C)[:, None].to(tl.int64)
    here = (t >= 0) & (t < T)
    if not WHOLE:
        here = here & inside
    return tl.load(x + t * D + channel, mask=here, other=0.0)


@triton.jit
def load_past(w, long, start, T, channel, inside, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
              WHOLE: tl.constexpr, HAS_LONG: tl.constexpr):  # fmt: skip
    """``load_chunk`` of w, which before step 0 is the state [D,W-1]."""
    x = load_chunk(w, start, T, channel, inside, D, C, WHOLE).to(tl.float32)
    if HAS_LONG:
        t = start + tl.arange(0, C)[:, None]
        x += tl.load(long + channel * (W - 1) + t + (W - 1), mask=inside & (t < 0) & (t > -W), other=0.0)
    return x


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
def window_gradient(dlong, docs, t, T, channel, inside, W: tl.constexpr, HAS_RESET: tl.constexpr):
    """The gradient of w at steps t, which may lie before step 0, by the state after z."""
    kept = inside & (t < T) & (t > T - W)
    if HAS_RESET:
        kept = kept & (tl.load(docs + t, mask=(t >= 0) & (t < T), other=0) == tl.load(docs + T - 1))
    return tl.load(dlong + channel * (W - 1) + t - T + W - 1, mask=kept, other=0.0)


@triton.jit(do_not_specialize=["T", "run"])
def explicit_backward_kernel(w, dg, taps, skip, long, docs, dlong, outers, g, dw, dtaps, dlong_in, T, run,
                             D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
                             BC: tl.constexpr, BACK: tl.constexpr, TERMS: tl.constexpr, FACTOR: tl.constexpr,
                             STAGES: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_LONG: tl.constexpr,
                             HAS_RESET: tl.constexpr, HAS_DLONG: tl.constexpr,
                             PARAMETERS: tl.constexpr):  # fmt: skip
    """From w and dg [B,T,D] to g and dw. Grid: (blocks of channels, runs of time, rows); WP is W as a power of two.

    Every program has a piece of ``outers`` float32 [BACK+1,C,C]. ``dtaps`` is [B,runs,blocks,W]; ``dlong`` is the
    gradient of the state after z, ``dlong_in`` that of the state before it.
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
    w += row * T * D
    dg += row * T * D
    g += row * T * D
    dw += row * T * D
    long += row * D * (W - 1)
    dlong += row * D * (W - 1)
    docs += row * T
    gain = tl.zeros(channel.shape, tl.float32)
    if HAS_SKIP:
        gain = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    matrices = ()
    turned = ()
    for d in tl.static_range(BACK + 1):
        matrices = matrices + (load_toeplitz(taps + group * W, d, W, C, TERMS, FACTOR, False),)
        turned = turned + (load_toeplitz(taps + group * W, d, W, C, TERMS, FACTOR, True),)

    first = tl.program_id(1).to(tl.int64) * run * C
    past = ()  # w of the chunks before the next one, and dg of that one and those behind it, but for the last
    dgs = ()
    totals = ()
    for d in tl.static_range(BACK):
        x = load_past(w, long, first - (d + 1) * C, T, channel, inside, D, W, C, WHOLE, HAS_LONG)
        past = past + (x.to(FACTOR),)
        dgs = dgs + (load_chunk(dg, first + d * C, T, channel, inside, D, C, WHOLE).to(FACTOR),)
    if PARAMETERS:
        for _ in tl.static_range(BACK + 1):
            totals = totals + (tl.zeros((C, C), tl.float32),)
    for start in tl.range(first, tl.minimum(first + run * C, T), C, num_stages=STAGES):
        t = start + tl.arange(0, C)[:, None].to(tl.int64)
        now = load_chunk(w, start, T, channel, inside, D, C, WHOLE)
        ws = (now.to(FACTOR),) + past
        dgs = dgs + (load_chunk(dg, start + BACK * C, T, channel, inside, D, C, WHOLE).to(FACTOR),)
        written = t < T
        if not WHOLE:
            written = written & inside
        out = convolve_chunks(matrices, ws, docs, start, 0, T, C, 1, HAS_RESET)
        out = tl.fma(gain, now.to(tl.float32), out)
        tl.store(g + t * D + channel, out.to(g.dtype.element_ty), mask=written)
        out = spread_chunks(turned, dgs, docs, start, T, C, HAS_RESET)
        out = tl.fma(gain, dgs[0].to(tl.float32), out)
        if HAS_DLONG:
            out += window_gradient(dlong, docs, t, T, channel, inside, W, HAS_RESET)
        tl.store(dw + t * D + channel, out.to(dw.dtype.element_ty), mask=written)
        if PARAMETERS:
            totals = add_outers(totals, dgs[0], ws, docs, start, T, C, HAS_RESET)
        past = ws[:BACK]
        dgs = dgs[1:]

    if first == 0:  # the steps before step 0 that the filter saw
        for n in tl.static_range(1, BACK + 1):
            back = tl.zeros((C, BC), tl.float32)
            for m in tl.static_range(BACK + 1 - n):
                later = load_chunk(dg, m * C, T, channel, inside, D, C, WHOLE)
                if HAS_RESET:
                    i = m * C + tl.arange(0, C)[:, None]
                    later = tl.where(tl.load(docs + i, mask=i < T, other=-1) == 0, later, 0.0)
                back = add_product(back, turned[n + m], later.to(FACTOR))
            before = tl.arange(0, C)[:, None] - n * C
            if HAS_DLONG:
                back += window_gradient(dlong, docs, before, T, channel, inside, W, HAS_RESET)
            to = dlong_in + row * D * (W - 1) + channel * (W - 1) + before + W - 1
            tl.store(to, back, mask=inside & (before > -W))

    if PARAMETERS:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        for d in tl.static_range(BACK + 1):
            tl.store(outers + (d * C + i) * C + j, totals[d])
        tl.debug_barrier()
        lag = tl.arange(0, WP)
        found = tl.zeros((WP,), tl.float32)
        for step in range(C):
            for d in tl.static_range(BACK + 1):
                row_of = lag - d * C + step
                at = outers + (d * C + row_of) * C + step
                found += tl.load(at, mask=(row_of >= 0) & (row_of < C), other=0.0)
        tl.store(dtaps + program * W + lag, found, mask=lag < W)
