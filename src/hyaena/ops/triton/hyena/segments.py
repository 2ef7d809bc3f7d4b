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

from hyaena.ops.triton.common import convolve, pole
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.forward import move
from hyaena.ops.triton.hyena.segments_lanes import (
    TILE,
    add_lane,
    add_states,
    as_factors,
    decays_of,
    in_steps,
    leaves_of,
    load_before_tile,
    load_filters,
    move_lanes,
    multiply_local,
    multiply_terms,
    pack_steps,
    products,
    split,
    zeros,
)
from hyaena.ops.triton.hyena.segments_shared import (
    copy_entries,
    copy_quads,
    copy_tile,
    end_group,
    every_lane,
    kernel,
    make_room,
    make_rooms,
    out_shared,
    plain_shared,
    read_entry,
    read_quads,
    read_tile,
    store_tile,
    tile_shared,
    wait_groups,
    write_tile,
)
from hyaena.ops.triton.hyena.toeplitz import from_lane, half
from hyaena.ops.triton.pdl import gdc_wait


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
def find_states(w, enter, decays, carry, lane, BACK: tl.constexpr, REAL: tl.constexpr, EMULATED: tl.constexpr):
    """The states before a lane's two segments, for four modes: re, im of both; and the state after the tile.

    With BACK time runs backward, as for b of ``segments_inputs``: the states after the segments, and that before the
    tile.

    Args:
        w: the left factor, terms of four words.
        enter: the right factor, terms of two words.
        decays: p^16, p^32, p^64, p^128, and what the product of those that the state of the tile before passes through
            leaves of p^256.
        carry: the state before the tile, in the first four lanes, zero in the others. BACK: after it, in the last four.
    """
    none = zeros(lane)
    a, b, c, d = multiply_terms(w, enter, (none, none, none, none), EMULATED)
    if BACK:
        a, b, c, d = c, d, a, b
    re, im = move(decays[0], a, b, c, d, REAL)  # what two segments add
    re, im = move(decays[1], carry[0], carry[1], re, im, REAL)
    for k in tl.static_range(3):
        distance = lane * 0 + (4 << k)
        re, im = add_lane(decays[k + 1], re, im, distance, lane, BACK, REAL, EMULATED)
    first_re = move_lanes(re, carry[0], lane, 4, BACK, EMULATED)
    first_im = move_lanes(im, carry[1], lane, 4, BACK, EMULATED)
    re = move_lanes(re, none, lane, 28, not BACK, EMULATED)  # of the last segments in the lanes of ``carry``
    im = move_lanes(im, none, lane, 28, not BACK, EMULATED)
    after = move(decays[4], carry[0], carry[1], re, im, REAL)
    second = move(decays[0], first_re, first_im, a, b, REAL)
    states = (first_re, first_im) + second
    if BACK:
        states = second + (first_re, first_im)
    return states, after


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
def read_decays(rooms, decays, owner, place: tl.constexpr, lane, STRIDE: tl.constexpr, WARPS: tl.constexpr,
                EMULATED: tl.constexpr):  # fmt: skip
    """The ``decays`` of ``find_states`` of four modes of a channel, the ``place``-th of those that the warp owns."""
    a = read_quads(rooms, decays, owner, STRIDE, 3 * place, lane, WARPS, EMULATED)
    b = read_quads(rooms, decays, owner, STRIDE, 3 * place + 1, lane, WARPS, EMULATED)
    c = read_quads(rooms, decays, owner, STRIDE, 3 * place + 2, lane, WARPS, EMULATED)
    return decays_of(a, b, c)


@triton.jit
def read_leaves(entries, at: tl.constexpr, block: tl.constexpr, tables, channel, FROM: tl.constexpr,
                COUNT: tl.constexpr, EACH: tl.constexpr, lane, QUADS: tl.constexpr, WORDS: tl.constexpr,
                EMULATED: tl.constexpr):  # fmt: skip
    """R of a block of eight modes, or its counterpart of the way back; ``at`` is the entry of H."""
    PLACE: tl.constexpr = at + 1 + 2 * block
    first = read_entry(entries, PLACE, tables, channel, FROM, COUNT, EACH, lane, WORDS, EMULATED)
    second = first
    if QUADS > 1:
        second = read_entry(entries, PLACE + 1, tables, channel, FROM, COUNT, EACH, lane, WORDS, EMULATED)
    return leaves_of(first, second, QUADS)


