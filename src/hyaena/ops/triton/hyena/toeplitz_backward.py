"""The operator with many explicit taps, backward in registers: the long filter's share, as in ``explicit_backward``.

With blocks of 16 steps as in ``toeplitz``, and dg = dy·u2::

    dw[b]ᵀ = Σ_k dg[b+k]ᵀ A_k
    dA_k   = Σ_b dg[b+k] w[b]ᵀ        a tap's gradient is the sum of its diagonal

A warp walks back from the end of its run, with dg of the blocks behind in registers, as they are for dw and transposed
(``movmatrix``) for dA, whose sums run over channels. The filter's output g comes from the forward kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.hyena.direct import thirds
from hyaena.ops.triton.hyena.toeplitz import (
    filter_words,
    half,
    load_before,
    load_block_words,
    load_blocks,
    load_filters,
    multiply,
    pack,
    pack_block,
)


@triton.jit
def transpose(x, EMULATED: tl.constexpr):
    """A matrix 8 × 8 of bfloat16, transposed: a lane (g, c) has row g, columns 2c and 2c+1."""
    if EMULATED:
        lane = tl.arange(0, x.shape[0])
        row = lane % 32 // 4
        source = lane // 32 * 32 + lane % 4 * 8 + row // 2
        low = tl.gather(x, source, 0).to(tl.uint32, bitcast=True)
        high = tl.gather(x, source + 4, 0).to(tl.uint32, bitcast=True)
        low = tl.where(row % 2 == 1, low >> 16, low & 0xFFFF)
        high = tl.where(row % 2 == 1, high & 0xFFFF0000, high << 16)
        out = (low | high).to(tl.int32, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return out


@triton.jit(do_not_specialize=["T", "run"])
def toeplitz_backward_kernel(z, dy, weight, bias, taps, short, long, keep, dw, outers, dlong_in, T, run,
                             D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
                             WARPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORT: tl.constexpr,
                             HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, PARAMETERS: tl.constexpr,
                             EMULATED: tl.constexpr):  # fmt: skip
    """From z and dy to dw [B,T,D], without the skip, in words. Grid and arguments as of the forward kernel.

    ``outers`` float32 [B,runs,blocks of 16 channels,PAST+1,8,32]: the sums of dA_k as lanes have them, see
    ``toeplitz_launch.places``. ``dlong_in`` float32 [B,D,W-1] is the gradient of the state before z, what dw is there.
    """
    PAST: tl.constexpr = (W + 14) // 16
    ROW: tl.constexpr = 3 * D // 2
    lane = tl.arange(0, 32 * WARPS)
    g = lane % 32 // 4
    c = lane % 4
    left = lane % 32 // 4 * 4 + (c + 3) % 4
    unit = tl.program_id(0) * WARPS + lane // 32
    word = unit * 8 + g
    row = tl.program_id(2).to(tl.int64)
    outers += ((row * tl.num_programs(1) + tl.program_id(1)) * (D // 16) + unit) * ((PAST + 1) * 256) + lane % 32
    z_2, z_1, z_0 = thirds(z + row * T * ROW + word, ROW)
    short_2, short_1, short_0 = thirds(short + row * (K - 1) * ROW + word, ROW)
    dy += row * T * (D // 2) + word
    dw += row * T * (D // 2) + word
    long += row * D * (W - 1) + word * 2 * (W - 1) + (W - 1)
    dlong_in += row * D * (W - 1) + word * 2 * (W - 1) + (W - 1)
    keep += row * T
    T = tl.cast(T, tl.int32)
    first = tl.program_id(1) * run
    stop = tl.minimum(first + run, T)
    last = tl.minimum(stop + 16 * PAST, T)
    lowest = first
    if first == 0:  # the steps before z, for the state
        lowest = -16 * PAST

    filters2 = load_filters(weight, bias, word, K, HAS_BIAS)
    filters1 = load_filters(weight, bias, D // 2 + word, K, HAS_BIAS)
    filters0 = load_filters(weight, bias, D + word, K, HAS_BIAS)
    none = tl.zeros_like(filters2[0][1])
    blocks = load_blocks(taps + word * 2 // WIDTH * W, g, c, W, PAST + 1, True, EMULATED)

    later = ()  # dg of the blocks behind, the nearest first, as left factors
    turned = ()  # the same, transposed
    sums = ()
    for _ in tl.static_range(4 * PAST):
        later = later + (tl.zeros_like(word),)
        turned = turned + (tl.zeros_like(word),)
    if PARAMETERS:
        for _ in tl.static_range(8 * (PAST + 1)):
            sums = sums + (none,)
    rounds = (last - lowest + 15) // 16
    for back in tl.range(0, rounds, num_stages=1):
        start = lowest + (rounds - 1 - back) * 16
        kept = ()
        if HAS_MASK:
            for i in tl.static_range(4):
                t = start + c * 4 + i
                kept = kept + (tl.load(keep + t, mask=(t >= 0) & (t < T), other=0) != 0,)
        chunk = tl.cast(start, tl.int64) * ROW + c * (4 * ROW)
        slope = tl.cast(start, tl.int64) * (D // 2) + c * (4 * (D // 2))
        slopes = load_block_words(dy + slope, start, c, 0, last, kept, 1, D // 2, False, HAS_MASK)
        words2 = load_block_words(z_2 + chunk, start, c, 0, last, kept, 1, ROW, False, HAS_MASK)
        before2 = load_before(z_2, short_2, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
        if PARAMETERS:
            words1 = load_block_words(z_1 + chunk, start, c, 0, stop, kept, 1, ROW, False, HAS_MASK)
            words0 = load_block_words(z_0 + chunk, start, c, 0, stop, kept, 1, ROW, False, HAS_MASK)
            before1 = load_before(z_1, short_1, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
            before0 = load_before(z_0, short_0, keep, start, K - 1, ROW, HAS_SHORT, HAS_MASK)
        out = (none, none, none, none)
        more = (none, none, none, none)
        for k in tl.static_range(1, PAST + 1):  # while the loads are under way
            factor = later[4 * k - 4 : 4 * k]
            out = multiply(factor, blocks[4 * k : 4 * k + 2], out, EMULATED)
            more = multiply(factor, blocks[4 * k + 2 : 4 * k + 4], more, EMULATED)
        u, v = filter_words(words2, before2, filters2, left, c, EMULATED)
        even_dg = ()
        odd_dg = ()
        for i in tl.static_range(4):
            even_dg = even_dg + (u[i] * half(slopes[i], False),)
            odd_dg = odd_dg + (v[i] * half(slopes[i], True),)
        now = pack_block(even_dg, odd_dg, EMULATED)
        out = multiply(now, blocks[:2], out, EMULATED)
        more = multiply(now, blocks[2:4], more, EMULATED)
        later = (now + later)[: 4 * PAST]
        even_dw = (out[0], out[1], more[0], more[1])
        odd_dw = (out[2], out[3], more[2], more[3])
        for i in tl.static_range(4):
            t = start + c * 4 + i
            written = (t >= 0) & (t >= first) & (t < stop)
            tl.store(dw + slope + i * (D // 2), pack(even_dw[i], odd_dw[i], EMULATED), mask=written)
        if start < 0:
            for i in tl.static_range(4):
                t = start + c * 4 + i
                tl.store(dlong_in + t, even_dw[i], mask=(t > -W) & (t < 0))
                tl.store(dlong_in + t + (W - 1), odd_dw[i], mask=(t > -W) & (t < 0))
        if PARAMETERS:
            even_1, odd_1 = filter_words(words1, before1, filters1, left, c, EMULATED)
            even_0, odd_0 = filter_words(words0, before0, filters0, left, c, EMULATED)
            even_w = ()
            odd_w = ()
            for i in tl.static_range(4):
                t = start + c * 4 + i
                here = (t >= 0) & (t < stop)
                if HAS_MASK:
                    here = here & kept[i]
                a = 0.0
                b = 0.0
                if HAS_LONG:
                    state = (t < 0) & (t > -W)
                    a = tl.load(long + t, mask=state, other=0.0)
                    b = tl.load(long + t + (W - 1), mask=state, other=0.0)
                even_w = even_w + (tl.where(here, even_1[i] * even_0[i], a),)
                odd_w = odd_w + (tl.where(here, odd_1[i] * odd_0[i], b),)
            w = pack_block(even_w, odd_w, EMULATED)
            low = (transpose(w[0], EMULATED), transpose(w[1], EMULATED))
            high = (transpose(w[2], EMULATED), transpose(w[3], EMULATED))
            turned = (
                transpose(now[0], EMULATED),
                transpose(now[2], EMULATED),
                transpose(now[1], EMULATED),
                transpose(now[3], EMULATED),
            ) + turned
            added = ()
            for k in tl.static_range(PAST + 1):
                dg = turned[4 * k : 4 * k + 4]
                added = added + multiply(dg, low, sums[8 * k : 8 * k + 4], EMULATED)
                added = added + multiply(dg, high, sums[8 * k + 4 : 8 * k + 8], EMULATED)
            sums = added
            turned = turned[: 4 * PAST]
    if PARAMETERS:
        for i in tl.static_range(8 * (PAST + 1)):
            tl.store(outers + i * 32, sums[i])
