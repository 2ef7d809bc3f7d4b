"""The walk back of ``direct``: gradients by sums in registers, of the operator with up to eight taps.

A thread walks through a run from its end. It needs w of the W-1 steps before the current one, for the output g, and dg
of as many behind it, for the gradient of w: w enters its window W-1 steps ahead of its use. The gradients of the inputs
need those of u of the steps behind. With GIVEN, g and the gradient of w come from ``explicit_backward``, and what is
left of the long filter is the skip: W is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import forget, load_taps
from hyaena.ops.triton.hyena.adjoint import spread
from hyaena.ops.triton.hyena.direct import is_set, load_kernel, load_word, place, thirds
from hyaena.ops.triton.hyena.words import store_numbers, unpack


@triton.jit
def reaches(age, k, x, HAS_RESET: tl.constexpr):
    """x, or zero where the document of a step began less than k steps ago."""
    if HAS_RESET:
        x = tl.where(age >= k, x, 0.0)
    return x


@triton.jit
def filter_back(taps, offset, window, age, HAS_RESET: tl.constexpr):
    """The short filter over a window of K inputs, the newest first."""
    K: tl.constexpr = len(taps)
    out = tl.fma(taps[K - 1], window[0], offset)
    for k in tl.static_range(1, K):
        out = tl.fma(taps[K - 1 - k], reaches(age, k, window[k], HAS_RESET), out)
    return out


@triton.jit
def load_age(ages, t, T, HAS_RESET: tl.constexpr):
    """The age of step t's document, see ``launch.age``; large outside the sequence."""
    age = 1 << 30
    if HAS_RESET:
        age = tl.load(ages + t, mask=(t >= 0) & (t < T), other=1 << 30)
    return age


@triton.jit
def enter(taps1, off1, taps0, off0, v1, v0, x1, x0, long, keep, ages, t, T, real, W: tl.constexpr,
          HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr):  # fmt: skip
    """u1, u0 and w of step t, and the windows v1, v0 of K-1 inputs that the step before it needs.

    x1, x0 are the oldest inputs of step t; v1, v0 hold the others, the newest first.
    """
    age = load_age(ages, t, T, HAS_RESET)
    v1 = v1 + (x1,)
    v0 = v0 + (x0,)
    u1 = filter_back(taps1, off1, v1, age, HAS_RESET)
    u0 = filter_back(taps0, off0, v0, age, HAS_RESET)
    if HAS_MASK:
        here = is_set(keep, t, T)
        u1 = tl.where(here, u1, 0.0)
        u0 = tl.where(here, u0, 0.0)
    w = tl.where(t < 0, 0.0, u1 * u0)
    if HAS_LONG:
        w += tl.load(long + (t + W - 1), mask=real & (t < 0) & (t > -W), other=0.0)
    return u1, u0, w, v1[1:], v0[1:]


@triton.jit
def add_products(totals, x, du, later, own):
    """Add ``x[t]·du[t+k]`` to the gradient of tap k, k = 0 … K-1, and ``own`` to that of the bias."""
    K: tl.constexpr = len(later) + 1
    out = (tl.fma(x, du, totals[0]),)
    for k in tl.static_range(1, K):
        out = out + (tl.fma(x, later[k - 1], totals[k]),)
    return out + (totals[K] + own,)


