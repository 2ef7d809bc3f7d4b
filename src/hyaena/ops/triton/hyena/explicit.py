"""The operator with explicit taps, forward: z [B,T,3D] to y [B,T,D], the long filter as products of Toeplitz matrices.

Neighbouring channels share a filter of W taps. A program owns up to BC channels of one group and walks through a run of
time in chunks of C steps. With w = u1·u0 of chunk c as a matrix [C,BC], the filter is a few products on matrix units::

    g[c] = Σ_d A_d w[c-d]        A_d[i,j] = h[C·d + i - j], zero where that is no tap        d = 0 … (W-2+C) // C

so every product of a chunk is formed once and stays in registers for the chunks that follow. Runs exchange nothing:
each forms the products of the W-1 steps before it again.

Factors of bfloat16 products are w rounded to bfloat16, as the plain operator rounds it, and taps in as many bfloat16
terms as their dtype needs, one for bfloat16 and two for others; sums are float32. For other dtypes of z the factors are
float32, each in two TF32 terms.

Packed documents (HAS_RESET): ``ages`` counts the steps since the document of a step began, see ``launch.age``; ``docs``
int32 [B,T] numbers documents in rising order, 0 before the first boundary. A chunk costs its products once for every
document in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import load_taps
from hyaena.ops.triton.hyena.words import stack, unstack


@triton.jit
def load_inputs(z, short, keep, t, T, channel, inside, D: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr,
                HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """Steps t of one block of z, float32 [C,BC]; zero at padding, at T and later, and before the state.

    Args:
        z, short: step 0 of this block, and the oldest of the S steps before it, rows of 3D numbers.
        t: int64 [C,1].
        channel, inside: [1,BC].
    """
    at = z + t * (3 * D) + channel
    if HAS_SHORT:
        at = tl.where(t < 0, short + (t + S) * (3 * D) + channel, at)
        here = (t >= -S) & (t < T)
    else:
        here = (t >= 0) & (t < T)
    if HAS_MASK:
        here = here & ((t < 0) | (tl.load(keep + t, mask=(t >= 0) & (t < T), other=0) != 0))
    if not WHOLE:
        here = here & inside
    return tl.load(at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def filter_inputs(z, short, keep, ages, taps, offset, t, T, channel, inside, D: tl.constexpr, WHOLE: tl.constexpr,
                  HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """The short filter of one block at steps t, float32 [C,BC], zero at padding; and its inputs, the newest first."""
    S: tl.constexpr = len(taps) - 1
    xs = ()
    out = offset
    for k in tl.static_range(S + 1):  # k steps ago
        x = load_inputs(z, short, keep, t - k, T, channel, inside, D, S, WHOLE, HAS_SHORT, HAS_MASK)
        if HAS_RESET and k > 0:
            x = tl.where(tl.load(ages + t, mask=(t >= 0) & (t < T), other=0) >= k, x, 0.0)
        xs = xs + (x,)
        out = tl.fma(taps[S - k], x, out)
    if HAS_MASK:
        out = tl.where(tl.load(keep + t, mask=(t >= 0) & (t < T), other=0) != 0, out, 0.0)
    return out, xs


@triton.jit
def gated(z, short, long, keep, ages, taps1, off1, taps0, off0, start, T, channel, inside, D: tl.constexpr,
          W: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr, HAS_SHORT: tl.constexpr,
          HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """w of the chunk that begins at ``start``, a multiple of C, in TYPE [C,BC]: of z, or of the state before step 0.

    ``z`` and ``short`` are those of block x2; ``long`` is this row's window [D,W-1].
    """
    t = start + tl.arange(0, C)[:, None].to(tl.int64)
    w = tl.zeros((C, channel.shape[1]), tl.float32)
    if start >= 0:
        u1, _ = filter_inputs(z + D, short + D, keep, ages, taps1, off1, t, T, channel, inside, D, WHOLE, HAS_SHORT,
                              HAS_MASK, HAS_RESET)  # fmt: skip
        u0, _ = filter_inputs(z + 2 * D, short + 2 * D, keep, ages, taps0, off0, t, T, channel, inside, D, WHOLE,
                              HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
        w = tl.where(t < T, u1 * u0, 0.0)
    elif HAS_LONG:
        w = tl.load(long + channel * (W - 1) + t + (W - 1), mask=inside & (t > -W), other=0.0)
    return w


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
def split_groups(w, GROUPS: tl.constexpr):
    """The channels of each group, a tuple of GROUPS tensors [C,BC]."""
    C: tl.constexpr = w.shape[0]
    out = (w,)
    if GROUPS > 1:
        out = unstack(tl.permute(tl.reshape(w, (C, GROUPS, w.shape[1] // GROUPS)), (0, 2, 1)))
    return out


@triton.jit
def join_groups(ws, GROUPS: tl.constexpr):
    """The inverse of ``split_groups``."""
    C: tl.constexpr = ws[0].shape[0]
    BC: tl.constexpr = ws[0].shape[1]
    out = ws[0]
    if GROUPS > 1:
        out = tl.permute(tl.reshape(stack(ws, GROUPS), (C, BC, GROUPS)), (0, 2, 1))
        out = tl.reshape(out, (C, BC * GROUPS))
    return out


@triton.jit
def convolve_chunks(matrices, ws, docs, start, T, C: tl.constexpr, GROUPS: tl.constexpr, HAS_RESET: tl.constexpr):
    """``Σ_d A_d w[d]`` of every group, float32 [C,GROUPS·BC].

    ws are the groups of the chunk at ``start``, then those of the chunk before it, …; the matrices have their order.
    """
    BACK: tl.constexpr = len(ws) // GROUPS - 1
    outs = ()
    for g in tl.static_range(GROUPS):
        total = tl.zeros((C, ws[0].shape[1]), tl.float32)
        if HAS_RESET:
            i = start + tl.arange(0, C)[:, None].to(tl.int64)
            to = tl.load(docs + i, mask=i < T, other=-1)
            first = tl.load(docs + start)
            last = tl.load(docs + tl.minimum(start + C, T) - 1)
            for doc in range(first, last + 1):
                part = tl.zeros_like(total)
                for d in tl.static_range(BACK + 1):
                    j = i - d * C
                    origin = tl.load(docs + j, mask=(j >= 0) & (j < T), other=0)
                    w = tl.where(origin == doc, ws[d * GROUPS + g], 0.0).to(ws[0].dtype)
                    part = add_product(part, matrices[d * GROUPS + g], w)
                total = tl.where(to == doc, part, total)
        else:
            for d in tl.static_range(BACK + 1):
                total = add_product(total, matrices[d * GROUPS + g], ws[d * GROUPS + g])
        outs = outs + (total,)
    return join_groups(outs, GROUPS)


@triton.jit(do_not_specialize=["T", "run"])
def explicit_forward_kernel(z, weight, bias, taps, skip, short, long, keep, ages, docs, y, long_out, T, run,
                            D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
                            BC: tl.constexpr, GROUPS: tl.constexpr, BACK: tl.constexpr, TERMS: tl.constexpr,
                            TYPE: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                            HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr,
                            HAS_RESET: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of channels, runs of time and one more, rows).

    WIDTH channels share a filter; a program has up to BC of them, or GROUPS groups of just BC. ``run`` chunks make a
    run, BACK is the largest d. ``short`` [B,K-1,3D] in the dtype of z, ``long`` [B,D,W-1] float32. The last program
    along time writes the state of the long filter.
    """
    if GROUPS > 1:
        WHOLE: tl.constexpr = D % (GROUPS * BC) == 0
        group = tl.program_id(0) * GROUPS
        channel = group * BC + tl.arange(0, GROUPS * BC)[None, :]
        inside = channel < D
    else:
        BLOCKS: tl.constexpr = (WIDTH + BC - 1) // BC  # of a group
        WHOLE: tl.constexpr = WIDTH % BC == 0
        group = tl.program_id(0) // BLOCKS
        place = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)[None, :]
        channel = group * WIDTH + place
        inside = place < WIDTH
    row = tl.program_id(2).to(tl.int64)
    z += row * T * 3 * D
    y += row * T * D
    short += row * (K - 1) * 3 * D
    long += row * D * (W - 1)
    keep += row * T
    ages += row * T
    docs += row * T
    taps2, off2 = load_taps(weight, bias, channel, inside, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)

    if tl.program_id(1) == tl.num_programs(1) - 1:
        # the last W-1 steps, cut at multiples of C as everywhere: the chunk of a step decides where it comes from
        for back in range(0, BACK + 1):
            start = (tl.cast(T, tl.int64) - 1) // C * C - back * C
            w = gated(z, short, long, keep, ages, taps1, off1, taps0, off0, start, T, channel, inside, D, W, C, TYPE,
                      WHOLE, HAS_SHORT, HAS_LONG, HAS_MASK, HAS_RESET)  # fmt: skip
            t = start + tl.arange(0, C)[:, None].to(tl.int64)
            if HAS_RESET:
                origin = tl.load(docs + t, mask=(t >= 0) & (t < T), other=0)
                w = tl.where(origin == tl.load(docs + T - 1), w, 0.0)
            kept = inside & (t < T) & (t > T - W)
            tl.store(long_out + row * D * (W - 1) + channel * (W - 1) + t - T + W - 1, w, mask=kept)
    else:
        gain = tl.zeros_like(off0)
        if HAS_SKIP:
            gain = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
        matrices = ()
        for d in tl.static_range(BACK + 1):
            for g in tl.static_range(GROUPS):
                own = taps + tl.minimum(group + g, D // WIDTH - 1) * W
                matrices = matrices + (load_toeplitz(own, d, W, C, TERMS, TYPE, False),)
        first = tl.program_id(1).to(tl.int64) * run * C
        past = ()
        for d in tl.static_range(1, BACK + 1):
            w = gated(z, short, long, keep, ages, taps1, off1, taps0, off0, first - d * C, T, channel, inside, D, W, C,
                      TYPE, WHOLE, HAS_SHORT, HAS_LONG, HAS_MASK, HAS_RESET)  # fmt: skip
            past = past + split_groups(w.to(TYPE), GROUPS)
        for start in tl.range(first, tl.minimum(first + run * C, T), C, num_stages=STAGES):
            t = start + tl.arange(0, C)[:, None].to(tl.int64)
            u2, _ = filter_inputs(z, short, keep, ages, taps2, off2, t, T, channel, inside, D, WHOLE, HAS_SHORT,
                                  HAS_MASK, HAS_RESET)  # fmt: skip
            u1, _ = filter_inputs(z + D, short + D, keep, ages, taps1, off1, t, T, channel, inside, D, WHOLE,
                                  HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
            u0, _ = filter_inputs(z + 2 * D, short + 2 * D, keep, ages, taps0, off0, t, T, channel, inside, D, WHOLE,
                                  HAS_SHORT, HAS_MASK, HAS_RESET)  # fmt: skip
            w = tl.where(t < T, u1 * u0, 0.0)
            ws = split_groups(w.to(TYPE), GROUPS) + past
            out = tl.fma(gain, w, convolve_chunks(matrices, ws, docs, start, T, C, GROUPS, HAS_RESET)) * u2
            written = t < T
            if not WHOLE:
                written = written & inside
            tl.store(y + t * D + channel, out.to(y.dtype.element_ty), mask=written)
            past = ws[: BACK * GROUPS]
