"""The forward kernel: z [B,T,3D] to y [B,T,D] and both states in one pass over device memory.

A program owns BD channels of one row and walks through time, tile by tile. A tile is S segments of L steps, a lane per
(segment, channel)::

    sweep 1   from x1 and v, every lane: the state at the end of its segment, had the segment begun at zero
    chain     S[j+1] = p^L S[j] + E[j] through the segments, the state carried from tile to tile
    sweep 2   from x2, x1 and v (now in the first-level cache), every lane from its true state: y

Nothing is exchanged between programs, so there is nothing to wait for. Where rows and channels are too few to fill the
device, time is cut into parts: the same kernel with ``STATES_ONLY`` finds what each part adds to the state first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import (
    advance,
    convolve,
    gather,
    load_modes,
    load_step,
    load_taps,
    pole_ladder,
    power,
    split_double,
    store_modes,
)


@triton.jit
def load_history(z_a, fir, keep, a, T, inside, D: tl.constexpr, W: tl.constexpr, HAS_FIR: tl.constexpr,
                 HAS_MASK: tl.constexpr):  # fmt: skip
    """The W steps before step a, a tuple of float32 [S,BD], oldest first."""
    history = ()
    for k in tl.static_range(W):
        back = W - k
        history = history + (
            load_step(z_a - back * 3 * D, fir, keep, a - back, T, inside, W, True, HAS_FIR, HAS_MASK, ""),
        )
    return history


@triton.jit
def sweep_states(z_a, fir, keep, a, T, inside, taps1, off1, taps0, off0, ladder,
                 D: tl.constexpr, N: tl.constexpr, L: tl.constexpr, U: tl.constexpr, S: tl.constexpr, BD: tl.constexpr,
                 TAIL: tl.constexpr, HAS_FIR: tl.constexpr, HAS_MASK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sweep 1: the modes after L steps from zero, two tuples of [S,BD]. Blocks: 1 is x1, 0 is v."""
    W: tl.constexpr = len(taps1) - 1
    G: tl.constexpr = len(ladder)
    z_1 = z_a + D
    z_0 = z_a + 2 * D
    h1 = load_history(z_1, fir + D * W, keep, a, T, inside, D, W, HAS_FIR, HAS_MASK)
    h0 = load_history(z_0, fir + 2 * D * W, keep, a, T, inside, D, W, HAS_FIR, HAS_MASK)
    re = ()
    im = ()
    for _ in tl.static_range(N):
        re = re + (tl.zeros((S, BD), tl.float32),)
        im = im + (tl.zeros((S, BD), tl.float32),)
    for i in tl.range(0, L, U, num_stages=STAGES):
        x1 = ()
        x0 = ()
        for u in tl.static_range(U):
            x1 = x1 + (load_step(z_1 + u * 3 * D, fir, keep, a + i + u, T, inside, W, TAIL, False, HAS_MASK, ""),)
            x0 = x0 + (load_step(z_0 + u * 3 * D, fir, keep, a + i + u, T, inside, W, TAIL, False, HAS_MASK, ""),)
        for u in tl.static_range(0, U, G):
            ws = ()
            for g in tl.static_range(G):
                u1, h1 = convolve(taps1, off1, h1, x1[u + g])
                u0, h0 = convolve(taps0, off0, h0, x0[u + g])
                w = u1 * u0
                if HAS_MASK:
                    t = a + i + u + g
                    w = tl.where(tl.load(keep + t, mask=t < T, other=0) != 0, w, 0.0)
                ws = ws + (w,)
            re, im = gather(ladder, re, im, ws)
        z_1 += U * 3 * D
        z_0 += U * 3 * D
    return re, im


