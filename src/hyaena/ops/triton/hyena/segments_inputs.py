"""The operator with many modes, backward: the gradients of the inputs u1 and u0 of the filter, by the way back.

A warp owns a channel (``segments_backward``). With dg = dy·u2, and b the conjugate of the gradient of the state after a
segment, divided by the residue::

    b[m-1] = q b[m] + Σ_i p^(i+1) dg[m,i]
    dw[m,j] = Σ_{i>=j} h[i-j] dg[m,i] + Re r p^(15-j) b[m]
    du1 = dw·u0     du0 = dw·u1     X[i] = Σ_m w[m,i] b[m]     Z = Σ_m b[m] s[m]

X and Z are made gradients of the filter by ``segments_gradients``; for them the kernel finds the states s again, from
those before tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.hyena.forward import move
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
    sum_columns,
)
from hyaena.ops.triton.hyena.segments_shared import (
    channels_shared,
    copy_before,
    copy_entries,
    copy_quads,
    end_group,
    every_lane,
    kernel,
    line_shared,
    make_numbers,
    make_room,
    make_rooms,
    owned,
    plain_shared,
    read_before,
    read_channel,
    read_entry,
    store_channels,
    tile_shared,
    wait_groups,
    write_channel,
)
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait


@triton.jit
def copy_all(rooms, before, at, z, dy, start, T, first, D: tl.constexpr, WORDS: tl.constexpr, EMULATED: tl.constexpr):
    """Begin to copy all that the kernel reads of a tile, to place ``at``; nothing of tiles before step 0."""
    copy_blocks(rooms, at, z, dy, start, T, first, 0, D, WORDS, EMULATED)
    copy_before(before, at, z, start, first, 3 * D // 2, WORDS, EMULATED)


@triton.jit
def read_block(lines, given, block: tl.constexpr, z, start, T, channel, lane, D: tl.constexpr, EMULATED: tl.constexpr):
    """The numbers of a block of z, and those of the steps before each of a lane's segments."""
    x = read_channel(lines, z + block * (D // 2), start, T, channel, lane, 3 * D // 2, EMULATED)
    return x, histories(x, given, lane, EMULATED)


@triton.jit
def load_states(states, tile, lane, D: tl.constexpr, QUADS: tl.constexpr):
    """The states before a tile, in the first four lanes, zero in the others."""
    out = ()
    for q in tl.static_range(QUADS):
        at = states + tl.cast(tile, tl.int64) * (D * QUADS * 8) + q * 8
        out = out + ((tl.load(at, mask=lane < 4, other=0.0), tl.load(at + 1, mask=lane < 4, other=0.0)),)
    return out


@kernel(do_not_specialize=["T"])
def segments_inputs_kernel(z, dy, weight, bias, tables, decays, states, dz, of_filters, of_w, of_states, T,
                           REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr,
                           STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, PARAMETERS: tl.constexpr,
                           EMULATED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The last two thirds of dz; if PARAMETERS, short filters' gradients, X and Z. Grid: (blocks of WORDS words, rows).

    Arguments and copies are as in ``segments_gate_kernel``, whose ``states`` are read here. Float32: ``of_w`` X
    [B,D,16,N,2], ``of_states`` Z [B,D,N,2]. The kernel before this one let it start when it had waited for the tables,
    and writes of what is read here the states alone; nothing is written before the wait.
    """
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    BLOCKS: tl.constexpr = (QUADS + 1) // 2
    ENTRIES: tl.constexpr = 1 + 2 * QUADS
    FROM: tl.constexpr = ENTRIES - QUADS if PARAMETERS else ENTRIES  # G of the way forward, for the states
    COUNT: tl.constexpr = 2 * ENTRIES - FROM
    BOTH: tl.constexpr = 2 * ENTRIES
    OF_H: tl.constexpr = COUNT - ENTRIES
    WARPS: tl.constexpr = 2 * WORDS
    SUMS: tl.constexpr = K + 1 if HAS_BIAS else K
    lane = every_lane(WARPS, EMULATED)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * WORDS  # caches hold what the gate's last programs read
    channel = first * 2 + owned(lane // 32, WORDS, WARPS)
    lane = lane % 32
    row = tl.program_id(1).to(tl.int64)
    z += row * T * (3 * D // 2)
    dz += row * T * (3 * D)
    dy += row * T * (D // 2)
    T = tl.cast(T, tl.int32)
    tiles = (T + TILE - 1) // TILE
    states += (row * tiles * D + channel) * (QUADS * 8) + lane % 4 * 2

    entries = make_rooms(COUNT, (32 * WARPS, 4), plain_shared(2), EMULATED)
    quads = make_rooms(3 * QUADS, (WARPS, 4, 4), plain_shared(3), EMULATED)
    rooms = make_rooms(4, (STAGES, 256, WORDS), tile_shared(WORDS), EMULATED)
    lines = make_rooms(4, (16, 128), line_shared(), EMULATED)
    before = make_room((STAGES, 16, WORDS), plain_shared(2), EMULATED)
    out1 = make_numbers((256, WARPS), channels_shared(WARPS), EMULATED)
    out0 = make_numbers((256, WARPS), channels_shared(WARPS), EMULATED)
    copy_all(rooms, before, 0, z, dy, (tiles - 1) * TILE, T, first, D, WORDS, EMULATED)
    copy_entries(entries, tables, first * 2, FROM, COUNT, BOTH, WORDS, WARPS, EMULATED)
    copy_quads(quads, decays + first * (QUADS * 96), QUADS * 48, 3 * QUADS, WORDS, WARPS, EMULATED)
    end_group(EMULATED)
    for i in tl.static_range(1, STAGES):
        copy_all(rooms, before, i, z, dy, (tiles - 1 - i) * TILE, T, first, D, WORDS, EMULATED)
        end_group(EMULATED)
    filter2, filter1, filter0 = load_filters_of(weight, bias, channel, D, K, HAS_BIAS)
    carry = ()
    w_sums = ()
    state_sums = ()
    for _ in tl.static_range(QUADS):
        carry = carry + (no_sums(lane, 2),)
        w_sums = w_sums + (no_sums(lane, 4),)
        state_sums = state_sums + (no_sums(lane, 2),)
    later1 = no_sums(lane, K - 1)  # du of the first steps of the next tile
    later0 = no_sums(lane, K - 1)
    sums1 = no_sums(lane, SUMS)
    sums0 = no_sums(lane, SUMS)
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)

    for i in range(0, tiles):
        start = (tiles - 1 - i) * TILE
        at = i % STAGES
        begin = carry
        if PARAMETERS:
            begin = load_states(states, tiles - 1 - i, lane, D, QUADS)
        wait_groups(STAGES - 1, EMULATED)
        store_channels(out1, dz + D, start + TILE, T, first * 2, 3 * D, WORDS, EMULATED)  # while this tile is computed
        store_channels(out0, dz + 2 * D, start + TILE, T, first * 2, 3 * D, WORDS, EMULATED)
        given2 = read_before(before, at, 0, z, start, channel, K - 1, 3 * D // 2, WORDS, EMULATED)
        given1 = read_before(before, at, 1, z, start, channel, K - 1, 3 * D // 2, WORDS, EMULATED)
        given0 = read_before(before, at, 2, z, start, channel, K - 1, 3 * D // 2, WORDS, EMULATED)
        turn_blocks(lines, rooms, at, 0, EMULATED)
        copy_all(rooms, before, at, z, dy, start - STAGES * TILE, T, first, D, WORDS, EMULATED)
        end_group(EMULATED)
        gradient = read_channel(lines[3], dy, start, T, channel, lane, D // 2, EMULATED)
        x2, past2 = read_block(lines[0], given2, 0, z, start, T, channel, lane, D, EMULATED)
        x1, past1 = read_block(lines[1], given1, 1, z, start, T, channel, lane, D, EMULATED)
        u1 = filter_channel(x1, past1, filter1)
        x0, past0 = read_block(lines[2], given0, 2, z, start, T, channel, lane, D, EMULATED)
        u0 = filter_channel(x0, past0, filter0)
        dg = as_factors(products(filter_channel(x2, past2, filter2), gradient), EMULATED)
        new_carry = ()
        bs = ()
        for c in tl.static_range(BLOCKS):
            terms = ()
            for j in tl.static_range(2 if QUADS > 1 else 1):
                decay = read_decays(quads, decays, channel, 2 * c + j, lane, QUADS * 48, WARPS, EMULATED)
                enter = read_entry(entries, OF_H + 1 + QUADS + 2 * c + j, tables, channel, FROM, COUNT, BOTH, lane,
                                   WARPS, EMULATED)  # fmt: skip
                last = carry[2 * c + j]
                b, end = find_states(dg, (enter[0:2], enter[2:4]), decay, last, lane, True, REAL, EMULATED)
                new_carry = new_carry + (end,)
                bs = bs + (b,)
                terms = terms + split(b[0], b[1], EMULATED) + split(b[2], b[3], EMULATED)
            if c == 0:
                local = read_entry(entries, OF_H, tables, channel, FROM, COUNT, BOTH, lane, WARPS, EMULATED)
                low, high = multiply_local(dg, local, EMULATED)
            leave = read_leaves(entries, OF_H, c, tables, channel, FROM, COUNT, BOTH, lane, QUADS, WARPS, EMULATED)
            low, high = add_states(low, high, terms, leave, EMULATED)
        carry = new_carry
        dw = in_steps(low, high)
        if PARAMETERS:
            w = as_factors(products(u1, u0), EMULATED)
        du1 = products(dw, u0)
        du0 = products(dw, u1)
        dx = filter_back(du1, later1, filter1[0], lane, EMULATED)
        write_channel(out1, dx, dz + D, start, T, channel, lane, 3 * D, WORDS, EMULATED)
        dx = filter_back(du0, later0, filter0[0], lane, EMULATED)
        write_channel(out0, dx, dz + 2 * D, start, T, channel, lane, 3 * D, WORDS, EMULATED)
        later1 = du1[0 : K - 1]
        later0 = du0[0 : K - 1]
        if PARAMETERS:  # u1 and u0 are read again, and states come last: all together they do not fit the registers
            x1, past1 = read_block(lines[1], given1, 1, z, start, T, channel, lane, D, EMULATED)
            sums1 = add_filter_gradient(sums1, du1, x1, past1)
            x0, past0 = read_block(lines[2], given0, 2, z, start, T, channel, lane, D, EMULATED)
            sums0 = add_filter_gradient(sums0, du0, x0, past0)
            left = (as_left(turn(w[0], EMULATED)), as_left(turn(w[1], EMULATED)))
            new_w = ()
            new_states = ()
            for q in tl.static_range(QUADS):
                b = bs[q]
                turned = turn(split(b[0], b[1], EMULATED) + split(b[2], b[3], EMULATED), EMULATED)
                new_w = new_w + (multiply_terms(left, (turned[0::2], turned[1::2]), w_sums[q], EMULATED),)
            for q in tl.static_range(QUADS):
                b = bs[q]
                decay = read_decays(quads, decays, channel, q, lane, QUADS * 48, WARPS, EMULATED)
                enter = read_entry(entries, q, tables, channel, FROM, COUNT, BOTH, lane, WARPS, EMULATED)
                s = find_states(w, (enter[0:2], enter[2:4]), decay, begin[q], lane, False, REAL, EMULATED)[0]
                total = move((b[0], b[1]), s[0], s[1], state_sums[q][0], state_sums[q][1], REAL)
                new_states = new_states + (move((b[2], b[3]), s[2], s[3], total[0], total[1], REAL),)
            w_sums = new_w
            state_sums = new_states
    store_channels(out1, dz + D, 0, T, first * 2, 3 * D, WORDS, EMULATED)
    store_channels(out0, dz + 2 * D, 0, T, first * 2, 3 * D, WORDS, EMULATED)

    if PARAMETERS:
        of_channel = of_filters + row * (K + 1) * (3 * D) + channel
        store_filter_gradient(of_channel + D, sums1, lane, D, EMULATED)
        store_filter_gradient(of_channel + 2 * D, sums0, lane, D, EMULATED)
        owner = row * D + channel
        for q in tl.static_range(QUADS):
            store_turned(of_w, w_sums[q], owner, q, lane, N)
            mode = 4 * q + lane % 4
            for i in tl.static_range(2):
                total = sum_columns(state_sums[q][i], lane, EMULATED)
                tl.store(of_states + (owner * N + mode) * 2 + i, total, mask=(lane < 4) & (mode < N))
