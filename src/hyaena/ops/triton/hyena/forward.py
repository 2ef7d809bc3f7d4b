"""The forward kernel: z [B,T,3D] to y [B,T,D] and the state of the modes, every number read once and written once.

A program owns BD channels of one row and walks through time, tile by tile. A tile is S segments of L steps; a thread
owns a segment of P neighbouring channels, whose numbers share a word of 32 bits::

    states    from x1 and v, every thread: w = u1·u0, kept in registers, and the state at the end of its segment, had
              the segment begun at zero
    chain     S[j+1] = p^L S[j] + E[j] through the segments, the state carried from tile to tile
    output    from w and x2, every thread from its true state: y

The words of coming tiles are copied into shared memory meanwhile, STAGES tiles deep, so that memory need not wait for
arithmetic. The last steps, fewer than L, are computed one by one. Programs exchange nothing. Where rows and channels
are too few to fill the device, time is cut into parts: the same kernel with ``STATES_ONLY`` first finds what each part
adds to the state.

Packed documents (HAS_RESET): where a document begins, the history of the short filters and the modes become zero. To
the state at the end of its segment a step adds only if no document begins after it, and p^L in the chain is 0 for a
segment in which one begins. ``launch.Boundaries`` says how the kernel learns where.

Tensors are [BD/P,S] words, [BD/P,S,P] numbers, and in the chain [RUNS,R], of runs of up to four segments and of every
mode and channel.

Triton chooses the layout of a tensor over the threads, and converts between layouts through shared memory. A gather
fixes the layout: the gathered axis lies inside a warp. So ``stay``, a gather that moves nothing, sets the layout. Words
and numbers: channels along the threads, then segments; steps in registers. The chain: runs along the threads, then
modes and channels; the segments of a run in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import (
    advance,
    convolve,
    forget,
    gather,
    load_modes,
    load_poles,
    load_residues,
    load_taps,
    pole,
    pole_ladder,
    power,
    store_modes,
)
from hyaena.ops.triton.hyena.products import (
    as_matrices,
    as_steps,
    document_numbers,
    ends_to_rows,
    in_two,
    load_tables,
    multiply,
    only,
    outputs,
    rows_to_states,
)
from hyaena.ops.triton.hyena.words import (
    forget_before,
    has,
    load_words,
    stack,
    stay,
    store_numbers,
    unpack,
    unpack_all,
    unstack,
)


@triton.jit
def segment_states(past1, words1, past0, words0, bits, bounds, taps1, off1, taps0, off0, ladder,
                   P: tl.constexpr, TYPE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr,
                   REAL: tl.constexpr):  # fmt: skip
    """``w`` of all steps, a tuple, and the modes after them from zero, two tuples. Blocks: 1 is x1, 0 is v."""
    W: tl.constexpr = len(past1)
    G: tl.constexpr = len(ladder)
    h1 = unpack_all(past1, P, TYPE)
    h0 = unpack_all(past0, P, TYPE)
    ws = ()
    re = ()
    im = ()
    for i in tl.static_range(0, len(words1), G):
        group = ()
        for g in tl.static_range(G):
            if HAS_RESET:
                begins = has(bounds, W + i + g)[:, :, None]
                h1 = forget(h1, begins)
                h0 = forget(h0, begins)
            u1, h1 = convolve(taps1, off1, h1, unpack(words1[i + g], P, TYPE))
            u0, h0 = convolve(taps0, off0, h0, unpack(words0[i + g], P, TYPE))
            w = u1 * u0
            if HAS_MASK:
                w = tl.where(has(bits, W + i + g)[:, :, None], w, 0.0)
            ws = ws + (w,)
            if HAS_RESET:  # no document begins after this step
                w = tl.where((bounds >> (W + i + g + 1) == 0)[:, :, None], w, 0.0)
            group = group + (w,)
        if i == 0:
            for _ in tl.static_range(len(ladder[0][0])):
                re = re + (tl.zeros_like(group[0]),)
                im = im + (tl.zeros_like(group[0]),)
        re, im = gather(ladder, re, im, group, REAL)
    return ws, re, im


@triton.jit
def load_recurrence(poles, residues, skip, channel, real, N: tl.constexpr, REAL: tl.constexpr, HAS_SKIP: tl.constexpr):
    """Poles and residues, two tuples each, and the skip: what steps of the recurrence need."""
    p_re, p_im = load_poles(poles, channel, real, N, REAL)
    r_re, r_im = load_residues(residues, channel, real, N, REAL)
    gain = tl.zeros(channel.shape, tl.float32)
    if HAS_SKIP:
        gain = tl.load(skip + channel, mask=real, other=0.0).to(tl.float32)
    return p_re, p_im, r_re, r_im, gain


@triton.jit
def segment_products(past1, words1, past0, words0, bits, bounds, taps1, off1, taps0, off0,
                     P: tl.constexpr, TYPE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """``w`` of all steps, a tuple. Blocks: 1 is x1, 0 is v."""
    W: tl.constexpr = len(past1)
    h1 = unpack_all(past1, P, TYPE)
    h0 = unpack_all(past0, P, TYPE)
    ws = ()
    for i in tl.static_range(len(words1)):
        if HAS_RESET:
            begins = has(bounds, W + i)[:, :, None]
            h1 = forget(h1, begins)
            h0 = forget(h0, begins)
        u1, h1 = convolve(taps1, off1, h1, unpack(words1[i], P, TYPE))
        u0, h0 = convolve(taps0, off0, h0, unpack(words0[i], P, TYPE))
        w = u1 * u0
        if HAS_MASK:
            w = tl.where(has(bits, W + i)[:, :, None], w, 0.0)
        ws = ws + (w,)
    return ws


@triton.jit
def output_step(history, x, w, taps, offset, p_re, p_im, r_re, r_im, gain, re, im, REAL: tl.constexpr):
    """One step: y, and the history and the modes after it."""
    u, history = convolve(taps, offset, history, x)
    re, im = advance(p_re, p_im, re, im, w, REAL)
    out = gain * w
    for n in tl.static_range(len(re)):
        out = tl.fma(r_re[n], re[n], tl.fma(-r_im[n], im[n], out))
    return out * u, history, re, im


@triton.jit
def to_rows(re, im, NP: tl.constexpr, RUN: tl.constexpr):
    """Modes, two tuples of N [BD/P,S,P], by runs of segments: two tuples of RUN [S/RUN,R], R of (mode, channel)."""
    BW: tl.constexpr = re[0].shape[0]
    S: tl.constexpr = re[0].shape[1]
    P: tl.constexpr = re[0].shape[2]
    parts = tl.reshape(tl.join(stack(re, NP), stack(im, NP)), (BW, S // RUN, RUN, P, NP, 2))
    rows = tl.reshape(tl.permute(parts, (1, 5, 2, 4, 0, 3)), (S // RUN, 2 * RUN * NP * BW * P))
    rows = tl.reshape(stay(rows), (S // RUN, 2 * RUN, NP * BW * P))
    rows = unstack(tl.permute(rows, (0, 2, 1)))
    return rows[:RUN], rows[RUN:]


@triton.jit
def from_rows(re, im, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr):
    """The inverse of ``to_rows``."""
    RUN: tl.constexpr = len(re)
    RUNS: tl.constexpr = re[0].shape[0]
    BW: tl.constexpr = re[0].shape[1] // NP // P
    parts = tl.reshape(stack(re + im, 2 * RUN), (RUNS, NP, BW, P, 2, RUN))
    parts = tl.reshape(tl.permute(parts, (2, 3, 1, 4, 0, 5)), (BW, P * NP * 2 * RUNS * RUN))
    parts = tl.reshape(stay(parts), (BW, P, NP, 2, RUNS * RUN))
    re, im = tl.split(tl.permute(parts, (0, 4, 1, 2, 3)))
    return unstack(re)[:N], unstack(im)[:N]


@triton.jit
def chain(re, im, carry_re, carry_im, decay, run_decay, rest, begins, HAS_RESET: tl.constexpr,
          REAL: tl.constexpr):  # fmt: skip
    """Carry the state through the segments of a tile, run by run.

    Args:
        re, im: what segments add, two tuples of RUN tensors [RUNS,R]: segment i of every run.
        carry_re, carry_im: the state before the tile, [RUNS,R], the same for every run.
        decay, run_decay: p^L, p^(RUN·L), complex [1,R].
        rest: what RUNS powers of ``run_decay`` leave of p^(S·L): from tile to tile, over 10^5 steps, the rounding of
            one decay would add up; within a tile it does not.
        begins: int64, bit j: a document begins in segment j of the tile, through which no state passes.

    Returns:
        The states before every segment, as ``re`` and ``im``, and the state after the tile.
    """
    RUNS: tl.constexpr = re[0].shape[0]
    RUN: tl.constexpr = len(re)
    run = tl.arange(0, RUNS)[:, None]
    sum_re = re[0]  # what a run adds
    sum_im = im[0]
    for i in tl.static_range(1, RUN):
        if HAS_RESET:
            cut = has(begins, run * RUN + i)
            sum_re = tl.where(cut, 0.0, sum_re)
            sum_im = tl.where(cut, 0.0, sum_im)
        sum_re, sum_im = move(decay, sum_re, sum_im, re[i], im[i], REAL)
    next_re = carry_re
    next_im = carry_im
    at_re = carry_re  # the state before a run
    at_im = carry_im
    for i in tl.static_range(RUNS):
        place = tl.full(run.shape, i, tl.int32).broadcast_to(sum_re.shape)
        if HAS_RESET:
            cut = (begins >> (i * RUN)) & ((1 << RUN) - 1) != 0
            next_re = tl.where(cut, 0.0, next_re)
            next_im = tl.where(cut, 0.0, next_im)
        next_re, next_im = move(run_decay, next_re, next_im, tl.gather(sum_re, place, 0), tl.gather(sum_im, place, 0),
                                REAL)  # fmt: skip
        at_re = tl.where(run == i + 1, next_re, at_re)
        at_im = tl.where(run == i + 1, next_im, at_im)
    before_re = (at_re,)
    before_im = (at_im,)
    for i in tl.static_range(RUN - 1):
        if HAS_RESET:
            cut = has(begins, run * RUN + i)
            at_re = tl.where(cut, 0.0, at_re)
            at_im = tl.where(cut, 0.0, at_im)
        at_re, at_im = move(decay, at_re, at_im, re[i], im[i], REAL)
        before_re = before_re + (at_re,)
        before_im = before_im + (at_im,)
    if HAS_RESET:
        carry_re = tl.where(begins != 0, 0.0, carry_re)
        carry_im = tl.where(begins != 0, 0.0, carry_im)
    next_re, next_im = move(rest, carry_re, carry_im, next_re, next_im, REAL)
    return before_re, before_im, next_re, next_im


@triton.jit
def save_state(saved, re, im, block, N: tl.constexpr, BD: tl.constexpr, D: tl.constexpr):
    """Store a state [NP·BD] of the chain."""
    line = tl.arange(0, re.shape[0])
    channel = block * BD + line % BD
    to = saved + (channel * N + line // BD) * 2
    inside = (line // BD < N) & (channel < D)
    tl.store(to, re, mask=inside)
    tl.store(to + 1, im, mask=inside)


@triton.jit
def move(q, re, im, x_re, x_im, REAL: tl.constexpr):
    """``q·s + x``, all complex; or, with REAL, of two real modes."""
    if REAL:
        return tl.fma(q[0], re, x_re), tl.fma(q[1], im, x_im)
    return tl.fma(q[0], re, tl.fma(-q[1], im, x_re)), tl.fma(q[0], im, tl.fma(q[1], re, x_im))


@triton.jit
def chain_decays(p_re, p_im, L: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, REAL: tl.constexpr):
    """``decay``, ``run_decay`` and ``rest`` of ``chain``, of poles in float64."""
    q_re, q_im = power(p_re, p_im, L, 5, REAL)
    run_re, run_im = power(q_re, q_im, RUN, 3, REAL)
    decay = (q_re.to(tl.float32), q_im.to(tl.float32))
    run_decay = (run_re.to(tl.float32), run_im.to(tl.float32))
    all_re, all_im = power(run_re, run_im, RUNS, 5, REAL)
    done_re, done_im = power(run_decay[0].to(tl.float64), run_decay[1].to(tl.float64), RUNS, 5, REAL)
    return decay, run_decay, ((all_re - done_re).to(tl.float32), (all_im - done_im).to(tl.float32))


@triton.jit(do_not_specialize=["T", "part_steps"])
def hyena_forward_kernel(z, weight, bias, poles, residues, skip, short, long, keep, bounds, tiles, cuts, response,
                         gathers, readouts, parts, y, long_out, T, part_steps, TYPE: tl.constexpr,
                         PRODUCTS: tl.constexpr, OPERAND: tl.constexpr, REAL: tl.constexpr, M: tl.constexpr,
                         D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
                         S: tl.constexpr, L: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
                         STATES_ONLY: tl.constexpr, PARTS: tl.constexpr,
                         HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_SHORT: tl.constexpr,
                         HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of BD channels, parts of time, rows).

    ``z``, ``short`` [B,K-1,3D] and ``y`` are in words of P numbers of TYPE. NP is N rounded up to a power of two;
    ``keep`` int32 [B,T/L+1] has a bit for every step from K-1 before a segment to its end, see ``launch.segment_bits``;
    ``bounds``, ``tiles`` and ``cuts`` are the first fields of ``launch.Boundaries``; ``parts`` [B, parts, D, N, 2] is
    what ``STATES_ONLY`` writes and the other mode reads, ``part_steps`` a multiple of S·L.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    W: tl.constexpr = K - 1
    TILE: tl.constexpr = S * L
    ROW: tl.constexpr = 3 * D // P
    WHOLE: tl.constexpr = D % BD == 0
    seg = tl.arange(0, S)[None, :]
    word = block * (BD // P) + tl.arange(0, BD // P)[:, None]
    inside = word * P < D
    channel = word[:, :, None] * P + tl.arange(0, P)[None, None, :]
    real = channel < D
    z_2 = z + row * T * ROW
    z_1 = z_2 + ROW // 3
    z_0 = z_1 + ROW // 3
    short_2 = short + row * W * ROW
    short_1 = short_2 + ROW // 3
    short_0 = short_1 + ROW // 3
    y += row * T * (D // P) + word
    keep += row * (T // L + 1)
    bounds += row * (T // L + 1)
    tiles += row * ((T + TILE - 1) // TILE)
    cuts += row * ((T + part_steps - 1) // part_steps)

    taps2, off2 = load_taps(weight, bias, channel, real, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, real, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, real, K, HAS_BIAS)
    if PRODUCTS:
        every = block * BD + tl.arange(0, BD)[:, None, None]
        toeplitz, to_modes, of_modes = load_tables(response, gathers, readouts, every, D, L, M)
    else:
        p_re, p_im, r_re, r_im, gain = load_recurrence(poles, residues, skip, channel, real, N, REAL, HAS_SKIP)
        ladder = pole_ladder(p_re, p_im, G, REAL)

    RUN: tl.constexpr = S if S < 4 else 4
    RUNS: tl.constexpr = S // RUN
    run = tl.arange(0, RUNS)[:, None]
    line = tl.arange(0, NP * BD)[None, :]  # of the chain: (mode, channel)
    active = (line // BD < N) & (block * BD + line % BD < D)
    flat = ((block * BD + line % BD) * N + line // BD) * 2
    one_re, one_im = pole(poles, flat, active, REAL)
    decay, run_decay, rest = chain_decays(one_re, one_im, L, RUN, RUNS, REAL)

    carry_re = tl.zeros((RUNS, NP * BD), tl.float32)
    carry_im = tl.zeros((RUNS, NP * BD), tl.float32)
    if not STATES_ONLY:
        if HAS_LONG:
            carry_re += tl.load(long + row * D * N * 2 + flat, mask=active, other=0.0)
            carry_im += tl.load(long + row * D * N * 2 + flat + 1, mask=active, other=0.0)
        if PARTS:  # what the parts before this one leave behind
            wide_re, wide_im = power(one_re, one_im, part_steps, 31, REAL)
            sum_re = carry_re.to(tl.float64)
            sum_im = carry_im.to(tl.float64)
            for before in range(part):
                if HAS_RESET:
                    cut = tl.load(cuts + before) != 0
                    sum_re = tl.where(cut, 0.0, sum_re)
                    sum_im = tl.where(cut, 0.0, sum_im)
                at = parts + (row * (tl.num_programs(1) - 1) + before) * D * N * 2 + flat
                e_re = tl.load(at, mask=active, other=0.0)
                e_im = tl.load(at + 1, mask=active, other=0.0)
                if REAL:
                    sum_re = wide_re * sum_re + e_re
                    sum_im = wide_im * sum_im + e_im
                else:
                    sum_re, sum_im = (
                        wide_re * sum_re - wide_im * sum_im + e_re,
                        wide_re * sum_im + wide_im * sum_re + e_im,
                    )
            carry_re = sum_re.to(tl.float32)
            carry_im = sum_im.to(tl.float32)

    begin = part * part_steps
    end = tl.minimum(begin + part_steps, T)
    whole = begin + (end - begin) // L * L  # where the whole segments of this part end
    if STATES_ONLY:  # noqa: SIM108, one branch is compiled
        saved = parts + (row * tl.num_programs(1) + part) * D * N * 2
    else:
        saved = long_out + row * D * N * 2
    if begin == whole:  # fewer steps than a segment: they go on from the carry
        saved_re = tl.sum(tl.where(run == 0, carry_re, 0.0), axis=0)
        saved_im = tl.sum(tl.where(run == 0, carry_im, 0.0), axis=0)
        save_state(saved, saved_re, saved_im, block, N, BD, D)
    for start in tl.range(begin, whole, TILE, num_stages=STAGES):
        # Threads beyond the whole segments read the last one again and write nothing.
        last = whole - L
        a = tl.minimum(start + seg * L, last)
        bits = seg
        if HAS_MASK:
            bits = tl.load(keep + a // L)
        bound = seg
        begins = tl.zeros((), tl.int64)
        if HAS_RESET:
            bound = tl.load(bounds + a // L)
            begins = tl.load(tiles + start // TILE)
        past1 = load_words(z_1, short_1, word, start, last, bits, -W, W, S, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
        past0 = load_words(z_0, short_0, word, start, last, bits, -W, W, S, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
        words1 = load_words(z_1, short_1, word, start, last, bits, 0, L, S, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
        words0 = load_words(z_0, short_0, word, start, last, bits, 0, L, S, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
        if HAS_RESET:
            past1 = forget_before(past1, bound)
            past0 = forget_before(past0, bound)
        if not STATES_ONLY:
            past2 = load_words(z_2, short_2, word, start, last, bits, -W, W, S, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
            words2 = load_words(z_2, short_2, word, start, last, bits, 0, L, S, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
            if HAS_RESET:
                past2 = forget_before(past2, bound)
        if PRODUCTS:
            ws = segment_products(past1, words1, past0, words0, bits, bound, taps1, off1, taps0, off0,
                                  P, TYPE, HAS_MASK, HAS_RESET)  # fmt: skip
            w = in_two(as_matrices(ws))
            seen = w
            numbers = seg
            if HAS_RESET:  # what a segment adds comes of its last document
                numbers = document_numbers(bound, W, L)
                seen = only(w, numbers == tl.max(numbers, axis=2)[:, :, None])
            ends = multiply(seen, to_modes, tl.zeros((BD, S, M), tl.float32), OPERAND)
            row_re, row_im = ends_to_rows(ends, NP, P, RUN)
        else:
            ws, re, im = segment_states(past1, words1, past0, words0, bits, bound, taps1, off1, taps0, off0, ladder,
                                        P, TYPE, HAS_MASK, HAS_RESET, REAL)  # fmt: skip
            row_re, row_im = to_rows(re, im, NP, RUN)
        row_re, row_im, carry_re, carry_im = chain(row_re, row_im, carry_re, carry_im, decay, run_decay, rest,
                                                   begins, HAS_RESET, REAL)  # fmt: skip
        if start + TILE >= whole:  # noqa: SIM102, one condition is a constant
            if STATES_ONLY or end == T:  # the state that this tile leaves is the last
                count = (whole - start) // L
                last_re = tl.where(active & (run * RUN + S == count), carry_re, 0.0)
                last_im = tl.where(active & (run * RUN + S == count), carry_im, 0.0)
                for i in tl.static_range(RUN):
                    last_re += tl.where(active & (run * RUN + i == count), row_re[i], 0.0)
                    last_im += tl.where(active & (run * RUN + i == count), row_im[i], 0.0)
                save_state(saved, tl.sum(last_re, axis=0), tl.sum(last_im, axis=0), block, N, BD, D)
        if not STATES_ONLY:
            history = unpack_all(past2, P, TYPE)
            written = inside & (start + seg * L < whole)
            if PRODUCTS:
                outs = as_steps(outputs(w, in_two(rows_to_states(row_re, row_im, NP, M)), numbers, toeplitz, of_modes,
                                        OPERAND, HAS_RESET), P)  # fmt: skip
            else:
                re, im = from_rows(row_re, row_im, N, NP, P)
            for i in tl.static_range(L):
                if HAS_RESET:
                    first = has(bound, W + i)[:, :, None]
                    history = forget(history, first)
                if PRODUCTS:
                    u2, history = convolve(taps2, off2, history, unpack(words2[i], P, TYPE))
                    out = outs[i] * u2
                else:
                    if HAS_RESET:
                        re = forget(re, first)
                        im = forget(im, first)
                    out, history, re, im = output_step(history, unpack(words2[i], P, TYPE), ws[i], taps2, off2,
                                                       p_re, p_im, r_re, r_im, gain, re, im, REAL)  # fmt: skip
                if HAS_MASK:
                    out = tl.where(has(bits, W + i)[:, :, None], out, 0.0)
                store_numbers(y + (a.to(tl.int64) + i) * (D // P), out, written, P, TYPE)
    if not STATES_ONLY:  # noqa: SIM102, one condition is a constant
        if whole < end:  # the steps of no whole segment: the last of all
            tl.debug_barrier()
            bits = tl.full((1, 1), 0, tl.int32)
            if HAS_MASK:
                bits = tl.load(keep + bits + whole // L)
            past2 = load_words(z_2, short_2, word, whole, whole, bits, -W, W, 1, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
            past1 = load_words(z_1, short_1, word, whole, whole, bits, -W, W, 1, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
            past0 = load_words(z_0, short_0, word, whole, whole, bits, -W, W, 1, L, W, D, P, WHOLE, HAS_SHORT, HAS_MASK)
            bound = tl.full((1, 1), 0, tl.int32)
            if HAS_RESET:
                bound = tl.load(bounds + bound + whole // L)
                past2 = forget_before(past2, bound)
                past1 = forget_before(past1, bound)
                past0 = forget_before(past0, bound)
            h2 = unpack_all(past2, P, TYPE)
            h1 = unpack_all(past1, P, TYPE)
            h0 = unpack_all(past0, P, TYPE)
            if PRODUCTS:
                p_re, p_im, r_re, r_im, gain = load_recurrence(poles, residues, skip, channel, real, N, REAL, HAS_SKIP)
            re, im = load_modes(saved, channel, real, N)
            for step in range(whole, end):
                t = step + tl.zeros((), tl.int64)
                now = inside
                if HAS_MASK:
                    now = inside & has(bits, W + step - whole)
                x2 = unpack(tl.load(z_2 + t * ROW + word, mask=now, other=0), P, TYPE)
                x1 = unpack(tl.load(z_1 + t * ROW + word, mask=now, other=0), P, TYPE)
                x0 = unpack(tl.load(z_0 + t * ROW + word, mask=now, other=0), P, TYPE)
                if HAS_RESET:
                    first = has(bound, W + step - whole)[:, :, None]
                    h2 = forget(h2, first)
                    h1 = forget(h1, first)
                    h0 = forget(h0, first)
                    re = forget(re, first)
                    im = forget(im, first)
                u1, h1 = convolve(taps1, off1, h1, x1)
                u0, h0 = convolve(taps0, off0, h0, x0)
                w = tl.where(now[:, :, None], u1 * u0, 0.0)
                out, h2, re, im = output_step(h2, x2, w, taps2, off2, p_re, p_im, r_re, r_im, gain, re, im,
                                             REAL)  # fmt: skip
                store_numbers(y + t * (D // P), tl.where(now[:, :, None], out, 0.0), inside, P, TYPE)
            store_modes(saved, channel, real, re, im, N)
