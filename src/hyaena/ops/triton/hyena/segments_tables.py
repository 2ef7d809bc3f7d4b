"""Tables of the kernels of ``segments``: filters' matrices as right factors, in the order in which lanes hold them."""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import power
from hyaena.ops.triton.hyena.modal import powers
from hyaena.ops.triton.hyena.segments_lanes import split, sum_columns
from hyaena.ops.triton.hyena.toeplitz import from_lane, pack
from hyaena.ops.triton.hyena.words import stack
from hyaena.ops.triton.pdl import gdc_launch_dependents


@triton.jit
def load_powers(poles, channel, mode, exponent, N: tl.constexpr, BITS: tl.constexpr, REAL: tl.constexpr):
    """``p^exponent`` in float32, right to 16 roundings: two terms of bfloat16 take one part in 2^17 of it."""
    at = poles + (channel * N + mode) * 2
    re = tl.load(at, mask=mode < N, other=0.0)
    im = tl.load(at + 1, mask=mode < N, other=0.0)
    if REAL:  # noqa: SIM108, one branch is compiled
        out = tl.exp(re * exponent), tl.exp(im * exponent)
    else:
        out = power(re, im, exponent, BITS)
    return out


@triton.jit
def load_enter(poles, channel, quad, lane, N: tl.constexpr, REAL: tl.constexpr, BACK: tl.constexpr):
    """Rows of Gᵀ of four modes: a lane's four steps, its column lane // 4, float32. BACK: p^(i+1), not p^(15-i)."""
    g = lane // 4
    mode = quad * 4 + g // 2
    re, im = load_powers(poles, channel, mode, lane % 4 * 4 + 1 if BACK else 12 - lane % 4 * 4, N, 4, REAL)
    p_re, p_im = load_powers(poles, channel, mode, 1 + tl.zeros_like(mode), N, 1, REAL)
    out = ()
    for _ in tl.static_range(4):
        now = tl.where(g % 2 == 0, re, im)
        if BACK:  # noqa: SIM108, one branch is compiled
            out = out + (now,)
        else:
            out = (now,) + out
        if REAL:
            re, im = re * p_re, im * p_im
        else:
            re, im = re * p_re - im * p_im, re * p_im + im * p_re
    return out


@triton.jit
def as_right_factor(rows, EMULATED: tl.constexpr):
    """A lane's four numbers of a right factor as its two terms, two words each."""
    a = split(rows[0], rows[1], EMULATED)
    b = split(rows[2], rows[3], EMULATED)
    return (a[0], b[0]), (a[1], b[1])


@triton.jit
def add_taps(taps, residues, channel, quad, rows, lane, N: tl.constexpr, REAL: tl.constexpr):
    """Add what a lane's mode gives to the taps 15 - s, s its four steps."""
    mode = quad * 4 + lane // 8
    part = lane // 4 % 2
    factor = tl.load(residues + (channel * N + mode) * 2 + part, mask=mode < N, other=0.0)
    if not REAL:
        factor = tl.where(part == 1, -factor, factor)
    out = ()
    for i in tl.static_range(4):
        out = out + (tl.fma(factor, rows[i], taps[i]),)
    return out


