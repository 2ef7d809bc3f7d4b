"""The operator with many explicit taps, forward, in registers: bfloat16 z [B,T,3D] to y [B,T,D].

The long filter of W taps is cut into matrices of 16 steps. For every block of 16 steps and the 16 channels of a warp::

    g[b]ᵀ = Σ_k w[b-k]ᵀ A_kᵀ        A_k[t,s] = h[16·k + t - s], zero where that is no tap        k = 0 … (W+14) // 16

A warp's instruction ``mma.m16n8k16`` multiplies 16 channels × 16 steps by 16 steps × 8 steps. Its result is distributed
over lanes as its left factor is, and the order of the 16 steps is free as long as the matrices keep to it: so lane
(g, c) = (lane / 4, lane % 4) owns word g, channels 2g and 2g+1, at steps 4c … 4c+3 in all of the kernel. Inputs are
loaded there, filtered there (the K-1 steps before come from the lane before), and stored from there. Nothing is
rearranged, nothing passes through shared memory, and no warp waits for another. The matrices stay in registers, as does
w of the blocks before.

Factors are w rounded to bfloat16, as the plain operator rounds it, and bfloat16 taps; sums are float32.

Tensors have one element for every lane. The instructions that Triton has no words for are inline PTX; under the
interpreter (EMULATED) the same is done by gathers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import convolve, load_taps
from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.words import stack

MOST_SHORT_TAPS = 5
"""Steps before a lane's four must be another lane's."""


@triton.jit
def half(word, ODD: tl.constexpr):
    """One of the two bfloat16 numbers of int32 words, float32."""
    bits = word.to(tl.uint32, bitcast=True)
    if ODD:
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def pack(low, high, EMULATED: tl.constexpr):
    """Two float32 numbers as the bfloat16 halves of an int32 word."""
    if EMULATED:  # the interpreter's own conversion cuts off
        low = low.to(tl.uint32, bitcast=True)
        high = high.to(tl.uint32, bitcast=True)
        low = (low + 0x7FFF + ((low >> 16) & 1)) >> 16
        high = (high + 0x7FFF + ((high >> 16) & 1)) & 0xFFFF0000
        word = (low | high).to(tl.int32, bitcast=True)
    else:
        word = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    return word


@triton.jit
def pack_block(even, odd, EMULATED: tl.constexpr):
    """Four steps of both channels of a word as a left factor."""
    return (
        pack(even[0], even[1], EMULATED),
        pack(odd[0], odd[1], EMULATED),
        pack(even[2], even[3], EMULATED),
        pack(odd[2], odd[3], EMULATED),
    )


@triton.jit
def from_lane(x, lane, EMULATED: tl.constexpr):
    """x of another lane of the warp."""
    if EMULATED:
        out = tl.gather(x, tl.arange(0, x.shape[0]) // 32 * 32 + lane, 0)
    else:
        out = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, lane], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit
def number_of(words, which, lane, odd):
    """Numbers of a factor [.,.,.], float32: one of a lane's words, and a half of it."""
    COUNT: tl.constexpr = len(words)
    every = tl.reshape(stack(words, COUNT), (words[0].shape[0] * COUNT,))
    at = lane * COUNT + which
    word = tl.reshape(tl.gather(every, tl.reshape(at, (at.shape[0] * at.shape[1] * at.shape[2],)), 0), at.shape)
    return tl.where(odd, half(word, True), half(word, False))


