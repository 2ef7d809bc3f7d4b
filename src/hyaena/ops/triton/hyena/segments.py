"""The operator with many modes, forward, as products in registers: bfloat16 z [B,T,3D] to y [B,T,D].

A warp owns one word of two channels and walks through time in tiles of 16 segments of 16 steps. For every channel, with
w = u1·u0 of the tile as a matrix [segment,step]::

    e = w Gᵀ               what a segment adds to the modes         G[n,j] = p_n^(15-j)
    s[m+1] = q s[m] + e[m]                                          q = p^16
    g = w Hᵀ + s Rᵀ        H[i,j] = h[i-j], the skip in h[0]        R[i,n] = r_n p_n^(i+1)

A mode has two rows of G and two columns of R, one for its real and one for its imaginary part.

The products are ``mma.m16n8k16``. As in ``toeplitz``, the order of steps is free as long as the matrices keep to it, so
the result of a product is distributed over lanes as its left factor is, and nothing is rearranged: lane (g, c) =
(lane / 4, lane % 4) owns steps 4c … 4c+3 of segments 2g and 2g+1, and of e and s the modes c, c+4, … of these segments.
The recurrence through segments is a scan over the eight g, by shuffles. Words pass through shared memory once on their
way from memory, where neighbours are channels, and once on their way back.

Factors are bfloat16: of H and w one term, of G, R, s and w for the modes two, whose product leaves out that of the low
terms, so that the modes are right to float32's rounding, nearly.

Tensors have one element for every lane, but for those of whole tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import convolve
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.forward import move
from hyaena.ops.triton.hyena.modal import powers
from hyaena.ops.triton.hyena.segments_lanes import (
    TILE,
    add_lane,
    add_states,
    as_factors,
    in_rows,
    in_steps,
    load_before_tile,
    load_tile,
    move_lanes,
    multiply_local,
    multiply_terms,
    products,
    split,
    store_tile,
    to_lanes,
)
from hyaena.ops.triton.hyena.segments_tables import (
    load_entry,
    load_leaves,
    load_terms,
    read_decays,
)
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, load_filters


@triton.jit
def filter_segments(words, before, filters, lane, EMULATED: tl.constexpr):
    """The short filters at a lane's eight steps: two tuples, of the word's two channels.

    ``before`` are the last words of the tile before, right in the last lane.
    """
    REACH: tl.constexpr = len(before)
    last = lane % 4 == 3
    us = ()
    vs = ()
    for h in tl.static_range(2):
        low = ()
        high = ()
        for k in tl.static_range(REACH):
            if h == 0:
                theirs = tl.where(last, words[8 - REACH + k], words[4 - REACH + k])
                theirs = from_lane(tl.where(lane == 31, before[k], theirs), (lane + 31) % 32, EMULATED)
            else:
                theirs = tl.where(last, words[4 - REACH + k], words[8 - REACH + k])
                theirs = from_lane(theirs, lane // 4 * 4 + (lane + 3) % 4, EMULATED)
            low = low + (half(theirs, False),)
            high = high + (half(theirs, True),)
        for i in tl.static_range(4):
            u, low = convolve(filters[0][0], filters[0][1], low, half(words[4 * h + i], False))
            v, high = convolve(filters[1][0], filters[1][1], high, half(words[4 * h + i], True))
            us = us + (u,)
            vs = vs + (v,)
    return us, vs


@triton.jit
def find_states(w, enter, decays, carry, lane, REAL: tl.constexpr, EMULATED: tl.constexpr):
    """The states before a lane's two segments, for four modes: re, im of both; and the state after the tile.

    Args:
        w: the left factor, terms of four words.
        enter: the right factor, terms of two words.
        decays: p^16, p^32, p^64, p^128, and what the product of those that the state of the tile before passes through
            leaves of p^256.
        carry: the state before the tile, in the first four lanes, zero in the others.
    """
    none = tl.zeros_like(carry[0])
    a, b, c, d = multiply_terms(w, enter, (none, none, none, none), EMULATED)
    re, im = move(decays[0], a, b, c, d, REAL)  # what two segments add
    re, im = move(decays[1], carry[0], carry[1], re, im, REAL)
    for k in tl.static_range(3):
        distance = tl.full(lane.shape, 4 << k, tl.int32)
        re, im = add_lane(decays[k + 1], re, im, distance, lane, False, REAL, EMULATED)
    first_re = move_lanes(re, carry[0], lane, 4, False, EMULATED)
    first_im = move_lanes(im, carry[1], lane, 4, False, EMULATED)
    re = move_lanes(re, none, lane, 28, True, EMULATED)  # of the last segments in the first four lanes
    im = move_lanes(im, none, lane, 28, True, EMULATED)
    after = move(decays[4], carry[0], carry[1], re, im, REAL)
    second = move(decays[0], first_re, first_im, a, b, REAL)
    return (first_re, first_im, second[0], second[1]), after


@triton.jit
def keep_steps(w, keep, start, low, T, lane, HAS_MASK: tl.constexpr):
    """A lane's eight numbers, zero before ``low`` and at padding."""
    out = ()
    for i in tl.static_range(8):
        t = start + lane // 4 * 32 + lane % 4 * 4 + (i // 4 * 16 + i % 4)
        kept = t >= low
        if HAS_MASK:
            kept = kept & (tl.load(keep + t, mask=t < T, other=0) != 0)
        out = out + (tl.where(kept, w[i], 0.0),)
    return out


