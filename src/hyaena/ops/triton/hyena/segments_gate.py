"""The operator with many modes, backward: the gradient of the gate u2, by the way forward.

A warp owns a channel (``segments_backward``). With dg = dy·u2::

    du2 = dy·g
    P[i,j] = Σ_m dg[m,i] w[m,j]     Y[i] = Σ_m dg[m,i] s[m]

The kernel walks forward, finds states and g as the forward kernel does, and leaves the states before tiles for the way
back (``segments_inputs``). P and Y, of which ``segments_gradients`` makes gradients of the filter, are products whose
inner axis is the segment: their factors are those of the other products, turned by ``movmatrix``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.hyena.segments import find_states, read_decays, read_leaves
from hyaena.ops.triton.hyena.segments_backward import (
    add_filter_gradient,
    as_left,
    copy_blocks,
    filter_back,
    filter_channel,
    histories,
    load_filters_of,
    no_sums,
    number_from_lane,
    store_filter_gradient,
    store_turned,
    turn,
    turn_blocks,
)
from hyaena.ops.triton.hyena.segments_lanes import (
    TILE,
    add_states,
    as_factors,
    in_steps,
    multiply_local,
    multiply_terms,
    products,
    split,
)
from hyaena.ops.triton.hyena.segments_shared import (
    channels_shared,
    copy_entries,
    copy_quads,
    end_group,
    every_lane,
    kernel,
    line_shared,
    make_numbers,
    make_rooms,
    owned,
    plain_shared,
    read_channel,
    read_entry,
    rounded,
    store_channels,
    tile_shared,
    wait_groups,
    write_channel,
)
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait


@triton.jit
def finish_tile(tail, du, taps, to, start, lane, ROW: tl.constexpr, EMULATED: tl.constexpr):
    """Store the gradients of the last steps before ``start``, to which du of the first steps from there on adds.

    ``tail`` is what the steps before ``start`` gave, in the last lane; du is right in the first lane.
    """
    REACH: tl.constexpr = len(tail)
    for j in tl.static_range(REACH):
        x = number_from_lane(tail[j], (lane + 31) % 32, EMULATED)
        for i in tl.static_range(j + 1):
            x = tl.fma(taps[j - i], du[i], x)
        at = to + tl.cast(start - REACH + j, tl.int64) * ROW
        tl.store(at, rounded(x, EMULATED), mask=(lane == 0) & (start > 0))


@kernel(do_not_specialize=["T"])
def segments_gate_kernel(z, dy, weight, bias, tables, decays, states, dz, of_filters, outers, of_g, T,
                         REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr,
                         STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, PARAMETERS: tl.constexpr,
                         EMULATED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The first third of dz, and states; if PARAMETERS, the short filter's gradient, P and Y. Grid: (blocks, rows).

    Blocks are of WORDS words of ``z`` and ``dy``; ``dz`` is bfloat16. The tables are those of both directions. STAGES
    tiles are on their way to shared memory. Float32: ``states`` [B,tiles,D,QUADS,4,2]; ``of_filters`` [B,K+1,3D], of
    taps and bias; ``outers`` P [B,D,16,16] and ``of_g`` Y [B,D,16,N,2]. As in the forward kernel, all but the tables
    may be read before the wait.
    """
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    BLOCKS: tl.constexpr = (QUADS + 1) // 2
    ENTRIES: tl.constexpr = 1 + 2 * QUADS
    BOTH: tl.constexpr = 2 * ENTRIES
    FROM: tl.constexpr = 0 if PARAMETERS else 1  # frozen filters need no u2
    WARPS: tl.constexpr = 2 * WORDS
    lane = every_lane(WARPS, EMULATED)
    first = tl.program_id(0) * WORDS
    channel = first * 2 + owned(lane // 32, WORDS, WARPS)
    lane = lane % 32
    row = tl.program_id(1).to(tl.int64)
    z += row * T * ROW
    dz += row * T * (3 * D)
    dy += row * T * (D // 2)
    T = tl.cast(T, tl.int32)
    tiles = (T + TILE - 1) // TILE
    states += (row * tiles * D + channel) * (QUADS * 8) + lane % 4 * 2

    entries = make_rooms(ENTRIES, (32 * WARPS, 4), plain_shared(2), EMULATED)
    quads = make_rooms(3 * QUADS, (WARPS, 4, 4), plain_shared(3), EMULATED)
    rooms = make_rooms(4, (STAGES, 256, WORDS), tile_shared(WORDS), EMULATED)
    lines = make_rooms(4, (16, 128), line_shared(), EMULATED)
    out = make_numbers((256, WARPS), channels_shared(WARPS), EMULATED)
    copy_blocks(rooms, 0, z, dy, 0, T, first, FROM, D, WORDS, EMULATED)
    filter2, filter1, filter0 = load_filters_of(weight, bias, channel, D, K, HAS_BIAS)
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    copy_entries(entries, tables, first * 2, 0, ENTRIES, BOTH, WORDS, WARPS, EMULATED)
    copy_quads(quads, decays + first * (QUADS * 96), QUADS * 48, 3 * QUADS, WORDS, WARPS, EMULATED)
    end_group(EMULATED)
    for i in tl.static_range(1, STAGES):
        copy_blocks(rooms, i, z, dy, i * TILE, T, first, FROM, D, WORDS, EMULATED)
        end_group(EMULATED)
    nothing = no_sums(lane, K - 1)  # of the steps before the first tile, and du of those after any
    before2 = nothing
    before1 = nothing
    before0 = nothing
    tail = nothing
    carry = ()
    g_sums = ()
    for _ in tl.static_range(QUADS):
        carry = carry + (no_sums(lane, 2),)
        g_sums = g_sums + (no_sums(lane, 4),)
    outer_sums = (no_sums(lane, 4), no_sums(lane, 4))
    filter_sums = no_sums(lane, K + 1 if HAS_BIAS else K)

    wait_groups(STAGES - 1, EMULATED)
    turn_blocks(lines, rooms, 0, FROM, EMULATED)

    for i in range(0, tiles):
        start = i * TILE
        x1 = read_channel(lines[1], z + ROW // 3, start, T, channel, lane, ROW, EMULATED)
        x0 = read_channel(lines[2], z + 2 * (ROW // 3), start, T, channel, lane, ROW, EMULATED)
        gradient = read_channel(lines[3], dy, start, T, channel, lane, D // 2, EMULATED)
        x2 = gradient
        if PARAMETERS:
            x2 = read_channel(lines[0], z, start, T, channel, lane, ROW, EMULATED)
        store_channels(out, dz, start - TILE, T, first * 2, 3 * D, WORDS, EMULATED)  # while this tile is computed
        copy_blocks(rooms, i % STAGES, z, dy, start + STAGES * TILE, T, first, FROM, D, WORDS, EMULATED)
        end_group(EMULATED)
        wait_groups(STAGES - 1, EMULATED)
        turn_blocks(lines, rooms, (i + 1) % STAGES, FROM, EMULATED)  # the next tile's
        u1 = filter_channel(x1, histories(x1, before1, lane, EMULATED), filter1)
        u0 = filter_channel(x0, histories(x0, before0, lane, EMULATED), filter0)
        past = histories(x2, before2, lane, EMULATED)
        before1 = x1[9 - K :]
        before0 = x0[9 - K :]
        before2 = x2[9 - K :]
        w = as_factors(products(u1, u0), EMULATED)
        if PARAMETERS:
            dg = as_factors(products(filter_channel(x2, past, filter2), gradient), EMULATED)
            left = (as_left(turn(dg[0], EMULATED)), as_left(turn(dg[1], EMULATED)))
            high = turn(w[0], EMULATED)
            low = turn(w[1], EMULATED)
            even = multiply_terms(left, (high[0:2], low[0:2]), outer_sums[0], EMULATED)
            outer_sums = (even, multiply_terms(left, (high[2:4], low[2:4]), outer_sums[1], EMULATED))
        local = read_entry(entries, 0, tables, channel, 0, ENTRIES, BOTH, lane, WARPS, EMULATED)
        low, high = multiply_local(w, local, EMULATED)
        to = states + tl.cast(i, tl.int64) * (D * QUADS * 8)
        after = ()
        new_g = ()
        for b in tl.static_range(BLOCKS):
            terms = ()
            for j in tl.static_range(2 if QUADS > 1 else 1):
                begin = carry[2 * b + j]
                tl.store(to + (2 * b + j) * 8, begin[0], mask=lane < 4)
                tl.store(to + (2 * b + j) * 8 + 1, begin[1], mask=lane < 4)
                enter = read_entry(entries, 1 + QUADS + 2 * b + j, tables, channel, 0, ENTRIES, BOTH, lane, WARPS,
                                   EMULATED)  # fmt: skip
                decay = read_decays(quads, decays, channel, 2 * b + j, lane, QUADS * 48, WARPS, EMULATED)
                s, end = find_states(w, (enter[0:2], enter[2:4]), decay, begin, lane, False, REAL, EMULATED)
                after = after + (end,)
                of_s = split(s[0], s[1], EMULATED) + split(s[2], s[3], EMULATED)
                terms = terms + of_s
                if PARAMETERS:
                    turned = turn(of_s, EMULATED)
                    sums = g_sums[2 * b + j]
                    new_g = new_g + (multiply_terms(left, (turned[0::2], turned[1::2]), sums, EMULATED),)
            leave = read_leaves(entries, 0, b, tables, channel, 0, ENTRIES, BOTH, lane, QUADS, WARPS, EMULATED)
            low, high = add_states(low, high, terms, leave, EMULATED)
        carry = after
        du = products(gradient, in_steps(low, high))
        if PARAMETERS:
            g_sums = new_g
            filter_sums = add_filter_gradient(filter_sums, du, x2, past)
        finish_tile(tail, du, filter2[0], dz + channel, start, lane, 3 * D, EMULATED)
        dx = filter_back(du, nothing, filter2[0], lane, EMULATED)
        tail = dx[9 - K :]
        write_channel(out, dx, dz, start, T, channel, lane, 3 * D, WORDS, EMULATED)
    store_channels(out, dz, (tiles - 1) * TILE, T, first * 2, 3 * D, WORDS, EMULATED)

    if PARAMETERS:
        store_filter_gradient(of_filters + row * (K + 1) * (3 * D) + channel, filter_sums, lane, D, EMULATED)
        owner = row * D + channel
        step = lane // 8 * 4 + lane // 4 % 2
        for k in tl.static_range(2):
            for i in tl.static_range(4):
                to = outers + (owner * 16 + step + i // 2 * 2) * 16 + lane % 4 * 4 + (2 * k + i % 2)
                tl.store(to, outer_sums[k][i])
        for q in tl.static_range(QUADS):
            store_turned(of_g, g_sums[q], owner, q, lane, N)
