"""The operator with many modes, forward: z [B,T,3D] to y [B,T,D], the long filter as products on matrix units.

A program owns the channels of BW words of one row and walks through time, tile by tile. A tile is M segments of C
steps; for every channel, with w = u1·u0 of the tile as a matrix [C,M], and s the states before the segments [2N,M]::

    e = G w              what a segment adds to the modes        G[n,j] = p_n^(C-1-j)
    s[m+1] = p^C s[m] + e[m]
    g = H w + R s        H[i,j] = h[i-j], the first C taps, the skip among them        R[i,n] = r_n p_n^(i+1)

A mode has a row of G for its real part and one for its imaginary part, and a column of R for each. The cost of a number
is that of three small products, where the recurrence of ``forward`` multiplies it by every mode's pole.

Outside the products a thread owns L steps of one word, as in ``explicit``. Factors are bfloat16: of H and w one term;
of G, R, s and w for the modes two, whose product leaves out that of the low terms, so that the modes are right to
float32's rounding, nearly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import load_taps, pole, power
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.explicit import filter_segments, gated, load_segments, times
from hyaena.ops.triton.hyena.forward import move
from hyaena.ops.triton.hyena.words import stack, stay, store_numbers, unstack


@triton.jit
def terms(x, TYPE: tl.constexpr):
    """A float32 tensor as the sum of two of bfloat16; itself if TYPE is float32."""
    high = x.to(TYPE)
    out = (high,)
    if TYPE == tl.bfloat16:  # noqa: SIM300
        out = out + ((x - high.to(tl.float32)).to(TYPE),)
    return out


@triton.jit
def multiply(a, b, total):
    """``total + a·b``, both sums of terms; the product of two low terms is left out."""
    if len(a) == 1:
        total = tl.dot(a[0], b[0], total, input_precision="tf32x3")
    else:
        total = tl.dot(a[1], b[0], total)
        total = tl.dot(a[0], b[1], total)
        total = tl.dot(a[0], b[0], total)
    return total


@triton.jit
def powers(poles, channel, mode, exponent, D: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, REAL: tl.constexpr):
    """``p^exponent`` of modes of channels, a float64 pair."""
    re, im = pole(poles, (channel * N + mode) * 2, (channel < D) & (mode < N), REAL)
    none = (exponent * 0).to(tl.float64)
    return power(re + none, im + none, exponent, BITS, REAL)


@triton.jit
def residue_powers(poles, residues, channel, mode, exponent, D: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
                   REAL: tl.constexpr):  # fmt: skip
    """What ``p^exponent`` of a state's two numbers adds to the output: two factors, float64."""
    re, im = powers(poles, channel, mode, exponent, D, N, BITS, REAL)
    inside = (channel < D) & (mode < N)
    at = residues + (channel * N + mode) * 2
    r_re = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    r_im = tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
    if REAL:
        return r_re * re, r_im * im
    return r_re * re - r_im * im, -(r_re * im + r_im * re)


