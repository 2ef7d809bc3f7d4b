"""The operator with many explicit taps, forward: z [B,T,3D] to y [B,T,D], the long filter as products on matrix units.

Neighbouring channels share a filter of W taps. A program owns BW words of one group, and RUNS runs of time, far apart,
which it walks through together in chunks of C steps. With w = u1·u0 of chunk c of all its runs as the columns of a
matrix [C,RUNS·channels], the filter is a few products::

    g[c] = Σ_d A_d w[c-d]        A_d[i,j] = h[C·d + i - j], zero where that is no tap        d = 0 … (W-2+C) // C

so that every chunk's w is formed once, and the columns are as many as matrix units want though few channels share a
filter. Runs exchange nothing: each forms w of the W-1 steps before it again.

Outside the products a thread owns a segment of L steps of one word, as in ``forward``: tensors are [BW,S] words and
[BW,S,P] numbers, S = (run, segment of the chunk); what a thread has of its steps is a tuple of L.

Factors of bfloat16 products are w rounded to bfloat16, as the plain operator rounds it, and taps in as many bfloat16
terms as their dtype needs, one for bfloat16 and two for others; sums are float32. For other dtypes of z the factors are
float32, each in two TF32 terms.

Packed documents (HAS_RESET): ``bounds`` as in ``launch.Boundaries``; ``docs`` int32 [B,T] numbers documents in rising
order, 0 before the first boundary. A chunk costs its products once for every document in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import convolve, forget, load_taps
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.words import forget_before, has, stack, stay, store_numbers, unpack, unpack_all, unstack


@triton.jit
def load_toeplitz(taps, d: tl.constexpr, W: tl.constexpr, C: tl.constexpr, TERMS: tl.constexpr, TYPE: tl.constexpr,
                  TURNED: tl.constexpr):  # fmt: skip
    """The matrix A_d [C,C] of W taps, or its transpose: a tuple of TERMS terms of TYPE."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    lag = d * C + (j - i if TURNED else i - j)
    h = tl.load(taps + lag, mask=(lag >= 0) & (lag < W), other=0.0)
    terms = (h.to(TYPE),)
    if TERMS == 2:
        terms = terms + ((h.to(tl.float32) - terms[0].to(tl.float32)).to(TYPE),)
    return terms


@triton.jit
def add_product(total, terms, x):
    """``total + A·x``, A the sum of the terms, one or two."""
    for term in tl.static_range(len(terms)):
        if x.dtype == tl.float32:
            total = tl.dot(terms[term], x, total, input_precision="tf32x3")
        else:
            total = tl.dot(terms[term], x, total)
    return total


@triton.jit
def times(start, stride, FIRST: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr):
    """Steps FIRST … FIRST+COUNT-1 of every segment, int32 [1,COUNT·S], (step, run, segment)."""
    column = tl.arange(0, triton.next_power_of_2(COUNT) * S)[None, :]
    seg = column % S
    return start + seg // (C // L) * stride + seg % (C // L) * L + column // S + FIRST