@triton.jit
def as_local(taps, skip, lane, BACK: tl.constexpr, EMULATED: tl.constexpr):
    """Hᵀ, or H if BACK, as a right factor, two words for each half of its columns, from the sums of ``add_taps``."""
    tap = tl.zeros(lane.shape, tl.int32)  # h[lane]
    back = 15 - lane % 16
    for i in tl.static_range(4):
        x = sum_columns(taps[i], lane, EMULATED).to(tl.int32, bitcast=True)
        tap = tl.where(back % 4 == i, from_lane(x, back // 4, EMULATED), tap)
    tap = tl.where(lane == 0, (tap.to(tl.float32, bitcast=True) + skip).to(tl.int32, bitcast=True), tap)
    g = lane // 4
    out = ()
    for second in tl.static_range(2):
        for part in tl.static_range(2):
            lag = g // 2 * 4 + g % 2 + 2 * second - lane % 4 * 4 - 2 * part
            lag = -lag if BACK else lag
            next = lag + 1 if BACK else lag - 1
            low = tl.where(lag >= 0, from_lane(tap, tl.maximum(lag, 0), EMULATED), 0)
            high = tl.where(next >= 0, from_lane(tap, tl.maximum(next, 0), EMULATED), 0)
            out = out + (pack(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True), EMULATED),)
    return out


@triton.jit
def load_leave(poles, residues, channel, mode, lane, N: tl.constexpr, REAL: tl.constexpr, BACK: tl.constexpr,
               EMULATED: tl.constexpr):  # fmt: skip
    """A lane's numbers of Rᵀ, of its column of either half, as words of two terms. BACK: r p^(15-j), not r p^(j+1)."""
    step = lane // 8 * 4 + lane // 4 % 2
    re, im = load_powers(poles, channel, mode, 13 - step if BACK else step + 1, N, 4, REAL)
    p_re, p_im = load_powers(poles, channel, mode, 2 + tl.zeros_like(mode), N, 2, REAL)
    at = residues + (channel * N + mode) * 2
    r_re = tl.load(at, mask=mode < N, other=0.0)
    r_im = tl.load(at + 1, mask=mode < N, other=0.0)
    both = ()
    for _ in tl.static_range(2):
        if REAL:
            a, b = r_re * re, r_im * im
            re, im = re * p_re, im * p_im
        else:
            a, b = r_re * re - r_im * im, -(r_re * im + r_im * re)
            re, im = re * p_re - im * p_im, re * p_im + im * p_re
        both = both + (split(a, b, EMULATED),)
    return both[1 if BACK else 0], both[0 if BACK else 1]


@triton.jit
def load_decays(poles, channel, mode, D: tl.constexpr, N: tl.constexpr, REAL: tl.constexpr):
    """The ``decays`` of ``find_states``, from powers in float64: they are applied thousands of times in a row."""
    re, im = powers(poles, channel, mode, 16 + tl.zeros_like(mode), D, N, 5, REAL)
    decays = ((re.to(tl.float32), im.to(tl.float32)),)
    done_re = tl.full(re.shape, 1.0, tl.float64)
    done_im = tl.full(re.shape, 1.0 if REAL else 0.0, tl.float64)
    for k in tl.static_range(3):
        if REAL:
            re, im = re * re, im * im
        else:
            re, im = re * re - im * im, 2.0 * re * im
        decays = decays + ((re.to(tl.float32), im.to(tl.float32)),)
        x = decays[k + 1][0].to(tl.float64)
        y = decays[k + 1][1].to(tl.float64)
        for _ in tl.static_range(2 if k == 0 else 1):
            if REAL:
                done_re, done_im = done_re * x, done_im * y
            else:
                done_re, done_im = done_re * x - done_im * y, done_re * y + done_im * x
    if REAL:
        re, im = re * re, im * im
    else:
        re, im = re * re - im * im, 2.0 * re * im
    return decays + (((re - done_re).to(tl.float32), (im - done_im).to(tl.float32)),)


@triton.jit
def store_words(to, words, here):
    """Store four words of every lane with one instruction of 16 bytes: four stores would write parts of sectors."""
    together = tl.reshape(stack(words, 4), (words[0].shape[0], 4))
    tl.store(to[:, None] + tl.arange(0, 4)[None, :], together, mask=here[:, None])


@triton.jit
def store_decays(poles, decays, D: tl.constexpr, N: tl.constexpr, WORDS: tl.constexpr, QUADS: tl.constexpr,
                 REAL: tl.constexpr):  # fmt: skip
    """Store the decays of a program's channels; a thread has a mode."""
    index = tl.arange(0, 32 * WORDS)  # a thread has one or nothing: other layouts would be rearranged
    channel = (tl.program_id(0) * WORDS + index // (4 * QUADS)) * 2 + tl.program_id(1)
    mode = index % (4 * QUADS)
    pairs = load_decays(poles, channel, mode, D, N, REAL)
    pairs = pairs + (pairs[4],)  # the last piece is filled up
    for k in tl.static_range(3):
        to = decays + (channel * QUADS + mode // 4) * 48 + k * 16 + mode % 4 * 4
        store_words(to, pairs[2 * k] + pairs[2 * k + 1], index < 4 * QUADS * WORDS)


@triton.jit
def segments_tables_kernel(poles, residues, skip, tables, decays, D: tl.constexpr, N: tl.constexpr, REAL: tl.constexpr,
                           WORDS: tl.constexpr, DIRECTIONS: tl.constexpr, HAS_SKIP: tl.constexpr,
                           EMULATED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The right factors of every channel, as lanes hold them, and its decays. Grid: (blocks of words, 2, BLOCKS + 2).

    ``tables`` int32 [D,DIRECTIONS,ENTRIES,32,4] has an entry of four words for H, two for R of every eight modes, or
    one of at most four, and one for G of four modes each; the second direction is that of the way back. ``decays``
    float32 [D,QUADS,3,4,4] are those of ``find_states``: five pairs in three pieces, of a lane's mode lane % 4.
    """
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    BLOCKS: tl.constexpr = (QUADS + 1) // 2
    ENTRIES: tl.constexpr = 1 + 2 * QUADS
    gdc_launch_dependents(OVERLAP)
    index = tl.arange(0, 32 * WORDS)
    lane = index % 32
    every = lane >= 0
    channel = (tl.program_id(0) * WORDS + index // 32) * 2 + tl.program_id(1)
    block = tl.program_id(2)
    entries = tables + channel * (DIRECTIONS * ENTRIES * 128) + lane * 4
    if block < BLOCKS:
        for back in tl.static_range(DIRECTIONS):
            of_r = ()
            for j in tl.static_range(2 if QUADS > 1 else 1):
                q = 2 * block + j
                rows = load_enter(poles, channel, q, lane, N, REAL, back == 1)
                terms = as_right_factor(rows, EMULATED)
                to = entries + (back * ENTRIES + 1 + QUADS + q) * 128
                store_words(to, terms[0] + terms[1], every)
                mode = 4 * q + lane % 4
                of_r = of_r + load_leave(poles, residues, channel, mode, lane, N, REAL, back == 1, EMULATED)
            to = entries + (back * ENTRIES + 1 + 2 * block) * 128
            if QUADS == 1:
                store_words(to, of_r[0] + of_r[1], every)
            else:
                for second in tl.static_range(2):
                    low = of_r[second]
                    high = of_r[2 + second]
                    store_words(to + second * 128, (low[0], high[0], low[1], high[1]), every)
    elif block == BLOCKS:
        none = tl.zeros(lane.shape, tl.float32)
        taps = (none, none, none, none)
        for n in tl.static_range(QUADS):
            rows = load_enter(poles, channel, n, lane, N, REAL, False)
            taps = add_taps(taps, residues, channel, n, rows, lane, N, REAL)
        gain = none
        if HAS_SKIP:
            gain = tl.load(skip + channel).to(tl.float32)
        for back in tl.static_range(DIRECTIONS):
            store_words(entries + back * ENTRIES * 128, as_local(taps, gain, lane, back == 1, EMULATED), every)
    else:
        store_decays(poles, decays, D, N, WORDS, QUADS, REAL)