@triton.jit
def to_matrices(xs, M: tl.constexpr):
    """A tuple of L tensors [BW,S,P] as matrices [BW·P,C,M]."""
    BW: tl.constexpr = xs[0].shape[0]
    S: tl.constexpr = xs[0].shape[1]
    P: tl.constexpr = xs[0].shape[2]
    L: tl.constexpr = len(xs)
    x = tl.reshape(stack(xs, L), (BW, M, S // M, P, L))
    return tl.reshape(tl.permute(x, (0, 3, 2, 4, 1)), (BW * P, S // M * L, M))


@triton.jit
def from_matrices(x, P: tl.constexpr, L: tl.constexpr):
    """The inverse of ``to_matrices``."""
    BW: tl.constexpr = x.shape[0] // P
    C: tl.constexpr = x.shape[1]
    M: tl.constexpr = x.shape[2]
    x = tl.permute(tl.reshape(x, (BW, P, C // L, L, M)), (0, 1, 3, 4, 2))
    x = tl.reshape(stay(tl.reshape(x, (BW, P * L * M * (C // L)))), (BW, P, L, M * (C // L)))
    return unstack(tl.permute(x, (0, 3, 1, 2)))


@triton.jit
def chain(e, carry_re, carry_im, decay, rest, NP: tl.constexpr, REAL: tl.constexpr):
    """The states [CH,2·NP,M] before the segments of a tile, from what they add, and the state after it, two [NP,CH]."""
    CH: tl.constexpr = e.shape[0]
    M: tl.constexpr = e.shape[2]
    x = tl.permute(tl.reshape(e, (CH, 2, NP, M)), (2, 1, 3, 0))
    x = tl.reshape(stay(tl.reshape(x, (NP, 2 * M * CH))), (NP, 2 * M, CH))
    xs = unstack(tl.permute(x, (0, 2, 1)))
    re = ()
    im = ()
    at_re = carry_re
    at_im = carry_im
    for m in tl.static_range(M):
        re = re + (at_re,)
        im = im + (at_im,)
        at_re, at_im = move(decay, at_re, at_im, xs[m], xs[M + m], REAL)
    at_re, at_im = move(rest, carry_re, carry_im, at_re, at_im, REAL)
    before = tl.reshape(stack(re + im, 2 * M), (NP, CH, 2, M))
    return tl.reshape(tl.permute(before, (1, 2, 0, 3)), (CH, 2 * NP, M)), at_re, at_im


@triton.jit
def pick(x, here, NP: tl.constexpr):
    """The column of x [CH,2·NP,M] that is ``here``, two [NP,CH]."""
    column = tl.sum(tl.where(here, x, 0.0), axis=2)
    return tl.split(tl.permute(tl.reshape(column, (column.shape[0], 2, NP)), (2, 0, 1)))


@triton.jit
def modal_tables_kernel(poles, residues, skip, taps, toeplitz, into, out_of, FACTOR: tl.constexpr, REAL: tl.constexpr,
                        D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, CH: tl.constexpr, C: tl.constexpr,
                        TERMS: tl.constexpr, HAS_SKIP: tl.constexpr):  # fmt: skip
    """The matrices of CH channels: ``toeplitz`` [D,C,C], ``into`` [TERMS,D,2·NP,C] and ``out_of`` [TERMS,D,C,2·NP].

    ``taps`` float32 [D,C] is room for the first taps. Powers are formed in float64. Grid: (blocks of channels,).
    """
    line = tl.program_id(0) * CH + tl.arange(0, CH)[:, None]
    step = tl.arange(0, C)[None, :]
    h = tl.zeros((CH, C), tl.float64)
    if HAS_SKIP:
        h += tl.where(step == 0, tl.load(skip + line, mask=line < D, other=0.0).to(tl.float64), 0.0)
    for n in range(NP):
        a, b = residue_powers(poles, residues, line, n, step, D, N, 6, REAL)
        h += a
        if REAL:
            h += b
        e_re, e_im = powers(poles, line, n, C - 1 - step, D, N, 6, REAL)
        a, b = residue_powers(poles, residues, line, n, step + 1, D, N, 6, REAL)
        e_re = terms(e_re.to(tl.float32), FACTOR)
        e_im = terms(e_im.to(tl.float32), FACTOR)
        a = terms(a.to(tl.float32), FACTOR)
        b = terms(b.to(tl.float32), FACTOR)
        for k in tl.static_range(TERMS):
            to = into + (k * D + line) * (2 * NP * C) + step
            tl.store(to + n * C, e_re[k], mask=line < D)
            tl.store(to + (NP + n) * C, e_im[k], mask=line < D)
            to = out_of + ((k * D + line) * C + step) * (2 * NP)
            tl.store(to + n, a[k], mask=line < D)
            tl.store(to + NP + n, b[k], mask=line < D)
    tl.store(taps + line * C + step, h.to(tl.float32), mask=line < D)
    tl.debug_barrier()
    i = tl.arange(0, C)[None, :, None]
    j = tl.arange(0, C)[None, None, :]
    owner = line[:, :, None]
    h = tl.load(taps + owner * C + (i - j), mask=(i >= j) & (owner < D), other=0.0)
    tl.store(toeplitz + (owner * C + i) * C + j, h.to(FACTOR), mask=owner < D)


@triton.jit
def load_matrices(table, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CH: tl.constexpr, D: tl.constexpr,
                  TERMS: tl.constexpr):  # fmt: skip
    """The terms of the matrices [CH,ROWS,COLUMNS] of a block of channels."""
    line = block * CH + tl.arange(0, CH)[:, None, None]
    i = tl.arange(0, ROWS)[None, :, None]
    j = tl.arange(0, COLUMNS)[None, None, :]
    out = ()
    for k in tl.static_range(TERMS):
        at = table + ((k * D + line) * ROWS + i) * COLUMNS + j
        out = out + (tl.load(at, mask=line < D, other=0.0),)
    return out


@triton.jit(do_not_specialize=["T"])
def modal_forward_kernel(z, weight, bias, poles, toeplitz, into, out_of, short, long, keep, y, long_out, T,
                         TYPE: tl.constexpr, FACTOR: tl.constexpr, TERMS: tl.constexpr, REAL: tl.constexpr,
                         D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
                         BW: tl.constexpr, M: tl.constexpr, C: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
                         HAS_BIAS: tl.constexpr, HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr,
                         HAS_MASK: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of words, rows).

    ``z``, ``short`` [B,K-1,3D] and ``y`` are in words of P numbers of TYPE; NP is N as a power of two, at least 8;
    ``keep`` int32 [B,T/L+1] as ``launch.segment_bits`` makes it; the matrices come from ``modal_tables_kernel``.
    """
    TILE: tl.constexpr = M * C
    S: tl.constexpr = TILE // L
    CH: tl.constexpr = BW * P
    BITS: tl.constexpr = 8
    ROW: tl.constexpr = 3 * D // P
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    word = block * BW + tl.arange(0, BW)[:, None]
    inside = word < D // P
    channel = word[:, :, None] * P + tl.arange(0, P)[None, None, :]
    real = inside[:, :, None]
    z_2, z_1, z_0 = thirds(z + row * T * ROW, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW, ROW)
    y += row * T * (D // P)
    keep += row * (T // L + 1)
    T = tl.cast(T, tl.int32)
    taps2, off2 = load_taps(weight, bias, channel, real, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, real, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, real, K, HAS_BIAS)
    local = load_matrices(toeplitz, block, C, C, CH, D, 1)
    enter = load_matrices(into, block, 2 * NP, C, CH, D, TERMS)
    leave = load_matrices(out_of, block, C, 2 * NP, CH, D, TERMS)

    mode = tl.arange(0, NP)[:, None]
    owner = block * CH + tl.arange(0, CH)[None, :]
    active = (mode < N) & (owner < D)
    flat = row * D * N * 2 + (owner * N + mode) * 2
    one_re, one_im = powers(poles, owner, mode, C + tl.zeros_like(mode), D, N, BITS, REAL)
    decay = (one_re.to(tl.float32), one_im.to(tl.float32))
    all_re, all_im = power(one_re, one_im, M, 8, REAL)
    done_re, done_im = power(decay[0].to(tl.float64), decay[1].to(tl.float64), M, 8, REAL)
    rest = ((all_re - done_re).to(tl.float32), (all_im - done_im).to(tl.float32))
    carry_re = tl.zeros((NP, CH), tl.float32)
    carry_im = tl.zeros((NP, CH), tl.float32)
    if HAS_LONG:
        carry_re += tl.load(long + flat, mask=active, other=0.0)
        carry_im += tl.load(long + flat + 1, mask=active, other=0.0)

    steps = times(0, 0, 0, 1, S, L, TILE)
    last_re = carry_re  # the state before the last tile
    last_im = carry_im
    for start in tl.range(0, T, TILE, num_stages=STAGES):
        ws, bits, bound = gated(z_1, z_0, short_1, short_0, keep, keep, taps1, off1, taps0, off0, word, inside, start,
                                0, T, S, L, TILE, ROW, P, TYPE, HAS_SHORT, HAS_MASK, False)  # fmt: skip
        past2 = load_segments(z_2, short_2, word, inside, start, 0, T, bits, 1 - K, K - 1, S, L, TILE, K - 1, ROW,
                              HAS_SHORT, HAS_MASK)  # fmt: skip
        words2 = load_segments(z_2, short_2, word, inside, start, 0, T, bits, 0, L, S, L, TILE, K - 1, ROW, HAS_SHORT,
                               HAS_MASK)  # fmt: skip
        w = terms(to_matrices(ws, M), FACTOR)
        e = multiply(enter, w, tl.zeros((CH, 2 * NP, M), tl.float32))
        g = tl.dot(local[0], w[0], tl.zeros((CH, C, M), tl.float32), input_precision="tf32x3")
        last_re = tl.where(active, carry_re, 0.0)
        last_im = tl.where(active, carry_im, 0.0)
        s, carry_re, carry_im = chain(e, carry_re, carry_im, decay, rest, NP, REAL)
        gs = from_matrices(multiply(leave, terms(s, FACTOR), g), P, L)
        us = filter_segments(past2, words2, bits, bound, taps2, off2, P, TYPE, HAS_MASK, False)
        to = y + tl.cast(start, tl.int64) * (D // P) + (steps * (D // P) + word)
        for k in tl.static_range(L):
            store_numbers(to + k * (D // P), gs[k] * us[k], inside & (start + steps + k < T), P, TYPE)

    count = T % TILE
    if count > 0:  # the last tile ends within a segment: its whole segments again, and the steps after them
        tail, _, _ = gated(z_1, z_0, short_1, short_0, keep, keep, taps1, off1, taps0, off0, word, inside, T - count, 0,
                           T, S, L, TILE, ROW, P, TYPE, HAS_SHORT, HAS_MASK, False)  # fmt: skip
        tails = terms(to_matrices(tail, M), FACTOR)
        nothing = tl.zeros((CH, 2 * NP, M), tl.float32)
        before, _, _ = chain(multiply(enter, tails, nothing), last_re, last_im, decay, rest, NP, REAL)
        part = tl.arange(0, 2 * NP)[None, :, None]
        j = tl.arange(0, C)[None, None, :]
        line = block * CH + tl.arange(0, CH)[:, None, None]
        at = into + (line * (2 * NP) + part) * C + j + C - count % C  # powers for the steps there are
        added = ()
        for k in tl.static_range(TERMS):
            kept = (line < D) & (j < count % C)
            added = added + (tl.load(at + k * D * (2 * NP * C), mask=kept, other=0.0),)
        here = tl.arange(0, M)[None, None, :] == count // C
        e_re, e_im = pick(multiply(added, tails, nothing), here, NP)
        s_re, s_im = pick(before, here, NP)
        p_re, p_im = powers(poles, owner, mode, count % C + tl.zeros_like(mode), D, N, BITS, REAL)
        carry_re, carry_im = move((p_re.to(tl.float32), p_im.to(tl.float32)), s_re, s_im, e_re, e_im, REAL)
    tl.store(long_out + flat, carry_re, mask=active)
    tl.store(long_out + flat + 1, carry_im, mask=active)