@triton.jit
def load_segments(z, short, word, inside, start, stride, T, bits, FIRST: tl.constexpr, COUNT: tl.constexpr,
                  S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr,
                  HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """COUNT words of every segment, from its step FIRST on: a tuple of [BW,S], zero at padding and outside 0 … T-1.

    Steps -W … -1 come from ``short``, if there is one.
    """
    words = ()
    if COUNT > 0:
        t = times(0, stride, FIRST, COUNT, S, L, C)
        at = z + tl.cast(start, tl.int64) * ROW + (t * ROW + word)
        t += start
        here = inside & (t.to(tl.uint32, bitcast=True) < tl.cast(T, tl.uint32))
        if HAS_SHORT and FIRST < 0:
            before = (t < 0) & (t >= -W)
            at = tl.where(before, short + (t + W) * ROW + word, at)
            here = here | (inside & before)
        if t.shape[1] > COUNT * S:
            here = here & (tl.arange(0, t.shape[1])[None, :] < COUNT * S)
        block = tl.load(at, mask=here, other=0)
        BW: tl.constexpr = block.shape[0]
        block = unstack(tl.permute(tl.reshape(stay(block), (BW, t.shape[1] // S, S)), (0, 2, 1)))
        for i in tl.static_range(COUNT):
            if HAS_MASK:  # noqa: SIM108, one branch is compiled
                words = words + (tl.where(has(bits, W + FIRST + i), block[i], 0),)
            else:
                words = words + (block[i],)
    return words


@triton.jit
def filter_segments(past, words, bits, bounds, taps, offset, P: tl.constexpr, TYPE: tl.constexpr,
                    HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """The short filter of one block at every step of the segments, a tuple; zero at padding."""
    W: tl.constexpr = len(past)
    if HAS_RESET:
        past = forget_before(past, bounds)
    history = unpack_all(past, P, TYPE)
    us = ()
    for i in tl.static_range(len(words)):
        if HAS_RESET:
            history = forget(history, has(bounds, W + i)[:, :, None])
        u, history = convolve(taps, offset, history, unpack(words[i], P, TYPE))
        if HAS_MASK:
            u = tl.where(has(bits, W + i)[:, :, None], u, 0.0)
        us = us + (u,)
    return us


@triton.jit
def to_matrix(xs, RUNS: tl.constexpr, TYPE: tl.constexpr):
    """A tuple of L tensors [BW,S,P] as the matrix [C,RUNS·BW·P] of TYPE."""
    BW: tl.constexpr = xs[0].shape[0]
    S: tl.constexpr = xs[0].shape[1]
    P: tl.constexpr = xs[0].shape[2]
    L: tl.constexpr = len(xs)
    x = tl.reshape(stack(xs, L), (BW, RUNS, S // RUNS, P, L))
    return tl.reshape(tl.permute(x, (2, 4, 1, 0, 3)), (S // RUNS * L, RUNS * BW * P)).to(TYPE)


@triton.jit
def from_matrix(x, RUNS: tl.constexpr, P: tl.constexpr, L: tl.constexpr):
    """The inverse of ``to_matrix``, float32."""
    SEGS: tl.constexpr = x.shape[0] // L
    BW: tl.constexpr = x.shape[1] // RUNS // P
    x = tl.permute(tl.reshape(x, (SEGS, L, RUNS, BW, P)), (3, 4, 1, 2, 0))
    x = tl.reshape(stay(tl.reshape(x, (BW, P * L * RUNS * SEGS))), (BW, P, L, RUNS * SEGS))
    return unstack(tl.permute(x, (0, 3, 1, 2)))


@triton.jit
def hold(xs):
    """A tuple of matrices as one tensor, for ``unstack``.

    Triton copies the inputs of a loop ahead only if the loop hands no value on for more than one round.
    """
    COUNT: tl.constexpr = triton.next_power_of_2(len(xs))
    return tl.reshape(stack(xs, COUNT), xs[0].shape + (COUNT,))


@triton.jit
def convolve_chunks(matrices, ws, docs, start, stride, T, C: tl.constexpr, RUNS: tl.constexpr,
                    HAS_RESET: tl.constexpr):  # fmt: skip
    """``Σ_d A_d ws[d]``, float32: ws are chunks at start, start - C, … of every run, in the order of the matrices."""
    COLUMNS: tl.constexpr = ws[0].shape[1]
    total = tl.zeros((C, COLUMNS), tl.float32)
    if HAS_RESET:
        run = tl.arange(0, COLUMNS)[None, :] // (COLUMNS // RUNS)
        begin = start + run * stride
        t = begin + tl.arange(0, C)[:, None]
        to = tl.load(docs + t, mask=t < T, other=-1)
        first = tl.load(docs + begin, mask=begin < T, other=0)
        last = tl.load(docs + tl.minimum(begin + C, T) - 1, mask=begin < T, other=0)
        for n in range(0, tl.max(last - first) + 1):
            part = tl.zeros_like(total)
            for d in tl.static_range(len(ws)):
                j = t - d * C
                origin = tl.load(docs + j, mask=(j >= 0) & (j < T), other=0)
                part = add_product(part, matrices[d], tl.where(origin == first + n, ws[d], 0.0).to(ws[d].dtype))
            total = tl.where(to == first + n, part, total)
    else:
        for d in tl.static_range(len(ws)):
            total = add_product(total, matrices[d], ws[d])
    return total


@triton.jit
def gated(z_1, z_0, short_1, short_0, keep, bounds, taps1, off1, taps0, off0, word, inside, start, stride, T,
          S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr,
          HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """w of the chunk at ``start`` of every run, a tuple of L tensors float32, and the segments' bits; zero at padding.

    Steps before 0, and from T on, are not what they should be: see ``before_zero``.
    """
    W: tl.constexpr = len(taps1) - 1
    t = times(start, stride, 0, 1, S, L, C)
    bits = t
    bound = t
    if HAS_MASK:
        bits = tl.load(keep + tl.minimum(tl.maximum(t, 0), T) // L)
    if HAS_RESET:
        bound = tl.load(bounds + tl.minimum(tl.maximum(t, 0), T) // L)
    past1 = load_segments(z_1, short_1, word, inside, start, stride, T, bits, -W, W, S, L, C, W, ROW, HAS_SHORT,
                          HAS_MASK)  # fmt: skip
    past0 = load_segments(z_0, short_0, word, inside, start, stride, T, bits, -W, W, S, L, C, W, ROW, HAS_SHORT,
                          HAS_MASK)  # fmt: skip
    words1 = load_segments(z_1, short_1, word, inside, start, stride, T, bits, 0, L, S, L, C, W, ROW, HAS_SHORT,
                           HAS_MASK)  # fmt: skip
    words0 = load_segments(z_0, short_0, word, inside, start, stride, T, bits, 0, L, S, L, C, W, ROW, HAS_SHORT,
                           HAS_MASK)  # fmt: skip
    u1 = filter_segments(past1, words1, bits, bound, taps1, off1, P, TYPE, HAS_MASK, HAS_RESET)
    u0 = filter_segments(past0, words0, bits, bound, taps0, off0, P, TYPE, HAS_MASK, HAS_RESET)
    ws = ()
    for i in tl.static_range(L):
        ws = ws + (u1[i] * u0[i],)
    return ws, bits, bound


@triton.jit
def before_zero(ws, long, channel, real, start, stride, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
                W: tl.constexpr, HAS_LONG: tl.constexpr):  # fmt: skip
    """``ws`` of a chunk that may lie before step 0, where it is the state [D,W-1], or zero."""
    out = ()
    for i in tl.static_range(L):
        t = times(start, stride, i, 1, S, L, C)[:, :, None]
        older = tl.zeros_like(ws[i])
        if HAS_LONG:
            older = tl.load(long + channel * (W - 1) + t + (W - 1), mask=real & (t < 0) & (t > -W), other=0.0)
        out = out + (tl.where(t < 0, older, ws[i]),)
    return out


@triton.jit(do_not_specialize=["T", "stride"])
def explicit_forward_kernel(z, weight, bias, taps, skip, short, long, keep, bounds, docs, y, long_out, T, stride,
                            TYPE: tl.constexpr, FACTOR: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
                            W: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, BW: tl.constexpr,
                            RUNS: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BACK: tl.constexpr,
                            TERMS: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                            HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr,
                            HAS_RESET: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of words, sets of runs and one more, rows).

    WIDTH channels share a filter. ``z``, ``short`` [B,K-1,3D] and ``y`` are in words of P numbers of TYPE, ``long``
    float32 [B,D,W-1]. ``stride`` is the length of a run, a multiple of C; BACK is the largest d; FACTOR the type of
    the products' factors. ``keep`` int32 [B,T/L+1] as ``launch.segment_bits`` makes it. The last program along time
    writes the state of the long filter.
    """
    S: tl.constexpr = RUNS * (C // L)
    ROW: tl.constexpr = 3 * D // P
    BLOCKS: tl.constexpr = (WIDTH + BW * P - 1) // (BW * P)
    group = tl.program_id(0) // BLOCKS
    place = tl.program_id(0) % BLOCKS * BW + tl.arange(0, BW)[:, None]
    inside = place < WIDTH // P
    word = group * (WIDTH // P) + place
    channel = word[:, :, None] * P + tl.arange(0, P)[None, None, :]
    real = inside[:, :, None]
    row = tl.program_id(2).to(tl.int64)
    z_2, z_1, z_0 = thirds(z + row * T * ROW, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW, ROW)
    y += row * T * (D // P)
    long += row * D * (W - 1)
    keep += row * (T // L + 1)
    bounds += row * (T // L + 1)
    docs += row * T
    T = tl.cast(T, tl.int32)
    taps2, off2 = load_taps(weight, bias, channel, real, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, real, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, real, K, HAS_BIAS)

    if tl.program_id(1) == tl.num_programs(1) - 1:
        # the last W-1 steps, cut at multiples of C as everywhere: the chunk of a step decides where it comes from
        saved = long_out + row * D * (W - 1) + channel * (W - 1) + W - 1 - T
        for back in range(0, BACK + 1, RUNS):
            start = (T - 1) // C * C - (back + RUNS - 1) * C
            ws, _, _ = gated(z_1, z_0, short_1, short_0, keep, bounds, taps1, off1, taps0, off0, word, inside, start,
                             C, T, S, L, C, ROW, P, TYPE, HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
            ws = before_zero(ws, long, channel, real, start, C, S, L, C, W, HAS_LONG)
            for i in tl.static_range(L):
                t = times(start, C, i, 1, S, L, C)[:, :, None]
                w = ws[i]
                if HAS_RESET:
                    origin = tl.load(docs + t, mask=(t >= 0) & (t < T), other=0)
                    w = tl.where(origin == tl.load(docs + T - 1), w, 0.0)
                tl.store(saved + t, w, mask=real & (t < T) & (t > T - W))
    else:
        gain = tl.zeros(channel.shape, tl.float32)
        if HAS_SKIP:
            gain = tl.load(skip + channel, mask=real, other=0.0).to(tl.float32)
        matrices = ()
        for d in tl.static_range(BACK + 1):
            matrices = matrices + (load_toeplitz(taps + group * W, d, W, C, TERMS, FACTOR, False),)
        first = tl.program_id(1) * (stride * RUNS)
        past = ()
        for d in tl.static_range(1, BACK + 1):
            start = first - d * C
            ws, _, _ = gated(z_1, z_0, short_1, short_0, keep, bounds, taps1, off1, taps0, off0, word, inside, start,
                             stride, T, S, L, C, ROW, P, TYPE, HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
            ws = before_zero(ws, long, channel, real, start, stride, S, L, C, W, HAS_LONG)
            past = past + (to_matrix(ws, RUNS, FACTOR),)
        held = hold(past)
        for start in tl.range(first, first + stride, C, num_stages=STAGES):
            past = unstack(held)[:BACK]
            ws, bits, bound = gated(z_1, z_0, short_1, short_0, keep, bounds, taps1, off1, taps0, off0, word, inside,
                                    start, stride, T, S, L, C, ROW, P, TYPE, HAS_SHORT, HAS_MASK,
                                    HAS_RESET)  # fmt: skip
            past2 = load_segments(z_2, short_2, word, inside, start, stride, T, bits, 1 - K, K - 1, S, L, C, K - 1,
                                  ROW, HAS_SHORT, HAS_MASK)  # fmt: skip
            words2 = load_segments(z_2, short_2, word, inside, start, stride, T, bits, 0, L, S, L, C, K - 1, ROW,
                                   HAS_SHORT, HAS_MASK)  # fmt: skip
            us = filter_segments(past2, words2, bits, bound, taps2, off2, P, TYPE, HAS_MASK, HAS_RESET)
            chunks = (to_matrix(ws, RUNS, FACTOR),) + past
            gs = from_matrix(convolve_chunks(matrices, chunks, docs, start, stride, T, C, RUNS, HAS_RESET), RUNS, P, L)
            t = times(0, stride, 0, 1, S, L, C)
            to = y + tl.cast(start, tl.int64) * (D // P) + (t * (D // P) + word)
            for i in tl.static_range(L):
                out = tl.fma(gain, ws[i], gs[i]) * us[i]
                store_numbers(to + i * (D // P), out, inside & (start + t + i < T), P, TYPE)
            held = hold(chunks[:BACK])
