"""The operator with many modes, backward, without gradients of the filters, as products in registers.

Lanes, tiles and factors are as in ``segments``. With dg = dy·u2, and b the conjugate of the gradient of the state after
a segment, divided by the residue::

    b[m-1] = q b[m] + Σ_i p^(i+1) dg[m,i]
    dw[m,j] = Σ_{i>=j} h[i-j] dg[m,i] + Re r p^(15-j) b[m]

The kernel walks back through time, tile by tile; it finds g of a tile anew, from the state before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import convolve
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.forward import move
from hyaena.ops.triton.hyena.segments import find_states
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
from hyaena.ops.triton.hyena.segments_tables import load_entry, load_leaves, load_terms, read_decays
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, load_filters


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
        distance = tl.full(lane.shape, 4 << k, tl.int32)
        re, im = add_lane(decays[k + 1], re, im, distance, lane, True, REAL, EMULATED)
    second_re = move_lanes(re, carry[0], lane, 4, True, EMULATED)
    second_im = move_lanes(im, carry[1], lane, 4, True, EMULATED)
    re = move_lanes(re, none, lane, 28, False, EMULATED)  # of the first segments in the last four lanes
    im = move_lanes(im, none, lane, 28, False, EMULATED)
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


@triton.jit(do_not_specialize=["T"])
def segments_backward_kernel(z, dy, weight, bias, tables, decays, states, dz, T, REAL: tl.constexpr, D: tl.constexpr,
                             N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
                             HAS_BIAS: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The gradient of z. Grid: (blocks of WORDS words, rows); a warp for every word.

    ``z``, ``dy`` and ``dz`` are in words of two numbers; ``states`` as ``segments_states_kernel`` makes them, and the
    tables are those of both directions. The words of STAGES tiles are under way together.
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
    dz_2, dz_1, dz_0 = thirds(dz + row * T * ROW, ROW)
    dy += row * T * (D // 2)
    T = tl.cast(T, tl.int32)
    tiles = (T + TILE - 1) // TILE
    states += row * tiles * D * N * 2

    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    none = tl.zeros(lane.shape, tl.float32)
    carry = ()
    for _ in tl.static_range(2 * QUADS):
        carry = carry + ((none, none),)
    later = ()  # du of the first steps of the next tile
    for _ in tl.static_range(6 * (K - 1)):
        later = later + (none,)
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
        words1 = to_lanes(in_rows(load_tile(z_1, start, T, first, z, ROW, WORDS, False)))
        words0 = to_lanes(in_rows(load_tile(z_0, start, T, first, z, ROW, WORDS, False)))
        words2 = to_lanes(in_rows(load_tile(z_2, start, T, first, z, ROW, WORDS, False)))
        dys = to_lanes(in_rows(load_tile(dy, start, T, first, z, D // 2, WORDS, False)))
        past2 = histories(words2, before2, lane, EMULATED)
        past1 = histories(words1, before1, lane, EMULATED)
        past0 = histories(words0, before0, lane, EMULATED)
        dxs2 = ()
        dxs1 = ()
        dxs0 = ()
        new_carry = ()
        new_later = ()
        for e in tl.static_range(2):
            u1 = filter_channel(words1, past1, filters1[e], e)
            u0 = filter_channel(words0, past0, filters0[e], e)
            u2 = filter_channel(words2, past2, filters2[e], e)
            grad = halves(dys, e)
            w = as_factors(products(u1, u0), EMULATED)
            dg = as_factors(products(u2, grad), EMULATED)
            place = (word * 2 + e) * (2 * ENTRIES)
            local = load_entry(tables, place, lane, EMULATED)
            low, high = multiply_local(w, local, EMULATED)
            local = load_entry(tables, place + ENTRIES, lane, EMULATED)
            low_back, high_back = multiply_local(dg, local, EMULATED)
            for q in tl.static_range(BLOCKS):
                terms = ()
                terms_back = ()
                for i in tl.static_range(2 if QUADS > 1 else 1):
                    decay = read_decays(decays, (word * 2 + e) * QUADS + 2 * q + i, lane, EMULATED)
                    enter = load_terms(tables, place + 1 + 2 * q + i, lane, EMULATED)
                    s = find_states(w, enter, decay, given[e * QUADS + 2 * q + i], lane, REAL, EMULATED)[0]
                    enter = load_terms(tables, place + ENTRIES + 1 + 2 * q + i, lane, EMULATED)
                    b, end = find_adjoints(dg, enter, decay, carry[e * QUADS + 2 * q + i], lane, REAL, EMULATED)
                    new_carry = new_carry + (end,)
                    terms = terms + split(s[0], s[1], EMULATED) + split(s[2], s[3], EMULATED)
                    terms_back = terms_back + split(b[0], b[1], EMULATED) + split(b[2], b[3], EMULATED)
                leave = load_leaves(tables, place + 1 + QUADS + 2 * q, lane, QUADS, EMULATED)
                low, high = add_states(low, high, terms, leave, EMULATED)
                leave = load_leaves(tables, place + ENTRIES + 1 + QUADS + 2 * q, lane, QUADS, EMULATED)
                low_back, high_back = add_states(low_back, high_back, terms_back, leave, EMULATED)
            g = in_steps(low, high)
            dw = in_steps(low_back, high_back)
            du2 = products(grad, g)
            du1 = products(dw, u0)
            du0 = products(dw, u1)
            of2 = later[(K - 1) * 3 * e : (K - 1) * (3 * e + 1)]
            of1 = later[(K - 1) * (3 * e + 1) : (K - 1) * (3 * e + 2)]
            of0 = later[(K - 1) * (3 * e + 2) : (K - 1) * (3 * e + 3)]
            dxs2 = dxs2 + (filter_back(du2, of2, filters2[e][0], lane, EMULATED),)
            dxs1 = dxs1 + (filter_back(du1, of1, filters1[e][0], lane, EMULATED),)
            dxs0 = dxs0 + (filter_back(du0, of0, filters0[e][0], lane, EMULATED),)
            new_later = new_later + du2[0 : K - 1] + du1[0 : K - 1] + du0[0 : K - 1]
        carry = new_carry
        later = new_later
        store_tile(dz_2, start, T, first, dxs2[0], dxs2[1], ROW, WORDS, EMULATED)
        store_tile(dz_1, start, T, first, dxs1[0], dxs1[1], ROW, WORDS, EMULATED)
        store_tile(dz_0, start, T, first, dxs0[0], dxs0[1], ROW, WORDS, EMULATED)
