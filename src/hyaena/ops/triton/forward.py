"""The forward kernel: z [B,T,3D] to y [B,T,D] and the state of the modes, every number read once and written once.

A program owns BD channels of one row and walks through time, tile by tile. A tile is S segments of L steps; a lane owns
a segment of P neighbouring channels, whose numbers share a word of 32 bits, so that a lane reads and writes words::

    states    from x1 and v, every lane: w = u1·u0, kept in registers, and the state at the end of its segment, had the
              segment begun at zero
    chain     S[j+1] = p^L S[j] + E[j] through the segments, the state carried from tile to tile
    output    from w and x2, every lane from its true state: y

The words of a tile are asked for while the tile before it is computed, so that memory need not wait for arithmetic.
The last steps, fewer than L, are computed one by one. Programs exchange nothing. Where rows and channels are too few to
fill the device, time is cut into parts: the same kernel with ``STATES_ONLY`` finds what each part adds to the state.

Tensors are [BD/P,S] words, and [BD/P,S,P] numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import (
    advance,
    convolve,
    gather,
    load_modes,
    load_taps,
    pole_ladder,
    power,
    store_modes,
)


@triton.jit
def unpack(word, P: tl.constexpr, TYPE: tl.constexpr):
    """The numbers of words [.,.], float32 [.,.,P]."""
    if P == 1:
        numbers = word.to(tl.float32)[:, :, None]
    elif TYPE == tl.bfloat16:  # noqa: SIM300
        bits = word.to(tl.uint32, bitcast=True)
        low = (bits << 16).to(tl.float32, bitcast=True)  # the upper half of a float32
        high = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        numbers = tl.join(low, high)
    else:
        bits = word.to(tl.uint32, bitcast=True)
        low = bits.to(tl.uint16).to(TYPE, bitcast=True).to(tl.float32)
        high = (bits >> 16).to(tl.uint16).to(TYPE, bitcast=True).to(tl.float32)
        numbers = tl.join(low, high)
    return numbers


@triton.jit
def load_word(pointer, keep, t, inside, WHOLE: tl.constexpr, HAS_MASK: tl.constexpr, EVICT: tl.constexpr):
    """The words of step t; zero at padding.

    Args:
        inside: bool [BD/P,1], the channels exist; all of them do if WHOLE.
        keep: the padding mask of this row, a byte per step.
    """
    if HAS_MASK:
        word = tl.load(pointer, mask=inside & (tl.load(keep + t) != 0), other=0, eviction_policy=EVICT)
    elif WHOLE:
        word = tl.load(pointer, eviction_policy=EVICT)
    else:
        word = tl.load(pointer, mask=inside, other=0, eviction_policy=EVICT)
    return word


@triton.jit
def load_history(z_a, fir, keep, a, inside, ROW: tl.constexpr, W: tl.constexpr, HAS_FIR: tl.constexpr,
                 HAS_MASK: tl.constexpr):  # fmt: skip
    """The words of the W steps before step a, oldest first; those before step 0 come from ``fir``, W rows of words."""
    words = ()
    for k in tl.static_range(W):
        t = a - (W - k)
        here = inside & (t >= 0)
        if HAS_MASK:
            here = here & (tl.load(keep + t, mask=t >= 0, other=0) != 0)
        word = tl.load(z_a - (W - k) * ROW, mask=here, other=0)
        if HAS_FIR:  # of two words one is zero
            word += tl.load(fir + (t + W) * ROW, mask=inside & (t < 0), other=0)
        words = words + (word,)
    return words


@triton.jit
def load_segment(z, fir, keep, a, inside, ROW: tl.constexpr, W: tl.constexpr, L: tl.constexpr, WHOLE: tl.constexpr,
                 HAS_FIR: tl.constexpr, HAS_MASK: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """The W + L words that a segment of L steps from step a needs of one of the three blocks."""
    words = load_history(z + a * ROW, fir, keep, a, inside, ROW, W, HAS_FIR, HAS_MASK)
    for i in tl.static_range(L):
        words = words + (load_word(z + a * ROW + i * ROW, keep, a + i, inside, WHOLE, HAS_MASK, EVICT),)
    return words


@triton.jit
def unpack_history(words, W: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr):
    """The first W of some words, for ``convolve``."""
    history = ()
    for k in tl.static_range(W):
        history = history + (unpack(words[k], P, TYPE),)
    return history


@triton.jit
def segment_states(words1, words0, keep, a, taps1, off1, taps0, off0, ladder, L: tl.constexpr,
                   P: tl.constexpr, TYPE: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """``w`` of L steps, a tuple, and the modes after them from zero, two tuples. Blocks: 1 is x1, 0 is v."""
    W: tl.constexpr = len(taps1) - 1
    G: tl.constexpr = len(ladder)
    h1 = unpack_history(words1, W, P, TYPE)
    h0 = unpack_history(words0, W, P, TYPE)
    ws = ()
    re = ()
    im = ()
    for i in tl.static_range(0, L, G):
        group = ()
        for g in tl.static_range(G):
            u1, h1 = convolve(taps1, off1, h1, unpack(words1[W + i + g], P, TYPE))
            u0, h0 = convolve(taps0, off0, h0, unpack(words0[W + i + g], P, TYPE))
            w = u1 * u0
            if HAS_MASK:
                w = tl.where((tl.load(keep + a + (i + g)) != 0)[:, :, None], w, 0.0)
            group = group + (w,)
        if i == 0:
            for _ in tl.static_range(len(ladder[0][0])):
                re = re + (tl.zeros_like(group[0]),)
                im = im + (tl.zeros_like(group[0]),)
        re, im = gather(ladder, re, im, group)
        ws = ws + group
    return ws, re, im


@triton.jit
def output_step(history, x, w, taps, offset, p_re, p_im, r_re, r_im, gain, re, im):
    """One step: y, and the history and the modes after it."""
    u, history = convolve(taps, offset, history, x)
    re, im = advance(p_re, p_im, re, im, w)
    out = gain * w
    for n in tl.static_range(len(re)):
        out = tl.fma(r_re[n], re[n], tl.fma(-r_im[n], im[n], out))
    return out * u, history, re, im


@triton.jit
def segment_output(words, ws, y_a, z_b, keep, a, b, inside, real, taps, offset, p_re, p_im, r_re, r_im, gain, re, im,
                   D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr,
                   HAS_MASK: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """y of L steps from the true states.

    Args:
        z_b: where step b lies, the first of the segment whose words are asked for meanwhile.
        real: bool [BD/P,S,P], the segments and channels to be written.

    Returns:
        Those words, without their history.
    """
    W: tl.constexpr = len(taps) - 1
    history = unpack_history(words, W, P, TYPE)
    coming = ()
    for i in tl.static_range(L):
        out, history, re, im = output_step(history, unpack(words[W + i], P, TYPE), ws[i], taps, offset,
                                           p_re, p_im, r_re, r_im, gain, re, im)  # fmt: skip
        if HAS_MASK:
            out = tl.where((tl.load(keep + a + i) != 0)[:, :, None], out, 0.0)
        tl.store(y_a + i * D, out.to(TYPE), mask=real, eviction_policy=EVICT)
        coming = coming + (load_word(z_b + i * (3 * D // P), keep, b + i, inside, WHOLE, HAS_MASK, EVICT),)
    return coming


@triton.jit
def chain(ends, starts, carry_re, carry_im, q, rest, address, active,
          N: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, U: tl.constexpr):  # fmt: skip
    """Carry the state through the S segments of a tile, a lane per (mode, channel); returns it after the last.

    ``q`` is p^L in float32, and ``rest`` what S powers of it leave of p^(S·L): from tile to tile, over 10^5 steps, the
    rounding of one decay would add up; within a tile it does not.
    """
    SEGMENT: tl.constexpr = 2 * N * BD
    re = carry_re
    im = carry_im
    for i in tl.range(0, S, U):
        e_re = ()
        e_im = ()
        for u in tl.static_range(U):
            at = ends + (i + u) * SEGMENT + address
            e_re = e_re + (tl.load(at, mask=active, other=0.0),)
            e_im = e_im + (tl.load(at + BD, mask=active, other=0.0),)
        for u in tl.static_range(U):
            at = starts + (i + u) * SEGMENT + address
            tl.store(at, re, mask=active)
            tl.store(at + BD, im, mask=active)
            re, im = move(q, re, im, e_re[u], e_im[u])
    re, im = move(rest, carry_re, carry_im, re, im)
    tl.store(starts + S * SEGMENT + address, re, mask=active)
    tl.store(starts + S * SEGMENT + address + BD, im, mask=active)
    return re, im


@triton.jit
def move(q, re, im, x_re, x_im):
    """``q·s + x``, all complex."""
    return tl.fma(q[0], re, tl.fma(-q[1], im, x_re)), tl.fma(q[0], im, tl.fma(q[1], re, x_im))


@triton.jit
def store_lanes(buffer, seg, local, re, im, N: tl.constexpr, BD: tl.constexpr):
    """Modes [BD/P,S,P] to a buffer laid out [S,N,2,BD]."""
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
def hyena_forward_kernel(z, weight, bias, poles, residues, skip, fir, iir, keep, scratch, parts, y, iir_out,
                         T, part_steps, TYPE: tl.constexpr,
                         D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
                         S: tl.constexpr, L: tl.constexpr, G: tl.constexpr, BD: tl.constexpr,
                         STATES_ONLY: tl.constexpr, PARTS: tl.constexpr,
                         HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_FIR: tl.constexpr,
                         HAS_IIR: tl.constexpr, HAS_MASK: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of BD channels, parts of time, rows).

    ``z`` and ``fir`` [B,K-1,3D] are in words of P numbers of TYPE. NP is N rounded up to a power of two; ``ends`` and
    ``starts`` are scratch, [S,N,2,BD] and one more of S per program; ``parts`` [B, parts, D, N, 2] is what
    ``STATES_ONLY`` writes and the other mode reads, ``part_steps`` a multiple of S·L.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    W: tl.constexpr = K - 1
    TILE: tl.constexpr = S * L
    U: tl.constexpr = 8 if S >= 8 else S
    ROW: tl.constexpr = 3 * D // P
    WHOLE: tl.constexpr = D % BD == 0
    seg = tl.arange(0, S)[None, :]
    word = block * (BD // P) + tl.arange(0, BD // P)[:, None]
    inside = word * P < D
    wide = seg[:, :, None]
    local = tl.arange(0, BD // P)[:, None, None] * P + tl.arange(0, P)[None, None, :]
    channel = block * BD + local
    real = channel < D

    program = (row * tl.num_programs(1) + part) * tl.num_programs(0) + block
    ends = scratch + program * ((2 * S + 1) * 2 * N * BD)
    starts = ends + S * 2 * N * BD
    z += row * T * ROW + word
    z_1 = z + ROW // 3
    z_0 = z + 2 * (ROW // 3)
    fir += row * W * ROW + word
    fir_1 = fir + ROW // 3
    fir_0 = fir + 2 * (ROW // 3)
    y += row * T * D + channel
    keep += row * T

    taps2, off2 = load_taps(weight, bias, channel, real, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, real, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, real, K, HAS_BIAS)
    p_re, p_im = load_modes(poles, channel, real, N)
    r_re, r_im = load_modes(residues, channel, real, N)
    gain = tl.zeros_like(off0)
    if HAS_SKIP:
        gain = tl.load(skip + channel, mask=real, other=0.0).to(tl.float32)
    ladder = pole_ladder(p_re, p_im, G)

    lane = tl.arange(0, NP * BD)  # of the chain: (mode, channel)
    mode = lane // BD
    flat = (block * BD + lane % BD) * N + mode
    active = (mode < N) & (block * BD + lane % BD < D)
    address = mode * 2 * BD + lane % BD
    one_re = tl.load(poles + flat * 2, mask=active, other=0.0).to(tl.float64)
    one_im = tl.load(poles + flat * 2 + 1, mask=active, other=0.0).to(tl.float64)
    q_re, q_im = power(one_re, one_im, L)
    q = (q_re.to(tl.float32), q_im.to(tl.float32))
    all_re, all_im = power(q_re, q_im, S)
    most_re, most_im = power(q[0].to(tl.float64), q[1].to(tl.float64), S)
    rest = ((all_re - most_re).to(tl.float32), (all_im - most_im).to(tl.float32))

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
    end = tl.minimum(begin + part_steps, T)
    whole = begin + (end - begin) // L * L  # where the whole segments of this part end
    newest = whole * 0  # the place in ``starts`` of the state there
    if begin < whole:
        # Lanes beyond the whole segments read the last one again and write nothing.
        a = tl.minimum(begin + seg * L, whole - L).to(tl.int64)
        words1 = load_segment(z_1, fir_1, keep, a, inside, ROW, W, L, WHOLE, HAS_FIR, HAS_MASK, EVICT)
        words0 = load_segment(z_0, fir_0, keep, a, inside, ROW, W, L, WHOLE, HAS_FIR, HAS_MASK, EVICT)
        if not STATES_ONLY:
            words2 = load_segment(z, fir, keep, a, inside, ROW, W, L, WHOLE, HAS_FIR, HAS_MASK, EVICT)
        for start in range(begin, whole, TILE):
            b = tl.minimum(start + TILE + seg * L, whole - L).to(tl.int64)
            ws, re, im = segment_states(words1, words0, keep, a, taps1, off1, taps0, off0, ladder, L, P, TYPE,
                                        HAS_MASK)  # fmt: skip
            words1 = load_segment(z_1, fir_1, keep, b, inside, ROW, W, L, WHOLE, HAS_FIR, HAS_MASK, EVICT)
            words0 = load_segment(z_0, fir_0, keep, b, inside, ROW, W, L, WHOLE, HAS_FIR, HAS_MASK, EVICT)
            store_lanes(ends, wide, local, re, im, N, BD)
            tl.debug_barrier()
            carry_re, carry_im = chain(ends, starts, carry_re, carry_im, q, rest, address, active, N, S, BD, U)
            tl.debug_barrier()
            if not STATES_ONLY:
                re, im = load_lanes(starts, wide, local, N, BD)
                history = load_history(z + b * ROW, fir, keep, b, inside, ROW, W, HAS_FIR, HAS_MASK)
                coming = segment_output(
                    words2, ws, y + a[:, :, None] * D, z + b * ROW, keep, a, b, inside,
                    real & (start + wide * L < whole), taps2, off2, p_re, p_im, r_re, r_im, gain, re, im,
                    D, L, P, TYPE, WHOLE, HAS_MASK, EVICT,
                )  # fmt: skip
                words2 = history + coming
            a = b
        newest = ((whole - begin) // L - 1) % S + 1
    if STATES_ONLY:
        at = parts + ((row * tl.num_programs(1) + part) * D * N + flat) * 2
        tl.store(at, carry_re, mask=active)
        tl.store(at + 1, carry_im, mask=active)
    else:
        if begin == whole:
            tl.store(starts + address, carry_re, mask=active)
            tl.store(starts + address + BD, carry_im, mask=active)
            tl.debug_barrier()
        re, im = load_lanes(starts, newest, local, N, BD)
        a = whole.to(tl.int64)
        h2 = unpack_history(load_history(z + a * ROW, fir, keep, a, inside, ROW, W, HAS_FIR, HAS_MASK), W, P, TYPE)
        h1 = unpack_history(load_history(z_1 + a * ROW, fir_1, keep, a, inside, ROW, W, HAS_FIR, HAS_MASK), W, P, TYPE)
        h0 = unpack_history(load_history(z_0 + a * ROW, fir_0, keep, a, inside, ROW, W, HAS_FIR, HAS_MASK), W, P, TYPE)
        for step in range(whole, end):
            t = step + tl.zeros((), tl.int64)
            x2 = unpack(load_word(z + t * ROW, keep, t, inside, WHOLE, HAS_MASK, EVICT), P, TYPE)
            x1 = unpack(load_word(z_1 + t * ROW, keep, t, inside, WHOLE, HAS_MASK, EVICT), P, TYPE)
            x0 = unpack(load_word(z_0 + t * ROW, keep, t, inside, WHOLE, HAS_MASK, EVICT), P, TYPE)
            u1, h1 = convolve(taps1, off1, h1, x1)
            u0, h0 = convolve(taps0, off0, h0, x0)
            w = u1 * u0
            if HAS_MASK:
                w = tl.where(tl.load(keep + t) != 0, w, 0.0)
            out, h2, re, im = output_step(h2, x2, w, taps2, off2, p_re, p_im, r_re, r_im, gain, re, im)
            if HAS_MASK:
                out = tl.where(tl.load(keep + t) != 0, out, 0.0)
            tl.store(y + t * D, out.to(TYPE), mask=real)
        if end == T:
            store_modes(iir_out + row * D * N * 2, channel, real, re, im, N)
