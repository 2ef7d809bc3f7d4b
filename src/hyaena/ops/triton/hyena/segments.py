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
from hyaena.ops.triton.hyena.modal import powers
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, load_filters, multiply, pack
from hyaena.ops.triton.hyena.words import stack, unstack

TILE = tl.constexpr(256)
"""Steps of a tile."""


@triton.jit
def split(a, b, EMULATED: tl.constexpr):
    """Two float32 numbers as words of two bfloat16 terms."""
    high = pack(a, b, EMULATED)
    return high, pack(a - half(high, False), b - half(high, True), EMULATED)


@triton.jit
def multiply_short(a, b, c, EMULATED: tl.constexpr):
    """``c + a·b`` by mma.m16n8k8: tuples of 2 and 1 words of bfloat16, and of 4 float32."""
    if EMULATED:
        none = tl.zeros_like(a[0])
        c = multiply((a[0], a[1], none, none), (b[0], none), c, EMULATED)
    else:
        c = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
            "=f,=f,=f,=f,r,r,r,f,f,f,f",
            [a[0], a[1], b[0], c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return c


@triton.jit
def multiply_terms(a, b, c, EMULATED: tl.constexpr):
    """``c + a·b`` of factors of two terms, the product of the low ones left out."""
    if len(a[0]) == 2:
        c = multiply_short(a[1], b[0], c, EMULATED)
        c = multiply_short(a[0], b[1], c, EMULATED)
        c = multiply_short(a[0], b[0], c, EMULATED)
    else:
        c = multiply(a[1], b[0], c, EMULATED)
        c = multiply(a[0], b[1], c, EMULATED)
        c = multiply(a[0], b[0], c, EMULATED)
    return c


@triton.jit
def add_earlier(q, re, im, distance, lane, REAL: tl.constexpr, EMULATED: tl.constexpr):
    """``q·s' + s``, s' that of the lane so many before, zero where there is none."""
    if EMULATED:
        at = tl.maximum(tl.arange(0, re.shape[0]) - distance, 0)
        there = lane >= distance
        a = tl.where(there, tl.gather(re, at, 0), 0.0)
        b = tl.where(there, tl.gather(im, at, 0), 0.0)
        re, im = move(q, a, b, re, im, REAL)
    elif REAL:
        re, im = tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .f32 a, b;"
            "shfl.sync.up.b32 a|p, $2, $6, 0, 0xffffffff; shfl.sync.up.b32 b|p, $3, $6, 0, 0xffffffff;"
            "mov.f32 $0, $2; mov.f32 $1, $3;"
            "@p fma.rn.f32 $0, $4, a, $0; @p fma.rn.f32 $1, $5, b, $1;}",
            "=&f,=&f,f,f,f,f,r",
            [re, im, q[0], q[1], distance],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        re, im = tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .f32 a, b, m;"
            "shfl.sync.up.b32 a|p, $2, $6, 0, 0xffffffff; shfl.sync.up.b32 b|p, $3, $6, 0, 0xffffffff;"
            "mov.f32 $0, $2; mov.f32 $1, $3; neg.f32 m, $5;"
            "@p fma.rn.f32 $0, $4, a, $0; @p fma.rn.f32 $1, $4, b, $1;"
            "@p fma.rn.f32 $0, m, b, $0; @p fma.rn.f32 $1, $5, a, $1;}",
            "=&f,=&f,f,f,f,f,r",
            [re, im, q[0], q[1], distance],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return re, im


@triton.jit
def lane_before(x, other, lane, EMULATED: tl.constexpr):
    """x of the lane four before, ``other`` where there is none."""
    if EMULATED:
        at = tl.maximum(tl.arange(0, x.shape[0]) - 4, 0)
        out = tl.where(lane >= 4, tl.gather(x, at, 0), other)
    else:
        out = tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b32 a; shfl.sync.up.b32 a|p, $1, 4, 0, 0xffffffff; selp.b32 $0, a, $2, p;}",
            "=f,f,f",
            [x, other],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return out


@triton.jit
def last_to_first(x, lane, EMULATED: tl.constexpr):
    """x of the last four lanes in the first four, zero in the others."""
    if EMULATED:
        at = tl.minimum(tl.arange(0, x.shape[0]) + 28, x.shape[0] - 1)
        out = tl.where(lane < 4, tl.gather(x, at, 0), 0.0)
    else:
        out = tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b32 a; shfl.sync.down.b32 a|p, $1, 28, 31, 0xffffffff; selp.b32 $0, a, 0, p;}",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return out