@triton.jit
def backward_step(t, end, T, x2, x1, x0, now1, now0, slope, taps2, off2, taps1, off1, taps0, off0, kernel, v2, v1, v0,
                  u1s, u0s, ws, dgs, later2, later1, later0, totals2, totals1, totals0, totals, long, dlong, keep, ages,
                  reset, last_age, real, given_g, given_dw, W: tl.constexpr, LEAD: tl.constexpr,
                  GIVEN: tl.constexpr, HAS_LONG: tl.constexpr,
                  HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr, HAS_DLONG: tl.constexpr,
                  PARAMETERS: tl.constexpr):  # fmt: skip
    """One step of the walk: the gradients of its inputs, and what the step before it needs.

    x2, x1, x0 are the inputs that enter the windows, now1 and now0 those of step t. In the steps that LEAD to a run,
    parameters have no part. With GIVEN, the long filter's output and the gradient of w are arguments.
    """
    age = load_age(ages, t, T, HAS_RESET)
    v2 = v2 + (x2,)
    u2 = filter_back(taps2, off2, v2, age, HAS_RESET)
    if HAS_MASK:
        u2 = tl.where(is_set(keep, t, T), u2, 0.0)
    u1, u0, w, v1, v0 = enter(taps1, off1, taps0, off0, v1, v0, x1, x0, long, keep, ages, t - (W - 1), T, real, W,
                              HAS_LONG, HAS_MASK, HAS_RESET)  # fmt: skip
    u1s = u1s + (u1,)
    u0s = u0s + (u0,)
    ws = ws + (w,)
    dg = slope * u2
    if GIVEN:
        g = tl.fma(kernel[0], ws[0], given_g)
        dw = tl.fma(kernel[0], dg, given_dw)
    else:
        g = kernel[W - 1] * ws[0]
        dw = kernel[W - 1] * dg
        for k in tl.static_range(1, W):
            g = tl.fma(kernel[W - 1 - k], reaches(age, k, ws[k], HAS_RESET), g)
            dw = tl.fma(kernel[W - 1 - k], dgs[k - 1], dw)
    if HAS_DLONG:
        dw += window_gradient(dlong, t, T, last_age, real, W, HAS_RESET)
    du2 = slope * g
    du1 = dw * u0s[0]
    du0 = dw * u1s[0]
    if PARAMETERS:
        now2 = v2[0]
        own = dg
        if LEAD:
            now2 = tl.where(t < end, now2, 0.0)
            own = tl.where(t < end, dg, 0.0)
            totals2 = add_products(totals2, now2, du2, later2, tl.where(t < end, du2, 0.0))
            totals1 = add_products(totals1, now1, du1, later1, tl.where(t < end, du1, 0.0))
            totals0 = add_products(totals0, now0, du0, later0, tl.where(t < end, du0, 0.0))
        else:
            totals2 = add_products(totals2, now2, du2, later2, du2)
            totals1 = add_products(totals1, now1, du1, later1, du1)
            totals0 = add_products(totals0, now0, du0, later0, du0)
        sums = ()
        for k in tl.static_range(W):
            sums = sums + (tl.fma(own, reaches(age, k, ws[k], HAS_RESET), totals[k]),)
        totals = sums
    dz2, later2 = spread(taps2, du2, later2)
    dz1, later1 = spread(taps1, du1, later1)
    dz0, later0 = spread(taps0, du0, later0)
    if HAS_MASK:
        here = is_set(keep, t, T)
        dz2 = tl.where(here, dz2, 0.0)
        dz1 = tl.where(here, dz1, 0.0)
        dz0 = tl.where(here, dz0, 0.0)
    dgs = ((dg,) + dgs)[: W - 1]
    if HAS_RESET:
        begins = is_set(reset, t, T)
        dgs = forget(dgs, begins)
        later2 = forget(later2, begins)
        later1 = forget(later1, begins)
        later0 = forget(later0, begins)
    return (dz2, dz1, dz0, v2[1:], v1, v0, u1s[1:], u0s[1:], ws[1:], dgs, later2, later1, later0, totals2, totals1,
            totals0, totals)  # fmt: skip