@triton.jit
def raise_poles(poles, channel, mode, exponent, N: tl.constexpr, REAL: tl.constexpr):
    """``p^exponent``, exponents below TILE, by squaring in float64."""
    re, im = pole(poles, (channel * N + mode) * 2, mode < N, REAL)
    out_re = tl.where(exponent % 2 == 1, re, 1.0)
    out_im = tl.where(exponent % 2 == 1, im, 1.0 if REAL else 0.0)
    for k in tl.static_range(7):
        odd = (exponent >> (k + 1)) % 2 == 1
        if REAL:
            re, im = re * re, im * im
            out_re = tl.where(odd, out_re * re, out_re)
            out_im = tl.where(odd, out_im * im, out_im)
        else:
            re, im = re * re - im * im, 2.0 * re * im
            new_re = tl.where(odd, out_re * re - out_im * im, out_re)
            out_im = tl.where(odd, out_re * im + out_im * re, out_im)
            out_re = new_re
    return out_re.to(tl.float32), out_im.to(tl.float32)


@triton.jit
def finish(words1, words0, before1, before0, keep, poles, tables, decays, rooms, filters1, filters0, carry, count, T,
           word, lane, N: tl.constexpr, WORDS: tl.constexpr, REAL: tl.constexpr,
           HAS_MASK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The state after the last ``count`` steps, fewer than a tile: from the tile that ends with T, zero before them."""
    QUADS: tl.constexpr = len(carry) // 2
    ENTRIES: tl.constexpr = 1 + 2 * QUADS
    us1 = filter_segments(words1, before1, filters1, lane, EMULATED)
    us0 = filter_segments(words0, before0, filters0, lane, EMULATED)
    none = zeros(lane)
    after = ()
    for e in tl.static_range(2):
        w = products(us1[e], us0[e])
        w = as_factors(keep_steps(w, keep, T - TILE, T - count, T, lane, HAS_MASK), EMULATED)
        for q in tl.static_range(QUADS):
            before = carry[e * QUADS + q]
            mode = 4 * q + lane % 4
            enter = read_entry(rooms[0], e * ENTRIES + 1 + QUADS + q, tables, word * 2 + e, 0, ENTRIES, ENTRIES, lane,
                               WORDS, EMULATED)  # fmt: skip
            decay = read_decays(rooms[1], decays, word, e * QUADS + q, lane, QUADS * 96, WORDS, EMULATED)
            _, end = find_states(w, (enter[0:2], enter[2:4]), decay, (none, none), lane, False, REAL, EMULATED)
            step = raise_poles(poles, word * 2 + e, mode, count + lane * 0, N, REAL)
            after = after + (move(step, before[0], before[1], end[0], end[1], REAL),)
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


@triton.jit
def copy_thirds(rooms, at, thirds, start, T, first, keep, ROW: tl.constexpr, WORDS: tl.constexpr,
                HAS_MASK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """Begin to copy a tile of each of some thirds of z to its room."""
    for k in tl.static_range(len(rooms)):
        copy_tile(rooms[k], at, thirds[k], start, T, first, keep, ROW, WORDS, HAS_MASK, EMULATED)


@triton.jit
def store_window(to, words, lane):
    """Store the last steps of a word's two channels, [3D,K-1] bfloat16, ``to`` those of the first."""
    REACH: tl.constexpr = len(words)
    for k in tl.static_range(REACH):
        for e in tl.static_range(2):
            tl.store(to + e * REACH + k, half(words[k], e == 1).to(tl.bfloat16), mask=lane == 0)


@kernel(do_not_specialize=["T"])
def segments_forward_kernel(z, weight, bias, poles, tables, decays, short, long, keep, y, window, long_out, T,
                            REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                            WORDS: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
                            HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr,
                            EMULATED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of WORDS words, rows); a warp for every word.

    ``z``, ``short`` [B,K-1,3D] and ``y`` are in words of two numbers, ``keep`` uint8 [B,T]; T is at least a tile.
    ``window`` [B,3D,K-1] are the last inputs of the short filters. The tables, of one direction, lie in shared memory,
    and STAGES tiles are on their way there.

    The kernel before this one makes the tables and nothing else, and started when all before it had ended. So all but
    the tables may be read before the wait.
    """
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    BLOCKS: tl.constexpr = (QUADS + 1) // 2
    ENTRIES: tl.constexpr = 1 + 2 * QUADS
    lane = every_lane(WORDS, EMULATED)
    first = tl.program_id(0) * WORDS
    word = first + lane // 32
    lane = lane % 32
    row = tl.program_id(1).to(tl.int64)
    z_2, z_1, z_0 = thirds(z + row * T * ROW, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW + word, ROW)
    y += row * T * (D // 2)
    keep += row * T
    T = tl.cast(T, tl.int32)
    tiles = (T + TILE - 1) // TILE

    entries = make_rooms(2 * ENTRIES, (32 * WORDS, 4), plain_shared(2), EMULATED)
    quads = make_rooms(6 * QUADS, (WORDS, 4, 4), plain_shared(3), EMULATED)
    room2 = make_room((STAGES, 256, WORDS), tile_shared(WORDS), EMULATED)  # between copies to one room are barriers
    room1 = make_room((STAGES, 256, WORDS), tile_shared(WORDS), EMULATED)
    room0 = make_room((STAGES, 256, WORDS), tile_shared(WORDS), EMULATED)
    out = make_room((1, 256, WORDS), out_shared(WORDS), EMULATED)
    rooms = (room1, room0, room2)
    blocks = (z_1, z_0, z_2)
    copy_thirds(rooms, 0, blocks, 0, T, first, keep, ROW, WORDS, HAS_MASK, EMULATED)
    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    before2 = load_before_tile(z_2 + word, short_2, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before1 = load_before_tile(z_1 + word, short_1, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before0 = load_before_tile(z_0 + word, short_0, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    carry = ()
    for e in tl.static_range(2):
        for q in tl.static_range(QUADS):
            re = zeros(lane)
            im = zeros(lane)
            if HAS_LONG:
                mode = 4 * q + lane % 4
                given = long + row * D * N * 2 + ((word * 2 + e) * N + mode) * 2
                re = tl.load(given, mask=(lane < 4) & (mode < N), other=0.0)
                im = tl.load(given + 1, mask=(lane < 4) & (mode < N), other=0.0)
            carry = carry + ((re, im),)
    last2 = load_before_tile(z_2 + word, short_2, keep, T, K - 1, ROW, False, HAS_MASK)
    last1 = load_before_tile(z_1 + word, short_1, keep, T, K - 1, ROW, False, HAS_MASK)
    last0 = load_before_tile(z_0 + word, short_0, keep, T, K - 1, ROW, False, HAS_MASK)
    gdc_wait(OVERLAP)
    copy_entries(entries, tables, first, 0, ENTRIES, ENTRIES, WORDS, WORDS, EMULATED)
    copy_quads(quads, decays + first * (QUADS * 96), QUADS * 96, 6 * QUADS, WORDS, WORDS, EMULATED)
    end_group(EMULATED)
    for i in tl.static_range(1, STAGES):
        copy_thirds(rooms, i, blocks, i * TILE, T, first, keep, ROW, WORDS, HAS_MASK, EMULATED)
        end_group(EMULATED)
    window += (row * (3 * D) + word * 2) * (K - 1)
    store_window(window, last2, lane)
    store_window(window + D * (K - 1), last1, lane)
    store_window(window + 2 * D * (K - 1), last0, lane)

    for i in range(0, tiles):
        start = i * TILE
        wait_groups(STAGES - 1, EMULATED)
        words1 = read_tile(room1, i % STAGES, z_1, start, T, word, lane, keep, ROW, WORDS, HAS_MASK, EMULATED)
        words0 = read_tile(room0, i % STAGES, z_0, start, T, word, lane, keep, ROW, WORDS, HAS_MASK, EMULATED)
        words2 = read_tile(room2, i % STAGES, z_2, start, T, word, lane, keep, ROW, WORDS, HAS_MASK, EMULATED)
        copy_thirds(rooms, i % STAGES, blocks, start + STAGES * TILE, T, first, keep, ROW, WORDS, HAS_MASK, EMULATED)
        end_group(EMULATED)
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
            channel = word * 2 + e
            w = products(us1[e], us0[e])
            if HAS_MASK:
                w = keep_steps(w, keep, start, 0, T, lane, True)
            w = as_factors(w, EMULATED)
            local = read_entry(entries, e * ENTRIES, tables, channel, 0, ENTRIES, ENTRIES, lane, WORDS, EMULATED)
            low, high = multiply_local(w, local, EMULATED)
            for b in tl.static_range(BLOCKS):
                terms = ()
                for j in tl.static_range(2 if QUADS > 1 else 1):
                    begin = carry[e * QUADS + 2 * b + j]
                    enter = read_entry(entries, e * ENTRIES + 1 + QUADS + 2 * b + j, tables, channel, 0, ENTRIES,
                                       ENTRIES, lane, WORDS, EMULATED)  # fmt: skip
                    decay = read_decays(quads, decays, word, e * QUADS + 2 * b + j, lane, QUADS * 96, WORDS, EMULATED)
                    s, end = find_states(w, (enter[0:2], enter[2:4]), decay, begin, lane, False, REAL, EMULATED)
                    re = tl.where(whole, end[0], begin[0])
                    im = tl.where(whole, end[1], begin[1])
                    after = after + ((re, im),)
                    terms = terms + split(s[0], s[1], EMULATED) + split(s[2], s[3], EMULATED)
                leave = read_leaves(entries, e * ENTRIES, b, tables, channel, 0, ENTRIES, ENTRIES, lane, QUADS, WORDS,
                                    EMULATED)  # fmt: skip
                low, high = add_states(low, high, terms, leave, EMULATED)
            ys = ys + (in_steps(low, high),)
        carry = after
        even = products(ys[0], us2[0])
        odd = products(ys[1], us2[1])
        if HAS_MASK:
            even = keep_steps(even, keep, start, 0, T, lane, True)
            odd = keep_steps(odd, keep, start, 0, T, lane, True)
        write_tile(out, 0, pack_steps(even, odd, EMULATED), y, start, T, word, lane, D // 2, WORDS, EMULATED)
        store_tile(out, 0, y, start, T, first, D // 2, WORDS, EMULATED)

    count = T % TILE
    if count > 0:
        start = T - TILE
        wait_groups(0, EMULATED)
        copy_thirds((room1, room0), 0, (z_1, z_0), start, T, first, keep, ROW, WORDS, HAS_MASK, EMULATED)
        end_group(EMULATED)
        wait_groups(0, EMULATED)
        words1 = read_tile(room1, 0, z_1, start, T, word, lane, keep, ROW, WORDS, HAS_MASK, EMULATED)
        words0 = read_tile(room0, 0, z_0, start, T, word, lane, keep, ROW, WORDS, HAS_MASK, EMULATED)
        before1 = load_before_tile(z_1 + word, short_1, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
        before0 = load_before_tile(z_0 + word, short_0, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
        carry = finish(words1, words0, before1, before0, keep, poles, tables, decays, (entries, quads), filters1,
                       filters0, carry, count, T, word, lane, N, WORDS, REAL, HAS_MASK,
                       EMULATED)  # fmt: skip
    store_states(long_out + row * D * N * 2, carry, word, lane, D, N)