@triton.jit
def tile_steps():
    """The steps of a tile's rows, int32 [TILE]: neighbours are those of neighbouring lanes, not of time."""
    row = tl.arange(0, TILE)
    lane = row % 32
    return lane // 4 * 32 + lane % 4 * 4 + row // 128 * 16 + row // 32 % 4


@triton.jit
def load_tile(z, start, T, first, kept, ROW: tl.constexpr, WORDS: tl.constexpr, HAS_MASK: tl.constexpr,
              EARLY: tl.constexpr = False):  # fmt: skip
    """The words [TILE,WORDS] of a tile, rows as in ``tile_steps``, zero at T and later, and at padding."""
    step = tile_steps()[:, None]
    here = start + step < T
    if HAS_MASK:
        here = here & (tl.load(kept + start + step, mask=here, other=0) != 0)
    at = z + tl.cast(start, tl.int64) * ROW + step * ROW
    return tl.load(at + (first + tl.arange(0, WORDS)[None, :]), mask=here, other=0, volatile=EARLY)


@triton.jit
def to_lanes(tile, THROUGH: tl.constexpr = False):
    """A tile [TILE,WORDS] as eight tensors, a lane's steps: four of each of its two segments."""
    WORDS: tl.constexpr = tile.shape[1]
    if THROUGH:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tl.int32, is_pure=False, pack=1)
    x = tl.permute(tl.reshape(tile, (8, 32, WORDS)), (2, 1, 0))
    return unstack(tl.reshape(x, (WORDS * 32, 8)))


@triton.jit
def from_lanes(xs):
    """The inverse of ``to_lanes``."""
    WORDS: tl.constexpr = xs[0].shape[0] // 32
    x = tl.permute(tl.reshape(stack(xs, 8), (WORDS, 32, 2, 2, 2)), (2, 3, 4, 1, 0))
    return tl.reshape(x, (TILE, WORDS))


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
def as_factors(x, EMULATED: tl.constexpr):
    """A lane's eight numbers as a left factor of two terms, four words each."""
    a = split(x[0], x[1], EMULATED)
    b = split(x[4], x[5], EMULATED)
    c = split(x[2], x[3], EMULATED)
    d = split(x[6], x[7], EMULATED)
    return (a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1])


@triton.jit
def find_states(w, enter, decays, carry, lane, REAL: tl.constexpr, EMULATED: tl.constexpr):
    """The states before a lane's two segments, for four modes: re, im of both; and the state after the tile.

    Args:
        w: the left factor, terms of four words.
        enter: the right factor, terms of two words.
        decays: p^16, p^32, p^64, p^128, and what the product of those that the state of the tile before passes through
            leaves of p^256.
        carry: the state before the tile, in the first four lanes, zero in the others.
    """
    none = tl.zeros_like(carry[0])
    a, b, c, d = multiply_terms(w, enter, (none, none, none, none), EMULATED)
    re, im = move(decays[0], a, b, c, d, REAL)  # what two segments add
    re, im = move(decays[1], carry[0], carry[1], re, im, REAL)
    for k in tl.static_range(3):
        re, im = add_earlier(decays[k + 1], re, im, tl.full(lane.shape, 4 << k, tl.int32), lane, REAL, EMULATED)
    first_re = lane_before(re, carry[0], lane, EMULATED)
    first_im = lane_before(im, carry[1], lane, EMULATED)
    re = last_to_first(re, lane, EMULATED)
    im = last_to_first(im, lane, EMULATED)
    after = move(decays[4], carry[0], carry[1], re, im, REAL)
    second = move(decays[0], first_re, first_im, a, b, REAL)
    return (first_re, first_im, second[0], second[1]), after


@triton.jit
def load_enter(poles, channel, quad, lane, D: tl.constexpr, N: tl.constexpr, REAL: tl.constexpr, BACK: tl.constexpr):
    """Rows of Gᵀ of four modes: a lane's four steps, its column lane // 4, float32. BACK: p^(i+1), not p^(15-i)."""
    g = lane // 4
    mode = quad * 4 + g // 2
    re, im = powers(poles, channel, mode, lane % 4 * 4 + 1 if BACK else 12 - lane % 4 * 4, D, N, 4, REAL)
    p_re, p_im = pole(poles, (channel * N + mode) * 2, mode < N, REAL)
    out = ()
    for _ in tl.static_range(4):
        now = tl.where(g % 2 == 0, re, im).to(tl.float32)
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
def sum_columns(x, lane, EMULATED: tl.constexpr):
    """The sum of x over the lanes with the same lane % 4, in all of them."""
    for k in tl.static_range(3):
        other = from_lane(x.to(tl.int32, bitcast=True), lane ^ (4 << k), EMULATED)
        x += other.to(tl.float32, bitcast=True)
    return x


