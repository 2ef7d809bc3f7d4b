"""The operator with up to eight explicit taps: sums in registers.

A thread owns the P channels of a word and walks through a run of time; what its filters remember of the steps around
stays in registers. A run begins with the steps that its filters still remember, so runs exchange nothing. All threads
of a program are at the same step: padding and boundaries of documents are numbers of the program.

Tensors are [BW,1] words and [BW,1,P] numbers, see ``words``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import convolve, forget, load_taps
from hyaena.ops.triton.hyena.words import store_numbers, unpack


@triton.jit
def place(D: tl.constexpr, P: tl.constexpr, BW: tl.constexpr):
    """The program's row and words, their channels, and which of both there are."""
    row = tl.program_id(2).to(tl.int64)
    word = tl.program_id(0) * BW + tl.arange(0, BW)[:, None]
    channel = word[:, :, None] * P + tl.arange(0, P)[None, None, :]
    return row, word, word * P < D, channel, channel < D


@triton.jit
def thirds(at, ROW: tl.constexpr):
    """Addresses of the three blocks of a row of ROW words, from that of the first."""
    return at, at + ROW // 3, at + 2 * (ROW // 3)


@triton.jit
def load_word(z, short, keep, t, T, inside, S: tl.constexpr, ROW: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr,
              HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """Step t of a block: zero at padding, at T and later, and before the state of S steps, from -S on."""
    at = z + t * ROW
    here = (t >= 0) & (t < T)
    if HAS_SHORT:
        at = tl.where(t < 0, short + (t + S) * ROW, at)
        here = (t >= -S) & (t < T)
    if HAS_MASK:
        here = here & ((t < 0) | (tl.load(keep + t, mask=(t >= 0) & (t < T), other=0) != 0))
    return unpack(tl.load(at, mask=inside & here, other=0), P, TYPE)


@triton.jit
def load_kernel(taps, skip, channel, real, W: tl.constexpr, WIDTH: tl.constexpr, HAS_SKIP: tl.constexpr):
    """The long filter of every channel, the oldest tap first, the skip added to the newest: a tuple of W."""
    out = ()
    for k in tl.static_range(W):
        at = taps + channel // WIDTH * W + (W - 1 - k)
        out = out + (tl.load(at, mask=real, other=0.0).to(tl.float32),)
    if HAS_SKIP:
        out = out[: W - 1] + (out[W - 1] + tl.load(skip + channel, mask=real, other=0.0).to(tl.float32),)
    return out


@triton.jit
def is_set(flags, t, T):
    """Whether the byte of step t is set; not outside the sequence."""
    return tl.load(flags + t, mask=(t >= 0) & (t < T), other=0) != 0


@triton.jit
def forward_step(taps2, off2, taps1, off1, taps0, off0, kernel, x2, x1, x0, h2, h1, h0, past, keep, reset, t, T,
                 HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """One step: y, and the histories after it."""
    if HAS_RESET:
        begins = is_set(reset, t, T)
        h2 = forget(h2, begins)
        h1 = forget(h1, begins)
        h0 = forget(h0, begins)
        past = forget(past, begins)
    u2, h2 = convolve(taps2, off2, h2, x2)
    u1, h1 = convolve(taps1, off1, h1, x1)
    u0, h0 = convolve(taps0, off0, h0, x0)
    w = u1 * u0
    if HAS_MASK:
        w = tl.where(is_set(keep, t, T), w, 0.0)
    g, past = convolve(kernel, 0.0, past, w)
    out = g * u2
    if HAS_MASK:
        out = tl.where(is_set(keep, t, T), out, 0.0)
    return out, h2, h1, h0, past


@triton.jit(do_not_specialize=["T", "run"])
def direct_forward_kernel(z, weight, bias, taps, skip, short, long, keep, reset, y, long_out, T, run,
                          TYPE: tl.constexpr, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
                          P: tl.constexpr, BW: tl.constexpr, U: tl.constexpr, HAS_BIAS: tl.constexpr,
                          HAS_SKIP: tl.constexpr, HAS_SHORT: tl.constexpr, HAS_LONG: tl.constexpr,
                          HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """Equals ``ops.hyena`` by any plain method. Grid: (blocks of BW words, runs of time, rows).

    ``z``, ``short`` [B,K-1,3D] and ``y`` are in words of P numbers of TYPE; ``long`` float32 [B,D,W-1].
    """
    S: tl.constexpr = K - 1
    ROW: tl.constexpr = 3 * D // P
    row, word, inside, channel, real = place(D, P, BW)
    z_2, z_1, z_0 = thirds(z + row * T * ROW + word, ROW)
    short_2, short_1, short_0 = thirds(short + row * S * ROW + word, ROW)
    y += row * T * (D // P) + word
    keep += row * T
    reset += row * T
    long += row * D * (W - 1) + channel * (W - 1)
    taps2, off2 = load_taps(weight, bias, channel, real, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, real, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, real, K, HAS_BIAS)
    kernel = load_kernel(taps, skip, channel, real, W, WIDTH, HAS_SKIP)

    first = tl.program_id(1).to(tl.int64) * run
    end = tl.minimum(first + run, T)
    h2 = ()
    h1 = ()
    h0 = ()
    past = ()
    for k in tl.static_range(S):
        at = first - S + k
        h2 = h2 + (load_word(z_2, short_2, keep, at, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
        at = at - (W - 1)
        h1 = h1 + (load_word(z_1, short_1, keep, at, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
        h0 = h0 + (load_word(z_0, short_0, keep, at, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
    if HAS_RESET:
        for k in tl.static_range(1, S):
            at = first - S + k
            h2 = forget(h2[:k], is_set(reset, at, T)) + h2[k:]
            begins = is_set(reset, at - (W - 1), T)
            h1 = forget(h1[:k], begins) + h1[k:]
            h0 = forget(h0[:k], begins) + h0[k:]
    for k in tl.static_range(W - 1):
        t = first - (W - 1) + k
        x1 = load_word(z_1, short_1, keep, t, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
        x0 = load_word(z_0, short_0, keep, t, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
        if HAS_RESET:
            begins = is_set(reset, t, T)
            h1 = forget(h1, begins)
            h0 = forget(h0, begins)
            past = forget(past, begins)
        u1, h1 = convolve(taps1, off1, h1, x1)
        u0, h0 = convolve(taps0, off0, h0, x0)
        w = tl.where(t < 0, 0.0, u1 * u0)
        if HAS_MASK:
            w = tl.where(is_set(keep, t, T), w, 0.0)
        if HAS_LONG:
            w += tl.load(long + k, mask=real & (t < 0), other=0.0)
        past = past + (w,)
    whole = first + (end - first) // U * U
    for start in range(first, whole, U):
        x2s = ()
        x1s = ()
        x0s = ()
        for i in tl.static_range(U):
            x2s = x2s + (load_word(z_2, short_2, keep, start + i, T, inside, S, ROW, P, TYPE, False, HAS_MASK),)
            x1s = x1s + (load_word(z_1, short_1, keep, start + i, T, inside, S, ROW, P, TYPE, False, HAS_MASK),)
            x0s = x0s + (load_word(z_0, short_0, keep, start + i, T, inside, S, ROW, P, TYPE, False, HAS_MASK),)
        for i in tl.static_range(U):
            out, h2, h1, h0, past = forward_step(taps2, off2, taps1, off1, taps0, off0, kernel, x2s[i], x1s[i], x0s[i],
                                                 h2, h1, h0, past, keep, reset, start + i, T, HAS_MASK,
                                                 HAS_RESET)  # fmt: skip
            store_numbers(y + (start + i) * (D // P), out, inside, P, TYPE)
    for late in range(whole, end):
        n2 = load_word(z_2, short_2, keep, late, T, inside, S, ROW, P, TYPE, False, HAS_MASK)
        n1 = load_word(z_1, short_1, keep, late, T, inside, S, ROW, P, TYPE, False, HAS_MASK)
        n0 = load_word(z_0, short_0, keep, late, T, inside, S, ROW, P, TYPE, False, HAS_MASK)
        out, h2, h1, h0, past = forward_step(taps2, off2, taps1, off1, taps0, off0, kernel, n2, n1, n0, h2, h1, h0,
                                             past, keep, reset, late, T, HAS_MASK, HAS_RESET)  # fmt: skip
        store_numbers(y + late * (D // P), out, inside, P, TYPE)
    if end == T:
        for k in tl.static_range(W - 1):
            tl.store(long_out + row * D * (W - 1) + channel * (W - 1) + k, past[k], mask=real)