@triton.jit
def sweep_output(z_a, y_a, fir, keep, a, T, inside, taps2, off2, taps1, off1, taps0, off0, p_re, p_im, r_re, r_im,
                 gain, re, im,
                 D: tl.constexpr, L: tl.constexpr, U: tl.constexpr, TAIL: tl.constexpr, HAS_FIR: tl.constexpr,
                 HAS_MASK: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """Sweep 2: y from the true states; returns the modes after the last step before T."""
    W: tl.constexpr = len(taps1) - 1
    z_1 = z_a + D
    z_0 = z_a + 2 * D
    h2 = load_history(z_a, fir, keep, a, T, inside, D, W, HAS_FIR, HAS_MASK)
    h1 = load_history(z_1, fir + D * W, keep, a, T, inside, D, W, HAS_FIR, HAS_MASK)
    h0 = load_history(z_0, fir + 2 * D * W, keep, a, T, inside, D, W, HAS_FIR, HAS_MASK)
    for i in tl.range(0, L, U, num_stages=STAGES):
        x2 = ()
        x1 = ()
        x0 = ()
        for u in tl.static_range(U):
            x2 = x2 + (load_step(z_a + u * 3 * D, fir, keep, a + i + u, T, inside, W, TAIL, False, HAS_MASK, EVICT),)
            x1 = x1 + (load_step(z_1 + u * 3 * D, fir, keep, a + i + u, T, inside, W, TAIL, False, HAS_MASK, EVICT),)
            x0 = x0 + (load_step(z_0 + u * 3 * D, fir, keep, a + i + u, T, inside, W, TAIL, False, HAS_MASK, EVICT),)
        for u in tl.static_range(U):
            t = a + i + u
            u2, h2 = convolve(taps2, off2, h2, x2[u])
            u1, h1 = convolve(taps1, off1, h1, x1[u])
            u0, h0 = convolve(taps0, off0, h0, x0[u])
            w = u1 * u0
            if HAS_MASK:
                real = tl.load(keep + t, mask=t < T, other=0) != 0
                w = tl.where(real, w, 0.0)
                u2 = tl.where(real, u2, 0.0)
            next_re, next_im = advance(p_re, p_im, re, im, w)
            if TAIL:  # past the end the state stands still, so that the last lane ends with the state after T
                held_re = ()
                held_im = ()
                for n in tl.static_range(len(re)):
                    held_re = held_re + (tl.where(t < T, next_re[n], re[n]),)
                    held_im = held_im + (tl.where(t < T, next_im[n], im[n]),)
                next_re = held_re
                next_im = held_im
            re = next_re
            im = next_im
            out = gain * w
            for n in tl.static_range(len(re)):
                out += r_re[n] * re[n]
                out -= r_im[n] * im[n]
            store = inside
            if TAIL:
                store = inside & (t < T)
            tl.store(y_a + u * D, (out * u2).to(y_a.dtype.element_ty), mask=store, eviction_policy=EVICT)
        z_a += U * 3 * D
        z_1 += U * 3 * D
        z_0 += U * 3 * D
        y_a += U * D
    return re, im


@triton.jit
def chain(ends, starts, carry_re, carry_im, q, address, active,
          N: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Carry the state through the S segments of a tile, a lane per (mode, channel); returns it after the last.

    ``q`` is p^L as (re, im) high and low parts: over 10^5 steps the rounding of one float32 decay would add up.
    """
    q_re, q_re_low, q_im, q_im_low = q
    SEGMENT: tl.constexpr = 2 * N * BD
    for i in tl.range(0, S, U):
        e_re = ()
        e_im = ()
        for u in tl.static_range(U):
            e_re = e_re + (tl.load(ends + (i + u) * SEGMENT + address, mask=active, other=0.0),)
            e_im = e_im + (tl.load(ends + (i + u) * SEGMENT + address + BD, mask=active, other=0.0),)
        for u in tl.static_range(U):
            tl.store(starts + (i + u) * SEGMENT + address, carry_re, mask=active)
            tl.store(starts + (i + u) * SEGMENT + address + BD, carry_im, mask=active)
            low_re = q_re_low * carry_re - q_im_low * carry_im + e_re[u]
            low_im = q_re_low * carry_im + q_im_low * carry_re + e_im[u]
            carry_re, carry_im = (
                q_re * carry_re - q_im * carry_im + low_re,
                q_re * carry_im + q_im * carry_re + low_im,
            )
    return carry_re, carry_im


@triton.jit
def store_lanes(buffer, seg, local, re, im, N: tl.constexpr, BD: tl.constexpr):
    """Modes [S,BD] to a buffer laid out [S,N,2,BD]."""
    for n in tl.static_range(N):
        at = buffer + (seg * N + n) * 2 * BD + local
        tl.store(at, re[n])
        tl.store(at + BD, im[n])


@triton.jit
def load_lanes(buffer, seg, local, N: tl.constexpr, BD: tl.constexpr):
    """The inverse of ``store_lanes``."""
    re = ()
    im = ()
    for n in tl.static_range(N):
        at = buffer + (seg * N + n) * 2 * BD + local
        re = re + (tl.load(at),)
        im = im + (tl.load(at + BD),)
    return re, im


@triton.jit(do_not_specialize=["T", "part_steps"])
def hyena_forward_kernel(z, weight, bias, poles, residues, skip, fir, iir, keep, ends, starts, parts, y, fir_out,
                         iir_out, T, part_steps,
                         D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr,
                         S: tl.constexpr, L: tl.constexpr, G: tl.constexpr, U1: tl.constexpr, U2: tl.constexpr,
                         BD: tl.constexpr, STATES_ONLY: tl.constexpr, PARTS: tl.constexpr,
                         HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_FIR: tl.constexpr,
                         HAS_IIR: tl.constexpr, HAS_MASK: tl.constexpr, STAGES1: tl.constexpr, STAGES2: tl.constexpr,
                         EVICT: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of BD channels, parts of time, rows).

    NP is N rounded up to a power of two; ``ends`` and ``starts`` are scratch, one [S,N,2,BD] per program; ``parts``
    [B, parts, D, N, 2] is what ``STATES_ONLY`` writes and the other mode reads, ``part_steps`` a multiple of S·L.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    W: tl.constexpr = K - 1
    TILE: tl.constexpr = S * L
    CHAIN: tl.constexpr = 4 if S >= 4 else S
    seg = tl.arange(0, S)[:, None]
    local = tl.arange(0, BD)[None, :]
    channel = block * BD + local
    inside = channel < D

    scratch = ((row * tl.num_programs(1) + part) * tl.num_programs(0) + block) * (S * 2 * N * BD)
    ends += scratch
    starts += scratch
    z += row * T * 3 * D + channel
    keep += row * T
    fir += (row * 3 * D + channel) * W

    taps1, off1 = load_taps(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    p_re, p_im = load_modes(poles, channel, inside, N)
    ladder = pole_ladder(p_re, p_im, G)

    # The chain has a lane per (mode, channel).
    lane = tl.arange(0, NP * BD)
    mode = lane // BD
    flat = (block * BD + lane % BD) * N + mode
    active = (mode < N) & (block * BD + lane % BD < D)
    address = mode * 2 * BD + lane % BD
    one_re = tl.load(poles + flat * 2, mask=active, other=0.0).to(tl.float64)
    one_im = tl.load(poles + flat * 2 + 1, mask=active, other=0.0).to(tl.float64)
    wide_re, wide_im = power(one_re, one_im, L)
    q_re, q_re_low = split_double(wide_re)
    q_im, q_im_low = split_double(wide_im)
    q = (q_re, q_re_low, q_im, q_im_low)

    carry_re = tl.zeros((NP * BD,), tl.float32)
    carry_im = tl.zeros((NP * BD,), tl.float32)
    if not STATES_ONLY:
        if HAS_IIR:
            carry_re = tl.load(iir + row * D * N * 2 + flat * 2, mask=active, other=0.0)
            carry_im = tl.load(iir + row * D * N * 2 + flat * 2 + 1, mask=active, other=0.0)
        if PARTS:  # what the parts before this one leave behind
            wide_re, wide_im = power(one_re, one_im, part_steps)
            sum_re = carry_re.to(tl.float64)
            sum_im = carry_im.to(tl.float64)
            for before in range(part):
                at = parts + ((row * (tl.num_programs(1) - 1) + before) * D * N + flat) * 2
                e_re = tl.load(at, mask=active, other=0.0)
                e_im = tl.load(at + 1, mask=active, other=0.0)
                sum_re, sum_im = (
                    wide_re * sum_re - wide_im * sum_im + e_re,
                    wide_re * sum_im + wide_im * sum_re + e_im,
                )
            carry_re = sum_re.to(tl.float32)
            carry_im = sum_im.to(tl.float32)

    begin = part * part_steps
    if STATES_ONLY:
        for start in range(begin, begin + part_steps, TILE):
            a = (start + seg * L).to(tl.int64)
            re, im = sweep_states(z + a * 3 * D, fir, keep, a, T, inside, taps1, off1, taps0, off0, ladder,
                                  D, N, L, U1, S, BD, False, HAS_FIR, HAS_MASK, STAGES1)  # fmt: skip
            store_lanes(ends, seg, local, re, im, N, BD)
            tl.debug_barrier()
            carry_re, carry_im = chain(ends, starts, carry_re, carry_im, q, address, active, N, S, BD, CHAIN)
            tl.debug_barrier()
        at = parts + ((row * tl.num_programs(1) + part) * D * N + flat) * 2
        tl.store(at, carry_re, mask=active)
        tl.store(at + 1, carry_im, mask=active)
    else:
        taps2, off2 = load_taps(weight, bias, channel, inside, K, HAS_BIAS)
        r_re, r_im = load_modes(residues, channel, inside, N)
        gain = tl.zeros((1, BD), tl.float32)
        if HAS_SKIP:
            gain = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
        y += row * T * D + channel
        end = tl.minimum(begin + part_steps, T)
        last = begin + ((end - begin - 1) // TILE) * TILE
        for start in range(begin, last, TILE):
            a = (start + seg * L).to(tl.int64)
            re, im = sweep_states(z + a * 3 * D, fir, keep, a, T, inside, taps1, off1, taps0, off0, ladder,
                                  D, N, L, U1, S, BD, False, HAS_FIR, HAS_MASK, STAGES1)  # fmt: skip
            store_lanes(ends, seg, local, re, im, N, BD)
            tl.debug_barrier()
            carry_re, carry_im = chain(ends, starts, carry_re, carry_im, q, address, active, N, S, BD, CHAIN)
            tl.debug_barrier()
            re, im = load_lanes(starts, seg, local, N, BD)
            sweep_output(z + a * 3 * D, y + a * D, fir, keep, a, T, inside, taps2, off2, taps1, off1, taps0, off0,
                         p_re, p_im, r_re, r_im, gain, re, im,
                         D, L, U2, False, HAS_FIR, HAS_MASK, STAGES2, EVICT)  # fmt: skip
        # The last tile, which may be shorter.
        a = (last + seg * L).to(tl.int64)
        re, im = sweep_states(z + a * 3 * D, fir, keep, a, T, inside, taps1, off1, taps0, off0, ladder,
                              D, N, L, U1, S, BD, True, HAS_FIR, HAS_MASK, 1)  # fmt: skip
        store_lanes(ends, seg, local, re, im, N, BD)
        tl.debug_barrier()
        chain(ends, starts, carry_re, carry_im, q, address, active, N, S, BD, CHAIN)
        tl.debug_barrier()
        re, im = load_lanes(starts, seg, local, N, BD)
        re, im = sweep_output(z + a * 3 * D, y + a * D, fir, keep, a, T, inside, taps2, off2, taps1, off1, taps0, off0,
                              p_re, p_im, r_re, r_im, gain, re, im,
                              D, L, U2, True, HAS_FIR, HAS_MASK, 1, EVICT)  # fmt: skip
        if end == T:
            everywhere = channel + seg * 0
            final = inside & (seg == (T - 1 - last) // L)
            store_modes(iir_out + row * D * N * 2, everywhere, final, re, im, N)
            first = inside & (seg == 0)
            for i in tl.static_range(3):
                for k in tl.static_range(W):
                    t = seg * 0 + (T - W + k)
                    value = load_step(z + t.to(tl.int64) * 3 * D + i * D, fir + i * D * W, keep, t, T, inside, W, True,
                                      HAS_FIR, HAS_MASK, "")  # fmt: skip
                    at = fir_out + (row * 3 * D + i * D + everywhere) * W + k
                    tl.store(at, value.to(fir_out.dtype.element_ty), mask=first)