@triton.jit
def as_local(taps, skip, lane, BACK: tl.constexpr, EMULATED: tl.constexpr):
    """Hᵀ, or H if BACK, as a right factor, four words, two for each half of its columns, from the sums of ``add_taps``."""
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
def load_leave(poles, residues, channel, block, lane, D: tl.constexpr, N: tl.constexpr, REAL: tl.constexpr,
               BACK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """Rᵀ of up to eight modes as right factors of two terms, one for each half of their columns.

    BACK: r p^(15-j), not r p^(j+1).
    """
    PARTS: tl.constexpr = 2 if N > 4 else 1
    step = lane // 8 * 4 + lane // 4 % 2
    highs = ((), ())
    lows = ((), ())
    for part in tl.static_range(PARTS):
        mode = block * 8 + part * 4 + lane % 4
        re, im = powers(poles, channel, mode, 13 - step if BACK else step + 1, D, N, 4, REAL)
        p_re, p_im = powers(poles, channel, mode, 2 + tl.zeros_like(mode), D, N, 2, REAL)
        at = residues + (channel * N + mode) * 2
        r_re = tl.load(at, mask=mode < N, other=0.0).to(tl.float64)
        r_im = tl.load(at + 1, mask=mode < N, other=0.0).to(tl.float64)
        both = ()
        for _ in tl.static_range(2):
            if REAL:
                a, b = r_re * re, r_im * im
                re, im = re * p_re, im * p_im
            else:
                a, b = r_re * re - r_im * im, -(r_re * im + r_im * re)
                re, im = re * p_re - im * p_im, re * p_im + im * p_re
            both = both + (split(a.to(tl.float32), b.to(tl.float32), EMULATED),)
        first = both[1 if BACK else 0]
        second = both[0 if BACK else 1]
        highs = (highs[0] + (first[0],), highs[1] + (second[0],))
        lows = (lows[0] + (first[1],), lows[1] + (second[1],))
    return (highs[0], lows[0]), (highs[1], lows[1])


@triton.jit
def load_decays(poles, channel, mode, D: tl.constexpr, N: tl.constexpr, REAL: tl.constexpr):
    """The ``decays`` of ``find_states``."""
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
def load_before_tile(z, short, keep, begin, REACH: tl.constexpr, ROW: tl.constexpr, HAS_SHORT: tl.constexpr,
                     HAS_MASK: tl.constexpr):  # fmt: skip
    """The words of the steps before ``begin``, from the state where it is 0; zero at padding."""
    words = ()
    for k in tl.static_range(REACH):
        t = begin - REACH + k
        here = t >= 0
        if HAS_MASK:
            here = here & (tl.load(keep + t, mask=t >= 0, other=0) != 0)
        word = tl.load(z + tl.cast(t, tl.int64) * ROW, mask=here, other=0)
        if HAS_SHORT:
            word = tl.where(t < 0, tl.load(short + tl.minimum(begin + k, REACH - 1) * ROW), word)
        words = words + (word,)
    return words


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
def products(us, vs):
    """The products of two tuples."""
    out = ()
    for i in tl.static_range(len(us)):
        out = out + (us[i] * vs[i],)
    return out


@triton.jit
def finish(z_1, z_0, short_1, short_0, keep, poles, filters1, filters0, enter, decays, carry, count, T, word, first,
           lane, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, REAL: tl.constexpr,
           HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The state after the last ``count`` steps, fewer than a tile: from the tile that ends with T, zero before them."""
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = len(carry) // 2
    start = T - TILE
    words1 = to_lanes(load_tile(z_1, start, T, first, keep, ROW, WORDS, HAS_MASK))
    words0 = to_lanes(load_tile(z_0, start, T, first, keep, ROW, WORDS, HAS_MASK))
    before1 = load_before_tile(z_1 + word, short_1, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before0 = load_before_tile(z_0 + word, short_0, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
    us1 = filter_segments(words1, before1, filters1, lane, EMULATED)
    us0 = filter_segments(words0, before0, filters0, lane, EMULATED)
    none = tl.zeros(lane.shape, tl.float32)
    after = ()
    for e in tl.static_range(2):
        w = as_factors(keep_steps(products(us1[e], us0[e]), keep, start, T - count, T, lane, HAS_MASK), EMULATED)
        for q in tl.static_range(QUADS):
            before = carry[e * QUADS + q]
            mode = 4 * q + lane % 4
            _, end = find_states(
                w, enter[e * QUADS + q], decays[e * QUADS + q], (none, none), lane, REAL, EMULATED
            )
            re, im = powers(poles, word * 2 + e, mode, count + tl.zeros_like(mode), D, N, 8, REAL)
            decay = (re.to(tl.float32), im.to(tl.float32))
            after = after + (move(decay, before[0], before[1], end[0], end[1], REAL),)
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


@triton.jit(do_not_specialize=["T"])
def segments_forward_kernel(z, weight, bias, poles, residues, skip, short, long, keep, y, long_out, T,
                            REAL: tl.constexpr, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                            WORDS: tl.constexpr, STAGES: tl.constexpr, THROUGH: tl.constexpr, HAS_BIAS: tl.constexpr,
                            HAS_SKIP: tl.constexpr, HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr,
                            HAS_MASK: tl.constexpr, STATES_ONLY: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of WORDS words, rows); a warp for every word.

    ``z``, ``short`` [B,K-1,3D] and ``y`` are in words of two numbers, ``keep`` uint8 [B,T]; T is at least a tile.
    STATES_ONLY: ``long_out`` [B,tiles,D,N,2] are the states before the tiles, and nothing else is computed.
    """
    ROW: tl.constexpr = 3 * D // 2
    QUADS: tl.constexpr = 1 if N <= 4 else triton.next_power_of_2(N) // 4
    BLOCKS: tl.constexpr = (QUADS + 1) // 2
    index = tl.arange(0, 32 * WORDS)
    lane = index % 32
    first = tl.program_id(0) * WORDS
    word = first + index // 32
    row = tl.program_id(1).to(tl.int64)
    z_2, z_1, z_0 = thirds(z + row * T * ROW, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW + word, ROW)
    y += row * T * (D // 2)
    keep += row * T
    T = tl.cast(T, tl.int32)

    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    local = ()
    enter = ()
    leave = ()
    decays = ()
    carry = ()
    for e in tl.static_range(2):
        channel = word * 2 + e
        none = tl.zeros(lane.shape, tl.float32)
        taps = (none, none, none, none)
        for q in tl.static_range(QUADS):
            mode = 4 * q + lane % 4
            rows = load_enter(poles, channel, q, lane, D, N, REAL, False)
            taps = add_taps(taps, residues, channel, q, rows, lane, N, REAL)
            enter = enter + (as_right_factor(rows, EMULATED),)
            decays = decays + (load_decays(poles, channel, mode, D, N, REAL),)
            re = none
            im = none
            if HAS_LONG:
                at = long + row * D * N * 2 + (channel * N + mode) * 2
                re = tl.load(at, mask=(lane < 4) & (mode < N), other=0.0)
                im = tl.load(at + 1, mask=(lane < 4) & (mode < N), other=0.0)
            carry = carry + ((re, im),)
        gain = none
        if HAS_SKIP:
            gain = tl.load(skip + channel).to(tl.float32)
        local = local + (as_local(taps, gain, lane, False, EMULATED),)
        for q in tl.static_range(BLOCKS):
            leave = leave + load_leave(poles, residues, channel, q, lane, D, N, REAL, False, EMULATED)

    before2 = load_before_tile(z_2 + word, short_2, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before1 = load_before_tile(z_1 + word, short_1, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before0 = load_before_tile(z_0 + word, short_0, keep, 0, K - 1, ROW, HAS_SHORT, HAS_MASK)
    if STAGES == 1:
        next1 = load_tile(z_1, 0, T, first, keep, ROW, WORDS, HAS_MASK, True)
        next0 = load_tile(z_0, 0, T, first, keep, ROW, WORDS, HAS_MASK, True)
        if not STATES_ONLY:
            next2 = load_tile(z_2, 0, T, first, keep, ROW, WORDS, HAS_MASK, True)
    for start in tl.range(0, T, TILE, num_stages=STAGES):
        if STAGES == 1:
            tile1 = next1
            tile0 = next0
            next1 = load_tile(z_1, start + TILE, T, first, keep, ROW, WORDS, HAS_MASK, True)
            next0 = load_tile(z_0, start + TILE, T, first, keep, ROW, WORDS, HAS_MASK, True)
            if not STATES_ONLY:
                tile2 = next2
                next2 = load_tile(z_2, start + TILE, T, first, keep, ROW, WORDS, HAS_MASK, True)
        else:
            tile1 = load_tile(z_1, start, T, first, keep, ROW, WORDS, HAS_MASK)
            tile0 = load_tile(z_0, start, T, first, keep, ROW, WORDS, HAS_MASK)
            if not STATES_ONLY:
                tile2 = load_tile(z_2, start, T, first, keep, ROW, WORDS, HAS_MASK)
        words1 = to_lanes(tile1, THROUGH)
        words0 = to_lanes(tile0, THROUGH)
        if not STATES_ONLY:
            words2 = to_lanes(tile2, THROUGH)
        us1 = filter_segments(words1, before1, filters1, lane, EMULATED)
        us0 = filter_segments(words0, before0, filters0, lane, EMULATED)
        if STATES_ONLY:
            at_states = long_out + (row * ((T + TILE - 1) // TILE) + start // TILE) * (D * N * 2)
            store_states(at_states, carry, word, lane, D, N)
        else:
            us2 = filter_segments(words2, before2, filters2, lane, EMULATED)
        before1 = words1[9 - K :]
        before0 = words0[9 - K :]
        if not STATES_ONLY:
            before2 = words2[9 - K :]
        whole = start + TILE <= T  # the state before a part of a tile is the start of what follows the loop
        ys = ()
        after = ()
        for e in tl.static_range(2):
            w = products(us1[e], us0[e])
            if HAS_MASK:
                w = keep_steps(w, keep, start, 0, T, lane, True)
            w = as_factors(w, EMULATED)
            none = tl.zeros(lane.shape, tl.float32)
            if not STATES_ONLY:
                low = multiply(w[0], local[e][0:2], (none, none, none, none), EMULATED)
                high = multiply(w[0], local[e][2:4], (none, none, none, none), EMULATED)
            for q in tl.static_range(BLOCKS):
                terms = ()
                for i in tl.static_range(2 if QUADS > 1 else 1):
                    begin = carry[e * QUADS + 2 * q + i]
                    s, end = find_states(
                        w, enter[e * QUADS + 2 * q + i], decays[e * QUADS + 2 * q + i], begin, lane, REAL, EMULATED
                    )
                    re = tl.where(whole, end[0], begin[0])
                    im = tl.where(whole, end[1], begin[1])
                    after = after + ((re, im),)
                    terms = terms + split(s[0], s[1], EMULATED) + split(s[2], s[3], EMULATED)
                if not STATES_ONLY:
                    s = (terms[0::2], terms[1::2])
                    low = multiply_terms(s, leave[e * BLOCKS * 2 + q * 2], low, EMULATED)
                    high = multiply_terms(s, leave[e * BLOCKS * 2 + q * 2 + 1], high, EMULATED)
            if not STATES_ONLY:
                ys = ys + ((low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3]),)
        carry = after
        if not STATES_ONLY:
            even = products(ys[0], us2[0])
            odd = products(ys[1], us2[1])
            if HAS_MASK:
                even = keep_steps(even, keep, start, 0, T, lane, True)
                odd = keep_steps(odd, keep, start, 0, T, lane, True)
            out = ()
            for i in tl.static_range(8):
                out = out + (pack(even[i], odd[i], EMULATED),)
            step = tile_steps()[:, None]
            to = y + tl.cast(start, tl.int64) * (D // 2) + step * (D // 2)
            tl.store(to + (first + tl.arange(0, WORDS)[None, :]), from_lanes(out), mask=start + step < T)

    count = T % TILE
    if STATES_ONLY:
        count = 0
    if count > 0:
        carry = finish(z_1, z_0, short_1, short_0, keep, poles, filters1, filters0, enter, decays, carry, count, T, word,
                       first, lane, D, N, K, WORDS, REAL, HAS_SHORT, HAS_MASK, EMULATED)  # fmt: skip
    if not STATES_ONLY:
        store_states(long_out + row * D * N * 2, carry, word, lane, D, N)