@triton.jit
def finish(z_1, z_0, short_1, short_0, keep, poles, enter, decays, filters1, filters0, carry, count, T, word, first,
           lane, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, REAL: tl.constexpr,
           HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The state after the last ``count`` steps, fewer than a tile: from the tile that ends with T, zero before them."""
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = len(carry) // 2
    start = T - TILE
    words1 = to_lanes(load_tile(z_1, start, T, first, keep, ROW, WORDS, HAS_MASK))
    words0 = to_lanes(load_tile(z_0, start, T, first, keep, ROW, WORDS, HAS_MASK))
    before1 = load_before_tile(z_1 + word, short_1, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before0 = load_before_tile(z_0 + word, short_0, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
    us1 = filter_segments(words1, before1, filters1, lane, EMULATED)
    us0 = filter_segments(words0, before0, filters0, lane, EMULATED)
    none = tl.zeros(lane.shape, tl.float32)
    after = ()
    for e in tl.static_range(2):
        w = as_factors(keep_steps(products(us1[e], us0[e]), keep, start, T - count, T, lane, HAS_MASK), EMULATED)
        for q in tl.static_range(QUADS):
            before = carry[e * QUADS + q]
            mode = 4 * q + lane % 4
            _, end = find_states(w, enter[e * QUADS + q], decays[e * QUADS + q], (none, none), lane, REAL, EMULATED)
            re, im = powers(poles, word * 2 + e, mode, count + tl.zeros_like(mode), D, N, 8, REAL)
            decay = (re.to(tl.float32), im.to(tl.float32))
            after = after + (move(decay, before[0], before[1], end[0], end[1], REAL),)
    return after


@triton.jit
def store_states(to, states, word, lane, D: tl.constexpr, N: tl.constexpr):
    """Store states [D,N,2] of both channels of a word, in the first four lanes."""
    QUADS: tl.constexpr = len(states) // 2
    for e in tl.static_range(2):
        for q in tl.static_range(QUADS):
            mode = 4 * q + lane % 4
            at = to + ((word * 2 + e) * N + mode) * 2
            tl.store(at, states[e * QUADS + q][0], mask=(lane < 4) & (mode < N))
            tl.store(at + 1, states[e * QUADS + q][1], mask=(lane < 4) & (mode < N))


@triton.jit(do_not_specialize=["T"])
def segments_forward_kernel(z, weight, bias, poles, tables, decays, short, long, keep, y, long_out, T,
                            REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                            WORDS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORT: tl.constexpr,
                            HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of WORDS words, rows); a warp for every word.

    ``z``, ``short`` [B,K-1,3D] and ``y`` are in words of two numbers, ``keep`` uint8 [B,T]; T is at least a tile. The
    tables stay in registers, and so do the words of the next tile, loaded before the work on this one.
    """
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    BLOCKS: tl.constexpr = (QUADS + 1) // 2
    ENTRIES: tl.constexpr = 1 + 2 * QUADS
    index = tl.arange(0, 32 * WORDS)
    lane = index % 32
    first = tl.program_id(0) * WORDS
    word = first + index // 32
    row = tl.program_id(1).to(tl.int64)
    z_2, z_1, z_0 = thirds(z + row * T * ROW, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW + word, ROW)
    y += row * T * (D // 2)
    keep += row * T
    T = tl.cast(T, tl.int32)

    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    local = ()
    enter = ()
    leave = ()
    decay = ()
    carry = ()
    for e in tl.static_range(2):
        channel = word * 2 + e
        local = local + (load_entry(tables, channel * ENTRIES, lane, EMULATED),)
        for q in tl.static_range(QUADS):
            enter = enter + (load_terms(tables, channel * ENTRIES + 1 + q, lane, EMULATED),)
            decay = decay + (read_decays(decays, channel * QUADS + q, lane, EMULATED),)
            re = tl.zeros(lane.shape, tl.float32)
            im = tl.zeros(lane.shape, tl.float32)
            if HAS_LONG:
                mode = 4 * q + lane % 4
                at = long + row * D * N * 2 + (channel * N + mode) * 2
                re = tl.load(at, mask=(lane < 4) & (mode < N), other=0.0)
                im = tl.load(at + 1, mask=(lane < 4) & (mode < N), other=0.0)
            carry = carry + ((re, im),)
        for q in tl.static_range(BLOCKS):
            leave = leave + (load_leaves(tables, channel * ENTRIES + 1 + QUADS + 2 * q, lane, QUADS, EMULATED),)

    before2 = load_before_tile(z_2 + word, short_2, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before1 = load_before_tile(z_1 + word, short_1, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before0 = load_before_tile(z_0 + word, short_0, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    next1 = load_tile(z_1, 0, T, first, keep, ROW, WORDS, HAS_MASK, True)
    next0 = load_tile(z_0, 0, T, first, keep, ROW, WORDS, HAS_MASK, True)
    next2 = load_tile(z_2, 0, T, first, keep, ROW, WORDS, HAS_MASK, True)
    for start in tl.range(0, T, TILE, num_stages=1):
        tile1 = next1
        tile0 = next0
        tile2 = next2
        next1 = load_tile(z_1, start + TILE, T, first, keep, ROW, WORDS, HAS_MASK, True)
        next0 = load_tile(z_0, start + TILE, T, first, keep, ROW, WORDS, HAS_MASK, True)
        next2 = load_tile(z_2, start + TILE, T, first, keep, ROW, WORDS, HAS_MASK, True)
        words1 = to_lanes(tile1)
        words0 = to_lanes(tile0)
        words2 = to_lanes(tile2)
        us1 = filter_segments(words1, before1, filters1, lane, EMULATED)
        us0 = filter_segments(words0, before0, filters0, lane, EMULATED)
        us2 = filter_segments(words2, before2, filters2, lane, EMULATED)
        before1 = words1[9 - K :]
        before0 = words0[9 - K :]
        before2 = words2[9 - K :]
        whole = start + TILE <= T  # the state before a part of a tile is the start of what follows the loop
        ys = ()
        after = ()
        for e in tl.static_range(2):
            w = products(us1[e], us0[e])
            if HAS_MASK:
                w = keep_steps(w, keep, start, 0, T, lane, True)
            w = as_factors(w, EMULATED)
            low, high = multiply_local(w, local[e], EMULATED)
            for q in tl.static_range(BLOCKS):
                terms = ()
                for i in tl.static_range(2 if QUADS > 1 else 1):
                    begin = carry[e * QUADS + 2 * q + i]
                    s, end = find_states(
                        w, enter[e * QUADS + 2 * q + i], decay[e * QUADS + 2 * q + i], begin, lane, REAL, EMULATED
                    )
                    re = tl.where(whole, end[0], begin[0])
                    im = tl.where(whole, end[1], begin[1])
                    after = after + ((re, im),)
                    terms = terms + split(s[0], s[1], EMULATED) + split(s[2], s[3], EMULATED)
                low, high = add_states(low, high, terms, leave[e * BLOCKS + q], EMULATED)
            ys = ys + (in_steps(low, high),)
        carry = after
        even = products(ys[0], us2[0])
        odd = products(ys[1], us2[1])
        if HAS_MASK:
            even = keep_steps(even, keep, start, 0, T, lane, True)
            odd = keep_steps(odd, keep, start, 0, T, lane, True)
        store_tile(y, start, T, first, even, odd, D // 2, WORDS, EMULATED)

    count = T % TILE
    if count > 0:
        carry = finish(z_1, z_0, short_1, short_0, keep, poles, enter, decay, filters1, filters0, carry, count, T,
                       word, first, lane, D, N, K, WORDS, REAL, HAS_SHORT, HAS_MASK, EMULATED)  # fmt: skip
    store_states(long_out + row * D * N * 2, carry, word, lane, D, N)


@triton.jit(do_not_specialize=["T"])
def segments_states_kernel(z, weight, bias, tables, decays, states, T, REAL: tl.constexpr, D: tl.constexpr,
                           N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
                           HAS_BIAS: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The states [B,tiles,D,N,2] before every tile, from a zero state, without padding; grid and z as above.

    The tables are those of both directions. The words of STAGES tiles are under way together.
    """
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    ENTRIES: tl.constexpr = 1 + 2 * QUADS
    index = tl.arange(0, 32 * WORDS)
    lane = index % 32
    first = tl.program_id(0) * WORDS
    word = first + index // 32
    row = tl.program_id(1).to(tl.int64)
    z_1 = z + row * T * ROW + ROW // 3
    z_0 = z_1 + ROW // 3
    T = tl.cast(T, tl.int32)
    states += row * ((T + TILE - 1) // TILE) * (D * N * 2)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    none = tl.zeros(lane.shape, tl.float32)
    carry = ()
    for _ in tl.static_range(2 * QUADS):
        carry = carry + ((none, none),)
    before1 = load_before_tile(z_1 + word, z, z, 0, K - 1, ROW, False, False)
    before0 = load_before_tile(z_0 + word, z, z, 0, K - 1, ROW, False, False)
    for start in tl.range(0, T, TILE, num_stages=STAGES):
        words1 = to_lanes(in_rows(load_tile(z_1, start, T, first, z, ROW, WORDS, False)))
        words0 = to_lanes(in_rows(load_tile(z_0, start, T, first, z, ROW, WORDS, False)))
        us1 = filter_segments(words1, before1, filters1, lane, EMULATED)
        us0 = filter_segments(words0, before0, filters0, lane, EMULATED)
        before1 = words1[9 - K :]
        before0 = words0[9 - K :]
        store_states(states + tl.cast(start // TILE, tl.int64) * (D * N * 2), carry, word, lane, D, N)
        after = ()
        for e in tl.static_range(2):
            channel = word * 2 + e
            w = as_factors(products(us1[e], us0[e]), EMULATED)
            for q in tl.static_range(QUADS):
                enter = load_terms(tables, channel * (2 * ENTRIES) + 1 + q, lane, EMULATED)
                decay = read_decays(decays, channel * QUADS + q, lane, EMULATED)
                after = after + (find_states(w, enter, decay, carry[e * QUADS + q], lane, REAL, EMULATED)[1],)
        carry = after
