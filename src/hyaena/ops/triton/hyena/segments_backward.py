"""The operator with many modes, backward, as products in registers; lanes, tiles and factors as in ``segments``.

With dg = dy·u2, and b the conjugate of the gradient of the state after a segment, divided by the residue::

    b[m-1] = q b[m] + Σ_i p^(i+1) dg[m,i]
    dw[m,j] = Σ_{i>=j} h[i-j] dg[m,i] + Re r p^(15-j) b[m]

A kernel walks back through time, tile by tile; it finds g of a tile anew, from the state before it, which the forward
kernel saves with SAVE. The parameters' gradients need four sums over segments::

    P[i,j] = Σ dg[m,i] w[m,j]     X[i] = Σ w[m,i] b[m]     Y[i] = Σ dg[m,i] s[m]     Z = Σ b[m] s[m]

P, X and Y are products whose inner axis is the segment: their factors are those of the other products, turned by
``movmatrix``. A second kernel makes the gradients of poles and residues of them, with c[t] = Σ_i P[i+t,i]::

    conj dr = Σ_t p^t c[t] + Σ_i p^(i+1) Y[i]
    conj dp = r (Σ_t t p^(t-1) c[t] + Σ_i (i+1) p^i Y[i] + Σ_i (15-i) p^(14-i) X[i] + 16 p^15 Z)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import convolve, power
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.forward import move
from hyaena.ops.triton.hyena.segments import (
    find_states,
)
from hyaena.ops.triton.hyena.segments_lanes import (
    TILE,
    add_later,
    as_factors,
    first_to_last,
    from_lanes,
    lane_after,
    load_before_tile,
    load_tile,
    multiply_terms,
    products,
    split,
    sum_columns,
    tile_steps,
    to_lanes,
    turn,
)
from hyaena.ops.triton.hyena.segments_tables import (
    load_entry,
    load_leaves,
    load_terms,
    read_decays,
)
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, load_filters, multiply, pack


@triton.jit
def find_adjoints(dg, enter, decays, carry, lane, REAL: tl.constexpr, EMULATED: tl.constexpr):
    """b of a lane's two segments, for four modes: re, im of both; and b before the tile.

    ``carry`` is b of the last segment, in the last four lanes, zero in the others; the rest as in ``find_states``.
    """
    none = tl.zeros_like(carry[0])
    a, b, c, d = multiply_terms(dg, enter, (none, none, none, none), EMULATED)
    re, im = move(decays[0], c, d, a, b, REAL)
    re, im = move(decays[1], carry[0], carry[1], re, im, REAL)
    for k in tl.static_range(3):
        re, im = add_later(decays[k + 1], re, im, tl.full(lane.shape, 4 << k, tl.int32), lane, REAL, EMULATED)
    second_re = lane_after(re, carry[0], lane, EMULATED)
    second_im = lane_after(im, carry[1], lane, EMULATED)
    re = first_to_last(re, lane, EMULATED)
    im = first_to_last(im, lane, EMULATED)
    before = move(decays[4], carry[0], carry[1], re, im, REAL)
    first = move(decays[0], second_re, second_im, c, d, REAL)
    return (first[0], first[1], second_re, second_im), before


@triton.jit
def histories(words, before, lane, EMULATED: tl.constexpr):
    """The words of the steps before each of a lane's two segments; ``before`` as in ``segments.filter_segments``."""
    REACH: tl.constexpr = len(before)
    last = lane % 4 == 3
    first = ()
    second = ()
    for k in tl.static_range(REACH):
        theirs = tl.where(last, words[8 - REACH + k], words[4 - REACH + k])
        first = first + (from_lane(tl.where(lane == 31, before[k], theirs), (lane + 31) % 32, EMULATED),)
        theirs = tl.where(last, words[4 - REACH + k], words[8 - REACH + k])
        second = second + (from_lane(theirs, lane // 4 * 4 + (lane + 3) % 4, EMULATED),)
    return first, second


@triton.jit
def halves(words, ODD: tl.constexpr):
    """One of the two numbers of every word."""
    out = ()
    for i in tl.static_range(len(words)):
        out = out + (half(words[i], ODD),)
    return out


@triton.jit
def filter_channel(words, past, filter, ODD: tl.constexpr):
    """The short filter of one of a word's channels at a lane's eight steps."""
    out = ()
    for h in tl.static_range(2):
        history = halves(past[h], ODD)
        for i in tl.static_range(4):
            u, history = convolve(filter[0], filter[1], history, half(words[4 * h + i], ODD))
            out = out + (u,)
    return out


@triton.jit
def add_filter_gradient(sums, du, words, past, ODD: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Add a lane's share of the gradient of a short filter's taps, and of its bias."""
    K: tl.constexpr = len(past[0]) + 1
    every = (halves(past[0], ODD) + halves(words[0:4], ODD), halves(past[1], ODD) + halves(words[4:8], ODD))
    out = ()
    for k in tl.static_range(K):
        total = sums[k]
        for i in tl.static_range(8):
            total = tl.fma(du[i], every[i // 4][i % 4 + k], total)
        out = out + (total,)
    if HAS_BIAS:
        total = sums[K]
        for i in tl.static_range(8):
            total += du[i]
        out = out + (total,)
    return out


@triton.jit
def filter_back(du, later, taps, lane, EMULATED: tl.constexpr):
    """The gradient of a short filter's input; ``later``: du of the first steps of the next tile, right in lane 0."""
    REACH: tl.constexpr = len(later)
    first = du[0:4]
    second = du[4:8]
    for k in tl.static_range(REACH):
        theirs = tl.where(lane % 4 == 0, du[4 + k], du[k]).to(tl.int32, bitcast=True)
        theirs = from_lane(theirs, lane // 4 * 4 + (lane + 1) % 4, EMULATED)
        first = first + (theirs.to(tl.float32, bitcast=True),)
        theirs = tl.where(lane == 0, later[k], tl.where(lane % 4 == 0, du[k], du[4 + k])).to(tl.int32, bitcast=True)
        theirs = from_lane(theirs, (lane + 1) % 32, EMULATED)
        second = second + (theirs.to(tl.float32, bitcast=True),)
    every = (first, second)
    out = ()
    for i in tl.static_range(8):
        x = taps[REACH] * every[i // 4][i % 4]
        for k in tl.static_range(REACH):
            x = tl.fma(taps[REACH - 1 - k], every[i // 4][i % 4 + 1 + k], x)
        out = out + (x,)
    return out


@triton.jit
def store_sum(to, x, WORDS: tl.constexpr, STEP: tl.constexpr):
    """Store the sum over each warp's lanes, STEP numbers apart."""
    total = tl.sum(tl.reshape(x, (WORDS, 32)), axis=1)
    tl.store(to + tl.arange(0, WORDS) * STEP, total)


@triton.jit
def store_tile(to, start, T, first, even, odd, ROW: tl.constexpr, WORDS: tl.constexpr, EMULATED: tl.constexpr):
    """A lane's eight numbers of both channels to a tile of words."""
    out = ()
    for i in tl.static_range(8):
        out = out + (pack(even[i], odd[i], EMULATED),)
    step = tile_steps()[:, None]
    at = to + tl.cast(start, tl.int64) * ROW + step * ROW + (first + tl.arange(0, WORDS)[None, :])
    tl.store(at, from_lanes(out), mask=start + step < T)


@triton.jit
def zeros(COUNT: tl.constexpr, like):
    """So many tensors of float32 zeros."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros(like.shape, tl.float32),)
    return out


@triton.jit(do_not_specialize=["T"])
def segments_backward_kernel(z, dy, weight, bias, tables, decays, states, dz, of_filters, outers, of_w, of_g,
                             of_states, T, REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                             WORDS: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
                             PARAMETERS: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The gradient of z, and the sums that those of the parameters are made of. Grid: (blocks of WORDS words, rows).

    ``z``, ``dy`` and ``dz`` are in words of two numbers; ``states`` [B,tiles,D,N,2] precede the tiles. Sums, float32:
    ``of_filters`` [B,K+1,3D], ``outers`` P [B,D,16,16], ``of_w`` X and ``of_g`` Y [B,D,16,N,2], ``of_states`` Z
    [B,D,N,2].
    """
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    BLOCKS: tl.constexpr = (QUADS + 1) // 2
    ENTRIES: tl.constexpr = 1 + QUADS + (QUADS if QUADS > 1 else 1)
    SUMS: tl.constexpr = K + 1 if HAS_BIAS else K
    index = tl.arange(0, 32 * WORDS)
    lane = index % 32
    first = tl.program_id(0) * WORDS
    word = first + index // 32
    row = tl.program_id(1).to(tl.int64)
    z_2, z_1, z_0 = thirds(z + row * T * ROW, ROW)
    dz_2, dz_1, dz_0 = thirds(dz + row * T * ROW, ROW)
    dy += row * T * (D // 2)
    T = tl.cast(T, tl.int32)
    tiles = (T + TILE - 1) // TILE
    states += row * tiles * D * N * 2

    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    none = tl.zeros(lane.shape, tl.float32)
    carry = zeros(4 * QUADS, lane)
    later = zeros(6 * (K - 1), lane)
    filter_sums = zeros(6 * SUMS if PARAMETERS else 0, lane)
    outer_sums = zeros(16 if PARAMETERS else 0, lane)
    w_sums = zeros(8 * QUADS if PARAMETERS else 0, lane)
    g_sums = zeros(8 * QUADS if PARAMETERS else 0, lane)
    state_sums = zeros(4 * QUADS if PARAMETERS else 0, lane)
    if STAGES == 1:
        start = (tiles - 1) * TILE
        next1 = load_tile(z_1, start, T, first, z, ROW, WORDS, False, True)
        next0 = load_tile(z_0, start, T, first, z, ROW, WORDS, False, True)
        next2 = load_tile(z_2, start, T, first, z, ROW, WORDS, False, True)
        next_dy = load_tile(dy, start, T, first, z, D // 2, WORDS, False, True)
    for back in tl.range(0, tiles, num_stages=STAGES):
        start = (tiles - 1 - back) * TILE
        at_states = states + tl.cast(start // TILE, tl.int64) * (D * N * 2)
        given = ()
        for e in tl.static_range(2):
            for q in tl.static_range(QUADS):
                mode = 4 * q + lane % 4
                at = at_states + ((word * 2 + e) * N + mode) * 2
                given = given + (
                    (
                        tl.load(at, mask=(lane < 4) & (mode < N), other=0.0),
                        tl.load(at + 1, mask=(lane < 4) & (mode < N), other=0.0),
                    ),
                )
        before2 = load_before_tile(z_2 + word, z, z, start, K - 1, ROW, False, False)
        before1 = load_before_tile(z_1 + word, z, z, start, K - 1, ROW, False, False)
        before0 = load_before_tile(z_0 + word, z, z, start, K - 1, ROW, False, False)
        if STAGES == 1:
            tile1 = next1
            tile0 = next0
            tile2 = next2
            tile_dy = next_dy
            ahead = tl.maximum(start - TILE, 0)
            next1 = load_tile(z_1, ahead, T, first, z, ROW, WORDS, False, True)
            next0 = load_tile(z_0, ahead, T, first, z, ROW, WORDS, False, True)
            next2 = load_tile(z_2, ahead, T, first, z, ROW, WORDS, False, True)
            next_dy = load_tile(dy, ahead, T, first, z, D // 2, WORDS, False, True)
        else:
            tile1 = load_tile(z_1, start, T, first, z, ROW, WORDS, False)
            tile0 = load_tile(z_0, start, T, first, z, ROW, WORDS, False)
            tile2 = load_tile(z_2, start, T, first, z, ROW, WORDS, False)
            tile_dy = load_tile(dy, start, T, first, z, D // 2, WORDS, False)
        words1 = to_lanes(tile1)
        words0 = to_lanes(tile0)
        words2 = to_lanes(tile2)
        dys = to_lanes(tile_dy)
        past2 = histories(words2, before2, lane, EMULATED)
        past1 = histories(words1, before1, lane, EMULATED)
        past0 = histories(words0, before0, lane, EMULATED)
        dxs2 = ()
        dxs1 = ()
        dxs0 = ()
        new_carry = ()
        new_later = ()
        new_filters = ()
        new_outers = ()
        new_w = ()
        new_g = ()
        new_states = ()
        for e in tl.static_range(2):
            u1 = filter_channel(words1, past1, filters1[e], e)
            u0 = filter_channel(words0, past0, filters0[e], e)
            u2 = filter_channel(words2, past2, filters2[e], e)
            grad = halves(dys, e)
            w = as_factors(products(u1, u0), EMULATED)
            dg = as_factors(products(u2, grad), EMULATED)
            place = (word * 2 + e) * (2 * ENTRIES)
            local = load_entry(tables, place, lane, EMULATED)
            low = multiply(w[0], local[0:2], (none, none, none, none), EMULATED)
            high = multiply(w[0], local[2:4], (none, none, none, none), EMULATED)
            local = load_entry(tables, place + ENTRIES, lane, EMULATED)
            low_back = multiply(dg[0], local[0:2], (none, none, none, none), EMULATED)
            high_back = multiply(dg[0], local[2:4], (none, none, none, none), EMULATED)
            if PARAMETERS:
                w_turned = (turn(w[0], lane, EMULATED), turn(w[1], lane, EMULATED))
                dg_turned = (turn(dg[0], lane, EMULATED), turn(dg[1], lane, EMULATED))
                left_w = (
                    (w_turned[0][0], w_turned[0][2], w_turned[0][1], w_turned[0][3]),
                    (w_turned[1][0], w_turned[1][2], w_turned[1][1], w_turned[1][3]),
                )
                left_dg = (
                    (dg_turned[0][0], dg_turned[0][2], dg_turned[0][1], dg_turned[0][3]),
                    (dg_turned[1][0], dg_turned[1][2], dg_turned[1][1], dg_turned[1][3]),
                )
                for k in tl.static_range(2):
                    new_outers = new_outers + multiply_terms(
                        left_dg,
                        (w_turned[0][2 * k : 2 * k + 2], w_turned[1][2 * k : 2 * k + 2]),
                        outer_sums[8 * e + 4 * k : 8 * e + 4 * k + 4],
                        EMULATED,
                    )
            for q in tl.static_range(BLOCKS):
                terms = ()
                terms_back = ()
                for i in tl.static_range(2 if QUADS > 1 else 1):
                    decay = read_decays(decays, (word * 2 + e) * QUADS + 2 * q + i, lane, EMULATED)
                    enter = load_terms(tables, place + 1 + 2 * q + i, lane, EMULATED)
                    s, _ = find_states(w, enter, decay, given[e * QUADS + 2 * q + i], lane, REAL, EMULATED)
                    enter = load_terms(tables, place + ENTRIES + 1 + 2 * q + i, lane, EMULATED)
                    b, end = find_adjoints(
                        dg,
                        enter,
                        decay,
                        carry[2 * (e * QUADS + 2 * q + i) : 2 * (e * QUADS + 2 * q + i) + 2],
                        lane,
                        REAL,
                        EMULATED,
                    )
                    new_carry = new_carry + (end[0], end[1])
                    of_s = split(s[0], s[1], EMULATED) + split(s[2], s[3], EMULATED)
                    of_b = split(b[0], b[1], EMULATED) + split(b[2], b[3], EMULATED)
                    terms = terms + of_s
                    terms_back = terms_back + of_b
                    if PARAMETERS:
                        of_s = turn(of_s, lane, EMULATED)
                        of_b = turn(of_b, lane, EMULATED)
                        new_w = new_w + multiply_terms(
                            left_w,
                            (of_b[0::2], of_b[1::2]),
                            w_sums[4 * (e * QUADS + 2 * q + i) : 4 * (e * QUADS + 2 * q + i) + 4],
                            EMULATED,
                        )
                        new_g = new_g + multiply_terms(
                            left_dg,
                            (of_s[0::2], of_s[1::2]),
                            g_sums[4 * (e * QUADS + 2 * q + i) : 4 * (e * QUADS + 2 * q + i) + 4],
                            EMULATED,
                        )
                        re = state_sums[2 * (e * QUADS + 2 * q + i)]
                        im = state_sums[2 * (e * QUADS + 2 * q + i) + 1]
                        re, im = move((b[0], b[1]), s[0], s[1], re, im, REAL)
                        re, im = move((b[2], b[3]), s[2], s[3], re, im, REAL)
                        new_states = new_states + (re, im)
                s = (terms[0::2], terms[1::2])
                leave = load_leaves(tables, place + 1 + QUADS + 2 * q, lane, QUADS, EMULATED)
                low = multiply_terms(s, leave[0], low, EMULATED)
                high = multiply_terms(s, leave[1], high, EMULATED)
                b = (terms_back[0::2], terms_back[1::2])
                leave = load_leaves(tables, place + ENTRIES + 1 + QUADS + 2 * q, lane, QUADS, EMULATED)
                low_back = multiply_terms(b, leave[0], low_back, EMULATED)
                high_back = multiply_terms(b, leave[1], high_back, EMULATED)
            g = (low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3])
            dw = (low_back[0], low_back[1], high_back[0], high_back[1],
                  low_back[2], low_back[3], high_back[2], high_back[3])  # fmt: skip
            du2 = products(grad, g)
            du1 = products(dw, u0)
            du0 = products(dw, u1)
            dxs2 = dxs2 + (
                filter_back(du2, later[(K - 1) * (3 * e + 0) : (K - 1) * (3 * e + 1)], filters2[e][0], lane, EMULATED),
            )
            dxs1 = dxs1 + (
                filter_back(du1, later[(K - 1) * (3 * e + 1) : (K - 1) * (3 * e + 2)], filters1[e][0], lane, EMULATED),
            )
            dxs0 = dxs0 + (
                filter_back(du0, later[(K - 1) * (3 * e + 2) : (K - 1) * (3 * e + 3)], filters0[e][0], lane, EMULATED),
            )
            new_later = new_later + du2[0 : K - 1] + du1[0 : K - 1] + du0[0 : K - 1]
            if PARAMETERS:
                new_filters = new_filters + add_filter_gradient(
                    filter_sums[SUMS * (3 * e) : SUMS * (3 * e + 1)], du2, words2, past2, e, HAS_BIAS
                )
                new_filters = new_filters + add_filter_gradient(
                    filter_sums[SUMS * (3 * e + 1) : SUMS * (3 * e + 2)], du1, words1, past1, e, HAS_BIAS
                )
                new_filters = new_filters + add_filter_gradient(
                    filter_sums[SUMS * (3 * e + 2) : SUMS * (3 * e + 3)], du0, words0, past0, e, HAS_BIAS
                )
        carry = new_carry
        later = new_later
        filter_sums = new_filters
        outer_sums = new_outers
        w_sums = new_w
        g_sums = new_g
        state_sums = new_states
        store_tile(dz_2, start, T, first, dxs2[0], dxs2[1], ROW, WORDS, EMULATED)
        store_tile(dz_1, start, T, first, dxs1[0], dxs1[1], ROW, WORDS, EMULATED)
        store_tile(dz_0, start, T, first, dxs0[0], dxs0[1], ROW, WORDS, EMULATED)

    if PARAMETERS:
        step = lane // 8 * 4 + lane // 4 % 2
        for e in tl.static_range(2):
            channel = word * 2 + e
            for k in tl.static_range(3):
                for j in tl.static_range(SUMS):
                    to = of_filters + (row * (K + 1) + j) * (3 * D) + k * D + first * 2 + e
                    store_sum(to, filter_sums[SUMS * (3 * e + k) + j], WORDS, 2)
            for k in tl.static_range(2):
                for i in tl.static_range(4):
                    to = outers + ((row * D + channel) * 16 + step + i // 2 * 2) * 16 + lane % 4 * 4 + 2 * k + i % 2
                    tl.store(to, outer_sums[8 * e + 4 * k + i])
            for q in tl.static_range(QUADS):
                mode = 4 * q + lane % 4
                for i in tl.static_range(4):
                    at = (((row * D + channel) * 16 + step + i // 2 * 2) * N + mode) * 2 + i % 2
                    tl.store(of_w + at, w_sums[4 * (e * QUADS + q) + i], mask=mode < N)
                    tl.store(of_g + at, g_sums[4 * (e * QUADS + q) + i], mask=mode < N)
                at = of_states + ((row * D + channel) * N + mode) * 2
                for i in tl.static_range(2):
                    total = sum_columns(state_sums[2 * (e * QUADS + q) + i], lane, EMULATED)
                    tl.store(at + i, total, mask=(lane < 4) & (mode < N))


@triton.jit
def segments_gradients_kernel(poles, residues, outers, of_w, of_g, of_states, dpoles, dresidues, dskip, ROWS,
                              REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):  # fmt: skip
    """The gradients of poles (of real modes: of their logarithms), residues and skip of a channel. Grid: (D,)."""
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