@triton.jit
def load_turned(x, word, t, steps, inside):
    """Four steps around t of both channels of words, int64 each: x [D/2,steps/16,2,4]."""
    at = x + (word.to(tl.int64) * (steps // 2) + t // 16 * 8 + t % 16 // 4)
    return tl.load(at, mask=inside, other=0), tl.load(at + 4, mask=inside, other=0)


@triton.jit
def pick_turned(pair, i):
    """Step i of four, as numbers."""
    even = (pair[0] >> (i * 16)).to(tl.int32) << 16
    odd = (pair[1] >> (i * 16)).to(tl.int32) << 16
    return tl.join(even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True))


@triton.jit
def load_turned_back(x, word, t, steps, inside, U: tl.constexpr):
    """The numbers of steps t, t-1 … t-U+1, where t + 1 and U are multiples of four."""
    out = ()
    for k in tl.static_range(U // 4):
        pair = load_turned(x, word, t - 4 * k, steps, inside)
        for i in tl.static_range(4):
            out = out + (pick_turned(pair, 3 - i),)
    return out


@triton.jit
def load_given(gs, dws, word, t, T, steps, inside, nothing, D: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr,
               GIVEN: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """The long filter's output and the gradient of w at step t, where they are given."""
    g = nothing
    dw = nothing
    if TURNED:
        g = pick_turned(load_turned(gs, word, t, steps, inside & (t < T)), t % 4)
        dw = pick_turned(load_turned(dws, word, t, steps, inside & (t < T)), t % 4)
    elif GIVEN:
        g = unpack(tl.load(gs + t * (D // P), mask=inside & (t < T), other=0), P, TYPE)
        dw = unpack(tl.load(dws + t * (D // P), mask=inside & (t < T), other=0), P, TYPE)
    return g, dw


@triton.jit
def window_gradient(dlong, t, T, last_age, real, W: tl.constexpr, HAS_RESET: tl.constexpr):
    """The gradient of w at step t by the state after z; it may lie before step 0."""
    kept = (t < T) & (t > T - W)
    if HAS_RESET:
        kept = kept & (T - 1 - t <= last_age)
    return tl.load(dlong + (t - T + W - 1), mask=real & kept, other=0.0)


@triton.jit(do_not_specialize=["T", "steps", "run"])
def direct_backward_kernel(z, dy, weight, bias, taps, skip, short, long, keep, reset, ages, dlong, gs, dws, dz, sums,
                           dshort_in, dlong_in, T, steps, run,
                           TYPE: tl.constexpr, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
                           P: tl.constexpr, BW: tl.constexpr, U: tl.constexpr,
                           HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_SHORT: tl.constexpr,
                           HAS_LONG: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr,
                           HAS_DLONG: tl.constexpr, PARAMETERS: tl.constexpr, GIVEN: tl.constexpr,
                           TURNED: tl.constexpr):  # fmt: skip
    """The gradient of z and partial sums of the parameters'. Grid as forward; a run is walked from its end.

    Of the short filter's inputs a thread holds the windows of the step at which w enters, W-1 steps before the current
    one; ``later`` holds the gradients of u of the steps behind. ``z``, ``dy``, ``short`` and ``dz`` are in words.
    With GIVEN, ``gs`` and ``dws`` [B,T,D], in words, are what ``explicit_backward`` made of a long filter, and W is 1.
    With TURNED they come from ``modal_backward``, [B,D/2,steps/16,2,16] bfloat16 as int64.
    ``sums`` [B,runs,3K+3+W,D]: the taps of the three blocks, each from the newest, the three biases, the long filter
    from the newest tap.
    """
    S: tl.constexpr = K - 1
    ROW: tl.constexpr = 3 * D // P
    row, word, inside, channel, real = place(D, P, BW)
    z_2, z_1, z_0 = thirds(z + row * T * ROW + word, ROW)
    short_2, short_1, short_0 = thirds(short + row * S * ROW + word, ROW)
    dy += row * T * (D // P) + word
    dz += row * T * ROW + word
    keep += row * T
    reset += row * T
    ages += row * T
    long += row * D * (W - 1) + channel * (W - 1)
    dlong += row * D * (W - 1) + channel * (W - 1)
    taps2, off2 = load_taps(weight, bias, channel, real, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, real, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, real, K, HAS_BIAS)
    if TURNED:
        gs += row * (D // 2) * (steps // 2)
        dws += row * (D // 2) * (steps // 2)
    else:
        gs += row * T * (D // P) + word
        dws += row * T * (D // P) + word
    nothing = tl.zeros(channel.shape, tl.float32)
    kernel = (nothing,)
    if not GIVEN:
        kernel = load_kernel(taps, skip, channel, real, W, WIDTH, HAS_SKIP)
    elif HAS_SKIP:
        kernel = (tl.load(skip + channel, mask=real, other=0.0).to(tl.float32),)
    last_age = load_age(ages, T - 1, T, HAS_RESET)

    first = tl.program_id(1).to(tl.int64) * run
    end = tl.minimum(first + run, T)
    top = end + S - 1  # the first step: the inputs of the run reach S steps ahead
    # x2 at top … top-S+1; x1 and x0 likewise, and then every w that the steps before it entered
    v2 = ()
    v1 = ()
    v0 = ()
    u1s = ()
    u0s = ()
    ws = ()
    dgs = ()
    later2 = ()
    later1 = ()
    later0 = ()
    for k in tl.static_range(S):
        v2 = v2 + (load_word(z_2, short_2, keep, top - k, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
        v1 = v1 + (load_word(z_1, short_1, keep, top - k, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
        v0 = v0 + (load_word(z_0, short_0, keep, top - k, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
        later2 = later2 + (nothing,)
        later1 = later1 + (nothing,)
        later0 = later0 + (nothing,)
    for k in tl.static_range(W - 1):
        t = top - k
        x1 = load_word(z_1, short_1, keep, t - S, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
        x0 = load_word(z_0, short_0, keep, t - S, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
        u1, u0, w, v1, v0 = enter(taps1, off1, taps0, off0, v1, v0, x1, x0, long, keep, ages, t, T, real, W, HAS_LONG,
                                  HAS_MASK, HAS_RESET)  # fmt: skip
        u1s = u1s + (u1,)
        u0s = u0s + (u0,)
        ws = ws + (w,)
        # dg of the steps behind, the nearest first
        t = top + 1 + k
        wide = ()
        for j in tl.static_range(K):
            wide = wide + (load_word(z_2, short_2, keep, t - j, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
        dg = filter_back(taps2, off2, wide, load_age(ages, t, T, HAS_RESET), HAS_RESET)
        dg *= unpack(tl.load(dy + t * (D // P), mask=inside & (t < T), other=0), P, TYPE)
        if HAS_MASK:
            dg = tl.where(is_set(keep, t, T), dg, 0.0)
        dgs = dgs + (dg,)
    if HAS_RESET:  # a document that begins behind the first step and up to one of these cuts it off
        cut = False
        kept = ()
        for k in tl.static_range(W - 1):
            cut = cut | is_set(reset, top + 1 + k, T)
            kept = kept + (tl.where(cut, 0.0, dgs[k]),)
        dgs = kept

    totals2 = ()
    totals1 = ()
    totals0 = ()
    totals = ()
    if PARAMETERS:
        for _ in tl.static_range(K + 1):
            totals2 = totals2 + (nothing,)
            totals1 = totals1 + (nothing,)
            totals0 = totals0 + (nothing,)
        for _ in tl.static_range(W):
            totals = totals + (nothing,)

    aligned = first + (end - first) // U * U
    for back in range(0, top + 1 - aligned):
        t = top - back
        x2 = load_word(z_2, short_2, keep, t - S, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
        x1 = load_word(z_1, short_1, keep, t - S - W + 1, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
        x0 = load_word(z_0, short_0, keep, t - S - W + 1, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
        now1 = load_word(z_1, short_1, keep, t, end, inside, S, ROW, P, TYPE, False, HAS_MASK)
        now0 = load_word(z_0, short_0, keep, t, end, inside, S, ROW, P, TYPE, False, HAS_MASK)
        slope = unpack(tl.load(dy + t * (D // P), mask=inside & (t < T), other=0), P, TYPE)
        if HAS_MASK:
            slope = tl.where(is_set(keep, t, T), slope, 0.0)
        given_g, given_dw = load_given(gs, dws, word, t, T, steps, inside, nothing, D, P, TYPE, GIVEN, TURNED)
        (dz2, dz1, dz0, v2, v1, v0, u1s, u0s, ws, dgs, later2, later1, later0, totals2, totals1, totals0,
         totals) = backward_step(
            t, end, T, x2, x1, x0, now1, now0, slope, taps2, off2, taps1, off1, taps0, off0, kernel, v2, v1, v0, u1s,
            u0s, ws, dgs, later2, later1, later0, totals2, totals1, totals0, totals, long, dlong, keep, ages, reset,
            last_age, real, given_g, given_dw, W, True, GIVEN, HAS_LONG, HAS_MASK, HAS_RESET, HAS_DLONG,
            PARAMETERS)  # fmt: skip
        out = dz + t * ROW
        store_numbers(out, dz2, inside & (t < end), P, TYPE)
        store_numbers(out + ROW // 3, dz1, inside & (t < end), P, TYPE)
        store_numbers(out + 2 * (ROW // 3), dz0, inside & (t < end), P, TYPE)
    for turn in range(0, (aligned - first) // U):
        begin = aligned - 1 - turn * U
        a2 = ()
        a1 = ()
        a0 = ()
        b1 = ()
        b0 = ()
        slopes = ()
        given_gs = ()
        given_dws = ()
        if TURNED:
            given_gs = load_turned_back(gs, word, begin, steps, inside, U)
            given_dws = load_turned_back(dws, word, begin, steps, inside, U)
        for i in tl.static_range(U):
            t = begin - i
            if not TURNED:
                given_g, given_dw = load_given(gs, dws, word, t, T, steps, inside, nothing, D, P, TYPE, GIVEN, False)
                given_gs = given_gs + (given_g,)
                given_dws = given_dws + (given_dw,)
            a2 = a2 + (load_word(z_2, short_2, keep, t - S, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
            a1 = a1 + (load_word(z_1, short_1, keep, t - S - W + 1, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
            a0 = a0 + (load_word(z_0, short_0, keep, t - S - W + 1, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK),)
            if PARAMETERS:
                b1 = b1 + (load_word(z_1, short_1, keep, t, T, inside, S, ROW, P, TYPE, False, HAS_MASK),)
                b0 = b0 + (load_word(z_0, short_0, keep, t, T, inside, S, ROW, P, TYPE, False, HAS_MASK),)
            else:
                b1 = b1 + (nothing,)
                b0 = b0 + (nothing,)
            slope = unpack(tl.load(dy + t * (D // P), mask=inside, other=0), P, TYPE)
            if HAS_MASK:
                slope = tl.where(is_set(keep, t, T), slope, 0.0)
            slopes = slopes + (slope,)
        for i in tl.static_range(U):
            t = begin - i
            (dz2, dz1, dz0, v2, v1, v0, u1s, u0s, ws, dgs, later2, later1, later0, totals2, totals1, totals0,
             totals) = backward_step(
                t, end, T, a2[i], a1[i], a0[i], b1[i], b0[i], slopes[i], taps2, off2, taps1, off1, taps0, off0, kernel,
                v2, v1, v0, u1s, u0s, ws, dgs, later2, later1, later0, totals2, totals1, totals0, totals, long, dlong,
                keep, ages, reset, last_age, real, given_gs[i], given_dws[i], W, False, GIVEN, HAS_LONG, HAS_MASK,
                HAS_RESET, HAS_DLONG,
                PARAMETERS)  # fmt: skip
            out = dz + t * ROW
            store_numbers(out, dz2, inside, P, TYPE)
            store_numbers(out + ROW // 3, dz1, inside, P, TYPE)
            store_numbers(out + 2 * (ROW // 3), dz0, inside, P, TYPE)

    if first == 0:
        for s in tl.static_range(1, S + 1):  # the state of the short filter
            if PARAMETERS and HAS_SHORT:
                at = first - s
                x2 = load_word(z_2, short_2, keep, at, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
                x1 = load_word(z_1, short_1, keep, at, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
                x0 = load_word(z_0, short_0, keep, at, T, inside, S, ROW, P, TYPE, HAS_SHORT, HAS_MASK)
                totals2 = add_products(totals2, x2, nothing, later2, nothing)
                totals1 = add_products(totals1, x1, nothing, later1, nothing)
                totals0 = add_products(totals0, x0, nothing, later0, nothing)
            dz2, later2 = spread(taps2, nothing, later2)
            dz1, later1 = spread(taps1, nothing, later1)
            dz0, later0 = spread(taps0, nothing, later0)
            to = dshort_in + (row * 3 * D + channel) * S + (S - s)
            tl.store(to, dz2, mask=real)
            tl.store(to + D * S, dz1, mask=real)
            tl.store(to + 2 * D * S, dz0, mask=real)
        for s in tl.static_range(1, W):  # and of the long one
            dw = nothing
            for k in tl.static_range(1, W):
                dw = tl.fma(kernel[W - 1 - k], dgs[k - 1], dw)
            if HAS_DLONG:
                dw += window_gradient(dlong, first - s, T, last_age, real, W, HAS_RESET)
            tl.store(dlong_in + row * D * (W - 1) + channel * (W - 1) + (W - 1 - s), dw, mask=real)
            dgs = ((nothing,) + dgs)[: W - 1]

    if PARAMETERS:
        sums += (row * tl.num_programs(1) + tl.program_id(1)) * (3 * K + 3 + W) * D + channel
        for k in tl.static_range(K):
            tl.store(sums + k * D, totals2[k], mask=real)
            tl.store(sums + (K + k) * D, totals1[k], mask=real)
            tl.store(sums + (2 * K + k) * D, totals0[k], mask=real)
        tl.store(sums + 3 * K * D, totals2[K], mask=real)
        tl.store(sums + (3 * K + 1) * D, totals1[K], mask=real)
        tl.store(sums + (3 * K + 2) * D, totals0[K], mask=real)
        for k in tl.static_range(W):
            tl.store(sums + (3 * K + 3 + k) * D, totals[k], mask=real)
