"""The operator with many explicit taps, backward in registers.

With blocks of 16 steps as in ``toeplitz``, and dg = dy·u2::

    g[b]ᵀ  = Σ_k w[b-k]ᵀ A_kᵀ      dw[b]ᵀ = Σ_k dg[b+k]ᵀ A_k
    dA_k   = Σ_b dg[b+k] w[b]ᵀ     a tap's gradient is the sum of its diagonal

One kernel walks back from the end of a run, with dg of the blocks behind and w of the blocks before in registers, and
makes the gradients of z and of the short filter; nothing between them passes through memory. Another one sums dA over
channels: ``movmatrix`` transposes blocks for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, load_blocks, load_filters, multiply, pack, pack_block


@triton.jit
def load_span(z, short, keep, start, c, T, REACH: tl.constexpr, ROW: tl.constexpr, HAS_SHORT: tl.constexpr,
              HAS_MASK: tl.constexpr):  # fmt: skip
    """A lane's words at its four steps of a block, and at the REACH steps before them.

    Zero at padding and outside the sequence; steps before 0 come from the state.
    """
    words = ()
    at = z + (tl.cast(start, tl.int64) * ROW + c * (4 * ROW))
    for i in tl.static_range(REACH + 4):
        t = start + c * 4 + (i - REACH)
        here = (t >= 0) & (t < T)
        if HAS_MASK:
            here = here & (tl.load(keep + t, mask=here, other=0) != 0)
        word = tl.load(at + (i - REACH) * ROW, mask=here, other=0)
        if HAS_SHORT:
            before = (t < 0) & (t >= -REACH)
            word = tl.where(before, tl.load(short + (t + REACH) * ROW, mask=before, other=0), word)
        words = words + (word,)
    return words


@triton.jit
def filter_span(words, filters):
    """The short filters at a lane's four steps: two tuples of 4, of the word's two channels."""
    K: tl.constexpr = len(words) - 3
    us = ()
    vs = ()
    for i in tl.static_range(4):
        u = filters[0][1]
        v = filters[1][1]
        for k in tl.static_range(K):
            u = tl.fma(filters[0][0][k], half(words[i + k], False), u)
            v = tl.fma(filters[1][0][k], half(words[i + k], True), v)
        us = us + (u,)
        vs = vs + (v,)
    return us, vs


@triton.jit
def inputs_of_filter(words1, words0, filters1, filters0, long, keep, start, c, stop, W: tl.constexpr,
                     HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """w at a lane's four steps, zero from ``stop`` on, as a left factor's two tuples; before 0 from the state."""
    even_1, odd_1 = filter_span(words1, filters1)
    even_0, odd_0 = filter_span(words0, filters0)
    even = ()
    odd = ()
    for i in tl.static_range(4):
        t = start + c * 4 + i
        here = (t >= 0) & (t < stop)
        if HAS_MASK:
            here = here & (tl.load(keep + t, mask=here, other=0) != 0)
        a = 0.0
        b = 0.0
        if HAS_LONG:
            state = (t < 0) & (t > -W)
            a = tl.load(long + t, mask=state, other=0.0)
            b = tl.load(long + t + (W - 1), mask=state, other=0.0)
        even = even + (tl.where(here, even_1[i] * even_0[i], a),)
        odd = odd + (tl.where(here, odd_1[i] * odd_0[i], b),)
    return even, odd


@triton.jit
def load_slopes(dy, keep, start, c, T, D: tl.constexpr, HAS_MASK: tl.constexpr):
    """A lane's four words of dy, zero at padding and outside the sequence, and whether the steps are neither."""
    words = ()
    kept = ()
    at = dy + (tl.cast(start, tl.int64) * (D // 2) + c * (4 * (D // 2)))
    for i in tl.static_range(4):
        t = start + c * 4 + i
        here = (t >= 0) & (t < T)
        if HAS_MASK:
            here = here & (tl.load(keep + t, mask=here, other=0) != 0)
        words = words + (tl.load(at + i * (D // 2), mask=here, other=0),)
        kept = kept + (here,)
    return words, kept


@triton.jit
def gate_back(slopes, us, ODD: tl.constexpr):
    """dg of one channel at a lane's four steps."""
    out = ()
    for i in tl.static_range(4):
        out = out + (half(slopes[i], ODD) * us[i],)
    return out


@triton.jit
def spread_block(du, later, taps, c, right, EMULATED: tl.constexpr):
    """The gradient of z at a lane's four steps from that of u; ``later`` is du of the block behind, in the first lane.

    Returns what the block before needs of this one, too.
    """
    REACH: tl.constexpr = len(later)
    every = du
    for k in tl.static_range(REACH):
        theirs = tl.where(c == 0, later[k], du[k]).to(tl.int32, bitcast=True)
        every = every + (from_lane(theirs, right, EMULATED).to(tl.float32, bitcast=True),)
    out = ()
    for i in tl.static_range(4):
        value = taps[REACH] * every[i]
        for k in tl.static_range(1, REACH + 1):
            value = tl.fma(taps[REACH - k], every[i + k], value)
        out = out + (value,)
    return out, du[:REACH]


@triton.jit
def add_lags(totals, du, words, own, ODD: tl.constexpr):
    """Add ``du[t]·z[t-k]``, k = 0 …, and du to the sums, over a lane's four steps that are ``own``."""
    REACH: tl.constexpr = len(totals) - 2
    mine = ()
    for i in tl.static_range(4):
        mine = mine + (tl.where(own[i], du[i], 0.0),)
    out = ()
    for k in tl.static_range(REACH + 1):
        total = totals[k]
        for i in tl.static_range(4):
            total = tl.fma(mine[i], half(words[REACH + i - k], ODD), total)
        out = out + (total,)
    return out + (totals[REACH + 1] + (mine[0] + mine[1] + mine[2] + mine[3]),)


@triton.jit
def transpose(x, EMULATED: tl.constexpr):
    """A matrix 8 × 8 of bfloat16, transposed: a lane (g, c) has row g, columns 2c and 2c+1."""
    if EMULATED:
        lane = tl.arange(0, x.shape[0])
        row = lane % 32 // 4
        source = lane // 32 * 32 + lane % 4 * 8 + row // 2
        low = tl.gather(x, source, 0).to(tl.uint32, bitcast=True)
        high = tl.gather(x, source + 4, 0).to(tl.uint32, bitcast=True)
        low = tl.where(row % 2 == 1, low >> 16, low & 0xFFFF)
        high = tl.where(row % 2 == 1, high & 0xFFFF0000, high << 16)
        out = (low | high).to(tl.int32, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit(do_not_specialize=["T", "run"])
def toeplitz_taps_kernel(z, dy, weight, bias, short, long, keep, outers, T, run, D: tl.constexpr, K: tl.constexpr,
                         W: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, HAS_BIAS: tl.constexpr,
                         HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr,
                         EMULATED: tl.constexpr):  # fmt: skip
    """The sums of dA. Grid and arguments as of the forward kernel.

    ``outers`` float32 [B,runs,blocks of 16 channels,PAST+1,8,32]: the sums of dA_k as lanes have them.
    """
    PAST: tl.constexpr = (W + 14) // 16
    ROW: tl.constexpr = 3 * D // 2
    lane = tl.arange(0, 32 * WARPS)
    c = lane % 4
    unit = tl.program_id(0) * WARPS + lane // 32
    word = unit * 8 + lane % 32 // 4
    row = tl.program_id(2).to(tl.int64)
    outers += ((row * tl.num_programs(1) + tl.program_id(1)) * (D // 16) + unit) * ((PAST + 1) * 256) + lane % 32
    z_2, z_1, z_0 = thirds(z + row * T * ROW + word, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW + word, ROW)
    dy += row * T * (D // 2) + word
    long += row * D * (W - 1) + word * 2 * (W - 1) + (W - 1)
    keep += row * T
    T = tl.cast(T, tl.int32)
    first = tl.program_id(1) * run
    stop = tl.minimum(first + run, T)
    last = tl.minimum(stop + 16 * PAST, T)
    lowest = first
    if first == 0:  # the steps before z, for the state
        lowest = -16 * PAST
    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    turned = ()  # dg of the blocks behind, the nearest first, transposed
    sums = ()
    for _ in tl.static_range(4 * PAST):
        turned = turned + (tl.zeros_like(word),)
    for _ in tl.static_range(8 * (PAST + 1)):
        sums = sums + (tl.zeros_like(filters2[0][1]),)
    rounds = (last - lowest + 15) // 16
    for back in tl.range(0, rounds, num_stages=1):
        start = lowest + (rounds - 1 - back) * 16
        slopes, _kept = load_slopes(dy, keep, start, c, T, D, HAS_MASK)
        words2 = load_span(z_2, short_2, keep, start, c, T, K - 1, ROW, HAS_SHORT, HAS_MASK)
        words1 = load_span(z_1, short_1, keep, start, c, stop, K - 1, ROW, HAS_SHORT, HAS_MASK)
        words0 = load_span(z_0, short_0, keep, start, c, stop, K - 1, ROW, HAS_SHORT, HAS_MASK)
        even_2, odd_2 = filter_span(words2, filters2)
        now = pack_block(gate_back(slopes, even_2, False), gate_back(slopes, odd_2, True), EMULATED)
        even_w, odd_w = inputs_of_filter(words1, words0, filters1, filters0, long, keep, start, c, stop, W, HAS_LONG,
                                         HAS_MASK)  # fmt: skip
        w = pack_block(even_w, odd_w, EMULATED)
        low = (transpose(w[0], EMULATED), transpose(w[1], EMULATED))
        high = (transpose(w[2], EMULATED), transpose(w[3], EMULATED))
        turned = (
            transpose(now[0], EMULATED),
            transpose(now[2], EMULATED),
            transpose(now[1], EMULATED),
            transpose(now[3], EMULATED),
        ) + turned
        added = ()
        for k in tl.static_range(PAST + 1):
            dg = turned[4 * k : 4 * k + 4]
            added = added + multiply(dg, low, sums[8 * k : 8 * k + 4], EMULATED)
            added = added + multiply(dg, high, sums[8 * k + 4 : 8 * k + 8], EMULATED)
        sums = added
        turned = turned[: 4 * PAST]
    for i in tl.static_range(8 * (PAST + 1)):
        tl.store(outers + i * 32, sums[i])


@triton.jit
def slot(step):
    """Where a step of a block stands among the 16 of a factor."""
    return step // 4 * 2 + step % 2 + step % 4 // 2 * 8


@triton.jit
def toeplitz_diagonals_kernel(outers, dtaps, W: tl.constexpr, WP: tl.constexpr):
    """``dtaps`` [F,W], the diagonals of ``outers`` [F,PAST+1,8,32]. Grid: (F,); WP is W as a power of two."""
    PAST: tl.constexpr = (W + 14) // 16
    lag = tl.arange(0, WP)[:, None]
    later = tl.arange(0, 16)[None, :]
    earlier = (later + 16 - lag % 16) % 16
    block = (lag + earlier - later) // 16
    row = slot(later)
    column = slot(earlier)
    value = column // 8 * 4 + row // 8 * 2 + column % 2
    at = outers + tl.program_id(0) * ((PAST + 1) * 256) + block * 256 + value * 32 + row % 8 * 4 + column % 8 // 2
    total = tl.sum(tl.load(at, mask=lag < W, other=0.0), axis=1)
    lag = tl.arange(0, WP)
    tl.store(dtaps + tl.program_id(0) * W + lag, total, mask=lag < W)


@triton.jit(do_not_specialize=["T", "run"])
def toeplitz_gradients_kernel(z, dy, weight, bias, taps, skip, short, long, keep, dz, sums, dshort_in, dlong_in, T,
                              run, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
                              WARPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                              HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr,
                              PARAMETERS: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The gradients of z, of both states and of the short filter. Grid and arguments as of the forward kernel.

    ``dz`` is in words, ``dshort_in`` float32 [B,3D,K-1], ``dlong_in`` [B,D,W-1], ``sums`` [B,runs,4,3K+4,D] as
    ``direct_backward`` has them, with a place for each of the lanes that share a word.
    """
    PAST: tl.constexpr = (W + 14) // 16
    REACH: tl.constexpr = K - 1
    ROW: tl.constexpr = 3 * D // 2
    n: tl.constexpr = 3 * (K + 1) + 1  # sums of a channel
    m: tl.constexpr = 3 * REACH
    lane = tl.arange(0, 32 * WARPS)
    g = lane % 32 // 4
    c = lane % 4
    right = lane % 32 // 4 * 4 + (c + 1) % 4  # the lane whose steps come next
    word = (tl.program_id(0) * WARPS + lane // 32) * 8 + g
    row = tl.program_id(2).to(tl.int64)
    z_2, z_1, z_0 = thirds(z + row * T * ROW + word, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW + word, ROW)
    dy += row * T * (D // 2) + word
    dz += row * T * ROW + word
    long += row * D * (W - 1) + word * 2 * (W - 1) + (W - 1)
    dlong_in += row * D * (W - 1) + word * 2 * (W - 1) + (W - 1)
    dshort_in += (row * 3 * D + word * 2) * REACH + REACH
    keep += row * T
    T = tl.cast(T, tl.int32)
    first = tl.program_id(1) * run
    stop = tl.minimum(first + run, T)
    lowest = first
    if first == 0:  # the steps before z, for the states
        lowest = -16 * PAST
    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    none = tl.zeros_like(filters2[0][1])
    gains = (none, none)
    if HAS_SKIP:
        gains = (tl.load(skip + word * 2).to(tl.float32), tl.load(skip + word * 2 + 1).to(tl.float32))
    blocks = load_blocks(taps + word * 2 // WIDTH * W, g, c, W, PAST + 1, False, EMULATED)
    turned = load_blocks(taps + word * 2 // WIDTH * W, g, c, W, PAST + 1, True, EMULATED)
    past = ()  # w from PAST blocks before the current one on, as left factors
    dgs = ()  # dg of the blocks behind, the nearest first
    for _ in tl.static_range(4 * PAST):
        past = past + (tl.zeros_like(word),)
        dgs = dgs + (tl.zeros_like(word),)
    later = ()
    for _ in tl.static_range(6 * REACH):
        later = later + (none,)
    totals = ()
    if PARAMETERS:
        for _ in tl.static_range(6 * (K + 1) + 2):
            totals = totals + (none,)

    # the block behind the run is part of its gradients, and the filter reaches PAST blocks further
    ends = (stop - lowest + 15) // 16
    if stop < T:
        ends += 1
    for back in tl.range(0, ends + PAST, num_stages=1):
        start = lowest + (ends + PAST - 1 - back) * 16
        slopes, kept = load_slopes(dy, keep, start, c, T, D, HAS_MASK)
        words2 = load_span(z_2, short_2, keep, start, c, T, REACH, ROW, HAS_SHORT, HAS_MASK)
        words1 = load_span(z_1, short_1, keep, start, c, T, REACH, ROW, HAS_SHORT, HAS_MASK)
        words0 = load_span(z_0, short_0, keep, start, c, T, REACH, ROW, HAS_SHORT, HAS_MASK)
        early = start - 16 * PAST
        early1 = load_span(z_1, short_1, keep, early, c, T, REACH, ROW, HAS_SHORT, HAS_MASK)
        early0 = load_span(z_0, short_0, keep, early, c, T, REACH, ROW, HAS_SHORT, HAS_MASK)
        low = (none, none, none, none)
        high = (none, none, none, none)
        out = (none, none, none, none)
        more = (none, none, none, none)
        for k in tl.static_range(1, PAST + 1):
            factor = dgs[4 * k - 4 : 4 * k]
            out = multiply(factor, turned[4 * k : 4 * k + 2], out, EMULATED)
            more = multiply(factor, turned[4 * k + 2 : 4 * k + 4], more, EMULATED)
        for k in tl.static_range(PAST):
            w = past[4 * (PAST - 1 - k) : 4 * (PAST - k)]
            low = multiply(w, blocks[4 * k : 4 * k + 2], low, EMULATED)
            high = multiply(w, blocks[4 * k + 2 : 4 * k + 4], high, EMULATED)
        even_w, odd_w = inputs_of_filter(early1, early0, filters1, filters0, long, keep, early, c, T, W, HAS_LONG,
                                         HAS_MASK)  # fmt: skip
        w = pack_block(even_w, odd_w, EMULATED)
        low = multiply(w, blocks[4 * PAST : 4 * PAST + 2], low, EMULATED)
        high = multiply(w, blocks[4 * PAST + 2 : 4 * PAST + 4], high, EMULATED)
        past = (w + past)[: 4 * PAST]

        us2 = filter_span(words2, filters2)
        us1 = filter_span(words1, filters1)
        us0 = filter_span(words0, filters0)
        even_dg = gate_back(slopes, us2[0], False)
        odd_dg = gate_back(slopes, us2[1], True)
        now = pack_block(even_dg, odd_dg, EMULATED)
        out = multiply(now, turned[:2], out, EMULATED)
        more = multiply(now, turned[2:4], more, EMULATED)
        dgs = (now + dgs)[: 4 * PAST]
        if start < 0:
            for i in tl.static_range(4):
                t = start + c * 4 + i
                dws = (out[0], out[1], more[0], more[1])
                tl.store(dlong_in + t, dws[i], mask=(t > -W) & (t < 0))
                dws = (out[2], out[3], more[2], more[3])
                tl.store(dlong_in + t + (W - 1), dws[i], mask=(t > -W) & (t < 0))
        own = ()
        for i in tl.static_range(4):
            t = start + c * 4 + i
            own = own + ((t >= first) & (t < stop),)
        results = ()
        after = ()
        added = ()
        for odd in tl.static_range(2):
            gs = (low[0], low[1], high[0], high[1])
            dws = (out[0], out[1], more[0], more[1])
            dg = even_dg
            if odd == 1:
                gs = (low[2], low[3], high[2], high[3])
                dws = (out[2], out[3], more[2], more[3])
                dg = odd_dg
            du2 = ()
            du1 = ()
            du0 = ()
            gain = none
            for i in tl.static_range(4):
                u1 = us1[odd][i]
                u0 = us0[odd][i]
                w_now = u1 * u0
                dw = tl.where(kept[i], tl.fma(gains[odd], dg[i], dws[i]), 0.0)
                du2 = du2 + (half(slopes[i], odd == 1) * tl.fma(gains[odd], w_now, gs[i]),)
                du1 = du1 + (dw * u0,)
                du0 = du0 + (dw * u1,)
                gain += tl.where(own[i], dg[i] * w_now, 0.0)
            if PARAMETERS:
                sum2 = totals[odd * n : odd * n + K + 1]
                sum1 = totals[odd * n + K + 1 : odd * n + 2 * (K + 1)]
                sum0 = totals[odd * n + 2 * (K + 1) : odd * n + 3 * (K + 1)]
                added = added + add_lags(sum2, du2, words2, own, odd == 1)
                added = added + add_lags(sum1, du1, words1, own, odd == 1)
                added = added + add_lags(sum0, du0, words0, own, odd == 1)
                added = added + (totals[odd * n + n - 1] + gain,)
            out2, behind2 = spread_block(du2, later[odd * m : odd * m + REACH], filters2[odd][0], c, right, EMULATED)
            out1, behind1 = spread_block(du1, later[odd * m + REACH : odd * m + 2 * REACH], filters1[odd][0], c, right,
                                         EMULATED)  # fmt: skip
            out0, behind0 = spread_block(du0, later[odd * m + 2 * REACH : odd * m + m], filters0[odd][0], c, right,
                                         EMULATED)  # fmt: skip
            results = results + out2 + out1 + out0
            after = after + behind2 + behind1 + behind0
        later = after
        totals = added
        to = dz + (tl.cast(start, tl.int64) * ROW + c * (4 * ROW))
        for third in tl.static_range(3):
            for i in tl.static_range(4):
                a = results[4 * third + i]
                b = results[12 + 4 * third + i]
                if HAS_MASK:
                    a = tl.where(kept[i], a, 0.0)
                    b = tl.where(kept[i], b, 0.0)
                tl.store(to + i * ROW + third * (ROW // 3), pack(a, b, EMULATED), mask=own[i])
        if start == -16:
            for third in tl.static_range(3):
                for i in tl.static_range(4):
                    t = start + c * 4 + i
                    at = dshort_in + (third * D * REACH + t)
                    tl.store(at, results[4 * third + i], mask=t >= -REACH)
                    tl.store(at + REACH, results[12 + 4 * third + i], mask=t >= -REACH)

    if PARAMETERS:
        sums += ((row * tl.num_programs(1) + tl.program_id(1)) * 4 + c) * ((3 * K + 4) * D) + word * 2
        for odd in tl.static_range(2):
            for third in tl.static_range(3):
                for k in tl.static_range(K):
                    tl.store(sums + ((third * K + k) * D + odd), totals[odd * n + third * (K + 1) + k])
                tl.store(sums + ((3 * K + third) * D + odd), totals[odd * n + third * (K + 1) + K])
            tl.store(sums + ((3 * K + 3) * D + odd), totals[odd * n + n - 1])