@triton.jit
def multiply(a, b, c, EMULATED: tl.constexpr):
    """``c + a·b`` by mma.m16n8k16: tuples of 4 and 2 words of bfloat16, and of 4 float32."""
    if EMULATED:
        WARPS: tl.constexpr = a[0].shape[0] // 32
        warp = tl.arange(0, WARPS)[:, None, None] * 32
        m = tl.arange(0, 16)[None, :, None]
        k = tl.arange(0, 16)[None, None, :]
        x = number_of(a, k // 8 * 2 + m // 8, warp + m % 8 * 4 + k % 8 // 2, k % 2 == 1)
        n = tl.arange(0, 8)[None, None, :]
        y = number_of(b, m // 8 + n * 0, warp + n * 4 + m % 8 // 2, m % 2 == 1)
        product = tl.reshape(tl.dot(x, y, input_precision="ieee"), (WARPS * 128,))
        lane = tl.arange(0, WARPS * 32)
        at = lane // 32 * 128 + lane % 32 // 4 * 8 + lane % 4 * 2
        first = c[0] + tl.gather(product, at, 0), c[1] + tl.gather(product, at + 1, 0)
        c = first + (c[2] + tl.gather(product, at + 64, 0), c[3] + tl.gather(product, at + 65, 0))
    else:
        c = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return c


@triton.jit
def load_blocks(taps, g, c, W: tl.constexpr, BLOCKS: tl.constexpr, TURNED: tl.constexpr, EMULATED: tl.constexpr):
    """The right factors A_kᵀ, or A_k if TURNED, four words each: two for each half of their columns."""
    blocks = ()
    for k in tl.static_range(BLOCKS):
        for second in tl.static_range(2):
            for part in tl.static_range(2):
                between = g // 2 * 4 + g % 2 - c * 4 + 2 * (second - part)  # equal factors are loaded once
                lag = 16 * k + (-between if TURNED else between)
                next = lag + (1 if TURNED else -1)
                low = tl.load(taps + lag, mask=(lag >= 0) & (lag < W), other=0.0).to(tl.float32)
                high = tl.load(taps + next, mask=(next >= 0) & (next < W), other=0.0).to(tl.float32)
                blocks = blocks + (pack(low, high, EMULATED),)
    return blocks


@triton.jit
def load_block_words(at, start, c, low, high, kept, U: tl.constexpr, ROW: tl.constexpr, WHOLE: tl.constexpr,
                     HAS_MASK: tl.constexpr):  # fmt: skip
    """A lane's four words of each of U blocks, zero at padding and, unless WHOLE, outside low … high-1."""
    words = ()
    for i in tl.static_range(4 * U):
        t = start + c * 4 + (i // 4 * 16 + i % 4)
        place = at + (i // 4 * 16 + i % 4) * ROW
        if WHOLE and not HAS_MASK:
            word = tl.load(place)
        elif WHOLE:
            word = tl.load(place, mask=kept[i], other=0)
        elif HAS_MASK:
            word = tl.load(place, mask=kept[i] & (t >= low) & (t < high), other=0)
        else:
            word = tl.load(place, mask=(t >= low) & (t < high), other=0)
        words = words + (word,)
    return words


@triton.jit
def load_filters(weight, bias, word, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Taps and bias of the short filters of a word's two channels."""
    every = word >= 0
    even = load_taps(weight, bias, word * 2, every, K, HAS_BIAS)
    return even, load_taps(weight, bias, word * 2 + 1, every, K, HAS_BIAS)


@triton.jit
def filter_words(words, before, filters, lane, c, EMULATED: tl.constexpr):
    """The short filters at a lane's four steps of a block: two tuples of 4, of the word's two channels.

    ``before`` are the last words of the block before, right in the last lane of four.
    """
    REACH: tl.constexpr = len(before)
    previous = ()
    for k in tl.static_range(REACH):
        theirs = tl.where(c == 3, before[k], words[4 - REACH + k])
        previous = previous + (from_lane(theirs, lane, EMULATED),)
    low = ()
    high = ()
    for k in tl.static_range(REACH):
        low = low + (half(previous[k], False),)
        high = high + (half(previous[k], True),)
    us = ()
    vs = ()
    for i in tl.static_range(4):
        u, low = convolve(filters[0][0], filters[0][1], low, half(words[i], False))
        v, high = convolve(filters[1][0], filters[1][1], high, half(words[i], True))
        us = us + (u,)
        vs = vs + (v,)
    return us, vs


@triton.jit
def load_before(z, short, keep, begin, REACH: tl.constexpr, ROW: tl.constexpr, HAS_SHORT: tl.constexpr,
                HAS_MASK: tl.constexpr):  # fmt: skip
    """The words of the steps before ``begin``, zero at padding, from the state where ``begin`` is 0."""
    words = ()
    for k in tl.static_range(REACH):
        t = begin - REACH + k
        here = begin > 0
        if HAS_MASK:
            here = here & (tl.load(keep + t, mask=begin > 0, other=0) != 0)
        word = tl.load(z + tl.cast(t, tl.int64) * ROW, mask=here, other=0)
        if HAS_SHORT:
            word = tl.where(begin == 0, tl.load(short + k * ROW), word)
        words = words + (word,)
    return words


@triton.jit
def walk_round(z_2, z_1, z_0, keep, y, long_out, start, first, stop, T, left, c, filters2, filters1, filters0, gains,
               blocks, past, before2, before1, before0, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
               U: tl.constexpr, WHOLE: tl.constexpr, HAS_MASK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """U blocks of the forward kernel: what the next ones need of them. All steps are before ``stop`` if WHOLE."""
    PAST: tl.constexpr = len(past) // 4
    ROW: tl.constexpr = 3 * D // 2
    kept = ()
    if HAS_MASK:
        for i in tl.static_range(4 * U):
            t = start + c * 4 + (i // 4 * 16 + i % 4)
            kept = kept + (tl.load(keep + t, mask=t < stop, other=0) != 0,)
    chunk = tl.cast(start, tl.int64) * ROW + c * (4 * ROW)
    words1 = load_block_words(z_1 + chunk, start, c, 0, stop, kept, U, ROW, WHOLE, HAS_MASK)
    words0 = load_block_words(z_0 + chunk, start, c, 0, stop, kept, U, ROW, WHOLE, HAS_MASK)
    words2 = load_block_words(z_2 + chunk, start, c, 0, stop, kept, U, ROW, WHOLE, HAS_MASK)
    to = y + (tl.cast(start, tl.int64) * (D // 2) + c * (4 * (D // 2)))
    none = tl.zeros_like(gains[0])
    totals = ()  # meanwhile, what the blocks before this round give
    for i in tl.static_range(U):
        low = (none, none, none, none)
        high = (none, none, none, none)
        for k in tl.static_range(i + 1, PAST + 1):
            w = past[4 * (PAST + i - k) : 4 * (PAST + i - k) + 4]
            low = multiply(w, blocks[4 * k : 4 * k + 2], low, EMULATED)
            high = multiply(w, blocks[4 * k + 2 : 4 * k + 4], high, EMULATED)
        totals = totals + low + high
    for i in tl.static_range(U):
        even_1, odd_1 = filter_words(words1[4 * i : 4 * i + 4], before1, filters1, left, c, EMULATED)
        even_0, odd_0 = filter_words(words0[4 * i : 4 * i + 4], before0, filters0, left, c, EMULATED)
        before1 = words1[4 * i + 5 - K : 4 * i + 4]
        before0 = words0[4 * i + 5 - K : 4 * i + 4]
        even_w = ()
        odd_w = ()
        for j in tl.static_range(4):
            a = even_1[j] * even_0[j]
            b = odd_1[j] * odd_0[j]
            if HAS_MASK:
                a = tl.where(kept[4 * i + j], a, 0.0)
                b = tl.where(kept[4 * i + j], b, 0.0)
            even_w = even_w + (a,)
            odd_w = odd_w + (b,)
        past = past + pack_block(even_w, odd_w, EMULATED)
        low = totals[8 * i : 8 * i + 4]
        high = totals[8 * i + 4 : 8 * i + 8]
        for k in tl.static_range(min(i, PAST) + 1):
            w = past[4 * (PAST + i - k) : 4 * (PAST + i - k) + 4]
            low = multiply(w, blocks[4 * k : 4 * k + 2], low, EMULATED)
            high = multiply(w, blocks[4 * k + 2 : 4 * k + 4], high, EMULATED)
        even = (low[0], low[1], high[0], high[1])
        odd = (low[2], low[3], high[2], high[3])
        even_2, odd_2 = filter_words(words2[4 * i : 4 * i + 4], before2, filters2, left, c, EMULATED)
        before2 = words2[4 * i + 5 - K : 4 * i + 4]
        for j in tl.static_range(4):
            t = start + c * 4 + (16 * i + j)
            a = tl.fma(gains[0], even_w[j], even[j]) * even_2[j]
            b = tl.fma(gains[1], odd_w[j], odd[j]) * odd_2[j]
            if HAS_MASK:
                a = tl.where(kept[4 * i + j], a, 0.0)
                b = tl.where(kept[4 * i + j], b, 0.0)
            if WHOLE:  # noqa: SIM108, one branch is compiled
                written = start >= first
            else:
                written = (t >= first) & (t < stop)
            tl.store(to + (16 * i + j) * (D // 2), pack(a, b, EMULATED), mask=written)
        if (stop == T) & (start + 16 * U > T - W):
            for j in tl.static_range(4):
                t = start + c * 4 + (16 * i + j)
                saved = (t > T - W) & (t < T)
                tl.store(long_out + (t - T + W - 1), even_w[j], mask=saved)
                tl.store(long_out + (t - T + W - 1) + (W - 1), odd_w[j], mask=saved)
    return past[4 * U :], before2, before1, before0


@triton.jit(do_not_specialize=["T", "run"])
def toeplitz_forward_kernel(z, weight, bias, taps, skip, short, long, keep, y, long_out, T, run, D: tl.constexpr,
                            K: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr,
                            U: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_SHORT: tl.constexpr,
                            HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (16·WARPS channels, runs of ``run`` steps, rows).

    WIDTH channels, a multiple of 16, share a filter; T is at least W-1. ``z``, ``short`` [B,K-1,3D] and ``y`` are in
    words of two numbers, ``long`` and ``long_out`` float32 [B,D,W-1], ``keep`` uint8 [B,T]. U blocks make a round.
    A run begins with the blocks that its filter still remembers.
    """
    PAST: tl.constexpr = (W + 14) // 16
    ROW: tl.constexpr = 3 * D // 2
    lane = tl.arange(0, 32 * WARPS)
    g = lane % 32 // 4
    c = lane % 4
    left = lane % 32 // 4 * 4 + (c + 3) % 4  # the lane whose steps come before
    word = (tl.program_id(0) * WARPS + lane // 32) * 8 + g
    row = tl.program_id(2).to(tl.int64)
    z_2, z_1, z_0 = thirds(z + row * T * ROW + word, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW + word, ROW)
    y += row * T * (D // 2) + word
    long += row * D * (W - 1) + word * 2 * (W - 1)
    long_out += row * D * (W - 1) + word * 2 * (W - 1)
    keep += row * T
    T = tl.cast(T, tl.int32)
    first = tl.program_id(1) * run
    stop = tl.minimum(first + run, T)
    begin = tl.maximum(first - (PAST + U - 1) // U * (16 * U), 0)

    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    gains = (tl.zeros_like(filters0[0][1]), tl.zeros_like(filters0[0][1]))
    if HAS_SKIP:
        gains = (tl.load(skip + word * 2).to(tl.float32), tl.load(skip + word * 2 + 1).to(tl.float32))
    blocks = load_blocks(taps + word * 2 // WIDTH * W, g, c, W, PAST + 1, False, EMULATED)

    past = ()  # w of the blocks before, the oldest first, as left factors
    for i in tl.static_range(PAST):
        for part in tl.static_range(2):
            for odd in tl.static_range(2):
                factor = tl.zeros_like(word)
                if HAS_LONG:
                    t = (i - PAST) * 16 + c * 4 + part * 2
                    at = long + odd * (W - 1) + (W - 1) + t
                    low = tl.load(at, mask=(begin == 0) & (t > -W), other=0.0)
                    high = tl.load(at + 1, mask=(begin == 0) & (t + 1 > -W), other=0.0)
                    factor = pack(low, high, EMULATED)
                past = past + (factor,)
    before2 = load_before(z_2, short_2, keep, begin, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before1 = load_before(z_1, short_1, keep, begin, K - 1, ROW, HAS_SHORT, HAS_MASK)
    before0 = load_before(z_0, short_0, keep, begin, K - 1, ROW, HAS_SHORT, HAS_MASK)
    whole = begin + (stop - begin) // (16 * U) * (16 * U)
    for start in tl.range(begin, whole, 16 * U, num_stages=1):
        past, before2, before1, before0 = walk_round(
            z_2, z_1, z_0, keep, y, long_out, start, first, stop, T, left, c, filters2, filters1, filters0, gains,
            blocks, past, before2, before1, before0, D, K, W, U, True, HAS_MASK, EMULATED)  # fmt: skip
    if whole < stop:
        walk_round(
            z_2, z_1, z_0, keep, y, long_out, whole, first, stop, T, left, c, filters2, filters1, filters0, gains,
            blocks, past, before2, before1, before0, D, K, W, U, False, HAS_MASK, EMULATED)  # fmt: skip
