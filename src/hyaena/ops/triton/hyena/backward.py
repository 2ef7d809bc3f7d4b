"""The backward kernels: the gradient of z and partial sums of every parameter's, from z and the gradient of y alone.

The adjoint runs in reverse time. With s the modes, w = x1·v, y = g·x2, and real pairs for complex gradients::

    dg[t] = dy[t]·x2[t]      λ[t] = ν[t+1] + conj(R) dg[t]      ν[t] = conj(p) λ[t]      ν[T] = gradient of the state
    dw[t] = Re Σ_n λ_n[t] + skip·dg[t]      dR += dg[t] conj(s[t])      dp += λ[t] conj(s[t-1])

Time is cut into chunks of C steps. Nothing longer than one state per chunk is stored:

    sums       every chunk alone: what it adds to s at its end, and to ν at its beginning
    chain      both recurrences through the chunks: s before, and ν behind, every chunk
    gradients  every chunk again: s forward, kept at every U-th step; then backward, U steps at a time

A step of the short filter reaches W = K-1 steps ahead, so ``gradients`` walks back from W steps beyond its chunk, and
ν is passed on at the steps W after the chunks' ends. Programs add the gradients of parameters over their own chunks
and write them to places of their own: no atomics, the same sums on every run.

Packed documents (HAS_RESET): ``ages`` int32 [B,T] counts the steps since the document of a step began, see
``launch.age``. Where it is 0, s[t] does not depend on s[t-1], and ν[t] is 0; tap k of the short filter is 0 where the
age is less than k; what a chunk passes on is 0 where a document begins in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import (
    advance,
    forget,
    load_poles,
    load_residues,
    load_taps,
    pole,
    power,
    split_double,
)
from hyaena.ops.triton.hyena.adjoint import (
    add_taps,
    filter_window,
    load_ages,
    load_rows,
    load_window,
    negate,
    retreat,
    rotate,
    scale,
    spread,
    store_rows,
    turn_back,
    zeros,
)


@triton.jit(do_not_specialize=["T"])
def backward_sums_kernel(z, dy, weight, bias, poles, residues, short, keep, ages, ahead, behind, T,
                         D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
                         BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORT: tl.constexpr,
                         HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    """What every chunk adds to both recurrences. Grid: (channels / BD, chunks, rows); outputs [B,chunks,N,2,D]."""
    W: tl.constexpr = K - 1
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    z += row * T * 3 * D + channel
    dy += row * T * D + channel
    keep += row * T
    ages += row * T
    short += (row * 3 * D + channel) * W
    begin = tl.cast(chunk, tl.int64) * C
    place = (row * tl.num_programs(1) + chunk) * (2 * N * D)

    p_re, p_im = load_poles(poles, channel, inside, N, REAL)
    taps1, off1 = load_taps(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    re = zeros(N, BD)
    im = zeros(N, BD)
    reach = 0  # steps of the chunk's last document, to whose state alone its end belongs
    if HAS_RESET:
        reach = tl.load(ages + begin + C - 1, mask=begin + C <= T, other=1 << 30)
    for i in range(0, C, U):
        t = begin + i
        age = load_ages(ages, t, T, U, HAS_RESET)
        x1 = load_window(z + D, short + D * W, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
        x0 = load_window(z + 2 * D, short + 2 * D * W, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
        u1 = filter_window(taps1, off1, x1, age, keep, t, T, U, HAS_MASK, HAS_RESET)
        u0 = filter_window(taps0, off0, x0, age, keep, t, T, U, HAS_MASK, HAS_RESET)
        for j in tl.static_range(U):
            w = u1[j] * u0[j]
            if HAS_RESET:  # no document begins between this step and the end of the chunk
                w = tl.where(C - 1 - i - j <= reach, w, 0.0)
            re, im = advance(p_re, p_im, re, im, w, REAL)
    store_rows(ahead + place, channel, inside, re, im, N, D)

    r_re, r_im = load_residues(residues, channel, inside, N, REAL)
    taps2, off2 = load_taps(weight, bias, channel, inside, K, HAS_BIAS)
    nu_re = zeros(N, BD)
    nu_im = zeros(N, BD)
    for i in range(0, C, U):
        t = begin + W + C - U - i
        age = load_ages(ages, t, T, U, HAS_RESET)
        x2 = load_window(z, short, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
        u2 = filter_window(taps2, off2, x2, age, keep, t, T, U, HAS_MASK, HAS_RESET)
        for j in tl.static_range(U - 1, -1, -1):
            slope = tl.load(dy + (t + j) * D, mask=inside & (t + j < T), other=0.0).to(tl.float32)
            dg = slope * u2[j]
            if HAS_RESET:  # no document begins from step W of the chunk to this one
                dg = tl.where(age[j] > C - U - i + j, dg, 0.0)
            lambda_re, lambda_im = retreat(p_re, p_im, r_re, r_im, nu_re, nu_im, dg)
            nu_re, nu_im = turn_back(p_re, p_im, lambda_re, lambda_im, REAL)
    store_rows(behind + place, channel, inside, nu_re, nu_im, N, D)


@triton.jit(do_not_specialize=["T", "chunks"])
def backward_chain_kernel(poles, long, dlong, ages, ahead, behind, T, chunks,
                          D: tl.constexpr, N: tl.constexpr, W: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
                          BD: tl.constexpr, HAS_LONG: tl.constexpr, HAS_DLONG: tl.constexpr,
                          HAS_RESET: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    """Both recurrences through the chunks, in place. Grid: (channels / BD, N, 2·rows); odd rows run in reverse.

    ``ahead`` [B,chunks,N,2,D] becomes s before each chunk, ``behind`` becomes ν behind each chunk's last W steps.
    """
    mode = tl.program_id(1)
    row = (tl.program_id(2) // 2).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    flat = (channel * N + mode) * 2
    p_re, p_im = pole(poles, flat, inside, REAL)
    start = (row * chunks * N + mode) * 2 * D + channel
    ages += row * T
    STRIDE: tl.constexpr = 2 * N * D
    q_re, q_im = power(p_re, p_im, C, 31, REAL)
    q_re, q_re_low = split_double(q_re)
    q_im, q_im_low = split_double(q_im)
    re = tl.zeros((BD,), tl.float32)
    im = tl.zeros((BD,), tl.float32)
    if tl.program_id(2) % 2 == 0:
        if HAS_LONG:
            re = tl.load(long + row * D * N * 2 + flat, mask=inside, other=0.0)
            im = tl.load(long + row * D * N * 2 + flat + 1, mask=inside, other=0.0)
        for first in range(0, chunks, U):
            e_re = ()
            e_im = ()
            for u in tl.static_range(U):
                at = ahead + start + tl.cast(first + u, tl.int64) * STRIDE
                here = inside & (first + u < chunks)
                e_re = e_re + (tl.load(at, mask=here, other=0.0),)
                e_im = e_im + (tl.load(at + D, mask=here, other=0.0),)
            for u in tl.static_range(U):
                at = ahead + start + tl.cast(first + u, tl.int64) * STRIDE
                here = inside & (first + u < chunks)
                tl.store(at, re, mask=here)
                tl.store(at + D, im, mask=here)
                if HAS_RESET:  # of a chunk that ends before T: nothing reads the state behind the last one
                    end = tl.cast(first + u + 1, tl.int64) * C
                    cut = tl.load(ages + end - 1, mask=end <= T, other=0) < C
                    re = tl.where(cut, 0.0, re)
                    im = tl.where(cut, 0.0, im)
                low_re, low_im = rotate(q_re_low, q_im_low, re, im, False, REAL)
                re, im = rotate(q_re, q_im, re, im, False, REAL)
                re += low_re + e_re[u]
                im += low_im + e_im[u]
    else:
        if HAS_DLONG:
            re = tl.load(dlong + row * D * N * 2 + flat, mask=inside, other=0.0)
            im = tl.load(dlong + row * D * N * 2 + flat + 1, mask=inside, other=0.0)
        # The boundaries are at W steps into each chunk, or at T: the last two spans may be shorter than C.
        for back in range(0, tl.minimum(chunks, 2)):
            chunk = chunks - 1 - back
            stop = tl.minimum((chunk + 1) * C + W, T)
            span = stop - tl.minimum(chunk * C + W, T)
            e_re, e_im = power(p_re, p_im, span, 31, REAL)
            at = behind + start + tl.cast(chunk, tl.int64) * STRIDE
            sum_re = tl.load(at, mask=inside, other=0.0)
            sum_im = tl.load(at + D, mask=inside, other=0.0)
            tl.store(at, re, mask=inside)
            tl.store(at + D, im, mask=inside)
            if HAS_RESET:
                cut = tl.load(ages + stop - 1) < span
                re = tl.where(cut, 0.0, re)
                im = tl.where(cut, 0.0, im)
            new_re, new_im = rotate(e_re, e_im, re, im, True, REAL)
            re = (new_re + sum_re).to(tl.float32)
            im = (new_im + sum_im).to(tl.float32)
        for first in range(2, chunks, U):
            e_re = ()
            e_im = ()
            for u in tl.static_range(U):
                at = behind + start + tl.cast(chunks - 1 - first - u, tl.int64) * STRIDE
                here = inside & (first + u < chunks)
                e_re = e_re + (tl.load(at, mask=here, other=0.0),)
                e_im = e_im + (tl.load(at + D, mask=here, other=0.0),)
            for u in tl.static_range(U):
                at = behind + start + tl.cast(chunks - 1 - first - u, tl.int64) * STRIDE
                here = inside & (first + u < chunks)
                tl.store(at, re, mask=here)
                tl.store(at + D, im, mask=here)
                if HAS_RESET:
                    end = tl.cast(chunks - first - u, tl.int64) * C + W
                    cut = tl.load(ages + end - 1, mask=first + u < chunks, other=0) < C
                    re = tl.where(cut, 0.0, re)
                    im = tl.where(cut, 0.0, im)
                low_re, low_im = rotate(q_re_low, q_im_low, re, im, True, REAL)
                re, im = rotate(q_re, q_im, re, im, True, REAL)
                re += low_re + e_re[u]
                im += low_im + e_im[u]


@triton.jit(do_not_specialize=["T", "chunks", "run"])
def backward_gradients_kernel(z, dy, weight, bias, poles, residues, skip, short, keep, ages, dshort, ahead, behind,
                              saved, dz, sums, dshort_in, dlong_in, T, chunks, run,
                              D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
                              BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                              HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr,
                              HAS_DSHORT: tl.constexpr, PARAMETERS: tl.constexpr, REAL: tl.constexpr):  # fmt: skip
    """Gradients, a program for ``run`` chunks of BD channels of a row. Grid: (channels / BD, runs, rows).

    sums [B,runs,3(K+1)+4N+1,D]: taps and bias of x2, x1 and v, then poles and residues as [N,2], then skip; written
    with PARAMETERS only.
    ``saved`` is scratch: one [(C+W)/U rounded up, N, 2, BD] per program.
    """
    W: tl.constexpr = K - 1
    BATCHES: tl.constexpr = (C + W + U - 1) // U
    row = tl.program_id(2).to(tl.int64)
    local = tl.arange(0, BD)
    channel = tl.program_id(0) * BD + local
    inside = channel < D
    program = (row * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    saved += program * (BATCHES * 2 * N * BD)
    z += row * T * 3 * D + channel
    dz += row * T * 3 * D + channel
    dy += row * T * D + channel
    keep += row * T
    ages += row * T
    short += (row * 3 * D + channel) * W
    dshort += (row * 3 * D + channel) * W
    dshort_in += (row * 3 * D + channel) * W

    p_re, p_im = load_poles(poles, channel, inside, N, REAL)
    r_re, r_im = load_residues(residues, channel, inside, N, REAL)
    taps2, off2 = load_taps(weight, bias, channel, inside, K, HAS_BIAS)
    taps1, off1 = load_taps(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    gain = tl.zeros((BD,), tl.float32)
    if HAS_SKIP:
        gain = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)

    dtaps2 = zeros(K, BD)
    dtaps1 = zeros(K, BD)
    dtaps0 = zeros(K, BD)
    doff2 = tl.zeros((BD,), tl.float32)
    doff1 = tl.zeros((BD,), tl.float32)
    doff0 = tl.zeros((BD,), tl.float32)
    dp_re = zeros(N, BD)
    dp_im = zeros(N, BD)
    dr_re = zeros(N, BD)
    dr_im = zeros(N, BD)
    dgain = tl.zeros((BD,), tl.float32)

    last_age = 0
    if HAS_RESET:  # the state that the operator returned holds inputs of the last document only
        last_age = tl.load(ages + T - 1)

    first = tl.program_id(1) * run
    for chunk in range(first, tl.minimum(first + run, chunks)):
        begin = tl.cast(chunk, tl.int64) * C
        place = (row * chunks + chunk) * (2 * N * D)

        # Forward: the modes before every batch of U steps.
        re, im = load_rows(ahead + place, channel, inside, N, D)
        for batch in range(BATCHES):
            store_rows(saved + batch * (2 * N * BD), local, local < BD, re, im, N, BD)
            t = begin + batch * U
            age = load_ages(ages, t, T, U, HAS_RESET)
            x1 = load_window(z + D, short + D * W, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
            x0 = load_window(z + 2 * D, short + 2 * D * W, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
            u1 = filter_window(taps1, off1, x1, age, keep, t, T, U, HAS_MASK, HAS_RESET)
            u0 = filter_window(taps0, off0, x0, age, keep, t, T, U, HAS_MASK, HAS_RESET)
            for j in tl.static_range(U):
                if HAS_RESET:
                    re = forget(re, age[j] == 0)
                    im = forget(im, age[j] == 0)
                re, im = advance(p_re, p_im, re, im, u1[j] * u0[j], REAL)
        tl.debug_barrier()

        # Backward, from the step before `stop`.
        nu_re, nu_im = load_rows(behind + place, channel, inside, N, D)
        stop = tl.minimum(begin + C + W, T)
        end = tl.minimum(begin + C, T)
        later2 = zeros(W, BD)
        later1 = zeros(W, BD)
        later0 = zeros(W, BD)
        for back_batch in range(BATCHES):
            batch = BATCHES - 1 - back_batch
            t = begin + batch * U
            age = load_ages(ages, t, T, U, HAS_RESET)
            x2 = load_window(z, short, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
            x1 = load_window(z + D, short + D * W, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
            x0 = load_window(z + 2 * D, short + 2 * D * W, keep, t, T, inside, D, W, U, HAS_SHORT, HAS_MASK)
            u2 = filter_window(taps2, off2, x2, age, keep, t, T, U, HAS_MASK, HAS_RESET)
            u1 = filter_window(taps1, off1, x1, age, keep, t, T, U, HAS_MASK, HAS_RESET)
            u0 = filter_window(taps0, off0, x0, age, keep, t, T, U, HAS_MASK, HAS_RESET)
            re, im = load_rows(saved + batch * (2 * N * BD), local, local < BD, N, BD)
            before_re = ()  # the modes that a step goes on from, and those after it
            before_im = ()
            path_re = ()
            path_im = ()
            for j in tl.static_range(U):
                if HAS_RESET:
                    re = forget(re, age[j] == 0)
                    im = forget(im, age[j] == 0)
                before_re = before_re + (re,)
                before_im = before_im + (im,)
                re, im = advance(p_re, p_im, re, im, u1[j] * u0[j], REAL)
                path_re = path_re + (re,)
                path_im = path_im + (im,)
            for j in tl.static_range(U - 1, -1, -1):
                at = t + j
                live = at < stop
                slope = tl.load(dy + at * D, mask=inside & live, other=0.0).to(tl.float32)
                s_re = path_re[j]
                s_im = path_im[j]
                w = u1[j] * u0[j]
                dg = slope * u2[j]
                g = gain * w
                for n in tl.static_range(N):
                    g += r_re[n] * s_re[n]
                    g -= r_im[n] * s_im[n]
                lambda_re, lambda_im = retreat(p_re, p_im, r_re, r_im, nu_re, nu_im, dg)
                new_re, new_im = turn_back(p_re, p_im, lambda_re, lambda_im, REAL)
                if HAS_RESET:
                    new_re = forget(new_re, age[j] == 0)
                    new_im = forget(new_im, age[j] == 0)
                dw = gain * dg
                held_re = ()
                held_im = ()
                for n in tl.static_range(N):
                    dw += lambda_re[n]
                    if REAL:
                        dw += lambda_im[n]
                    held_re = held_re + (tl.where(live, new_re[n], nu_re[n]),)
                    held_im = held_im + (tl.where(live, new_im[n], nu_im[n]),)
                nu_re = held_re
                nu_im = held_im
                real = live
                if HAS_MASK:
                    real = live & (tl.load(keep + at, mask=at < T, other=0) != 0)
                du2 = tl.where(real, slope * g, 0.0)
                du1 = tl.where(real, dw * u0[j], 0.0)
                du0 = tl.where(real, dw * u1[j], 0.0)

                mine = at < end
                if PARAMETERS:  # only this chunk's own steps
                    own2 = tl.where(mine, du2, 0.0)
                    own1 = tl.where(mine, du1, 0.0)
                    own0 = tl.where(mine, du0, 0.0)
                    dtaps2 = add_taps(dtaps2, own2, x2, age[j], j, HAS_RESET)
                    dtaps1 = add_taps(dtaps1, own1, x1, age[j], j, HAS_RESET)
                    dtaps0 = add_taps(dtaps0, own0, x0, age[j], j, HAS_RESET)
                    doff2 += own2
                    doff1 += own1
                    doff0 += own0
                    own = tl.where(mine, dg, 0.0)
                    dgain += own * w
                    sum_pre = ()
                    sum_pim = ()
                    sum_rre = ()
                    sum_rim = ()
                    for n in tl.static_range(N):
                        mine_re = tl.where(mine, lambda_re[n], 0.0)
                        mine_im = tl.where(mine, lambda_im[n], 0.0)
                        old_re = before_re[j][n]
                        old_im = before_im[j][n]
                        turn_re, turn_im = rotate(old_re, old_im, mine_re, mine_im, True, REAL)
                        sum_pre = sum_pre + (dp_re[n] + turn_re,)
                        sum_pim = sum_pim + (dp_im[n] + turn_im,)
                        sum_rre = sum_rre + (dr_re[n] + own * s_re[n],)
                        sum_rim = sum_rim + (dr_im[n] - own * s_im[n],)
                    dp_re = sum_pre
                    dp_im = sum_pim
                    dr_re = sum_rre
                    dr_im = sum_rim

                dz2, later2 = spread(taps2, du2, later2)
                dz1, later1 = spread(taps1, du1, later1)
                dz0, later0 = spread(taps0, du0, later0)
                if HAS_RESET:
                    later2 = forget(later2, age[j] == 0)
                    later1 = forget(later1, age[j] == 0)
                    later0 = forget(later0, age[j] == 0)
                if HAS_DSHORT:  # the last W inputs are the state that the operator returned
                    kept = inside & (at >= T - W) & (at < T)
                    if HAS_RESET:
                        kept = kept & (T - 1 - at <= last_age)
                    dz2 += tl.load(dshort + (at - T + W), mask=kept, other=0.0).to(tl.float32)
                    dz1 += tl.load(dshort + D * W + (at - T + W), mask=kept, other=0.0).to(tl.float32)
                    dz0 += tl.load(dshort + 2 * D * W + (at - T + W), mask=kept, other=0.0).to(tl.float32)
                if HAS_MASK:
                    dz2 = tl.where(real, dz2, 0.0)
                    dz1 = tl.where(real, dz1, 0.0)
                    dz0 = tl.where(real, dz0, 0.0)
                written = inside & mine
                out = dz + at * 3 * D
                tl.store(out, dz2.to(dz.dtype.element_ty), mask=written)
                tl.store(out + D, dz1.to(dz.dtype.element_ty), mask=written)
                tl.store(out + 2 * D, dz0.to(dz.dtype.element_ty), mask=written)
        tl.debug_barrier()

        if chunk == 0:
            store_modes_rows = dlong_in + row * D * N * 2
            for n in tl.static_range(N):
                tl.store(store_modes_rows + (channel * N + n) * 2, nu_re[n], mask=inside)
                tl.store(store_modes_rows + (channel * N + n) * 2 + 1, nu_im[n], mask=inside)
            nothing = tl.zeros((BD,), tl.float32)
            for k in tl.static_range(W - 1, -1, -1):  # the place in the state of step k - W
                dz2, later2 = spread(taps2, nothing, later2)
                dz1, later1 = spread(taps1, nothing, later1)
                dz0, later0 = spread(taps0, nothing, later0)
                if HAS_DSHORT:  # a sequence shorter than the window leaves some of it in the state
                    kept = inside & (k - T >= 0)
                    if HAS_RESET:
                        kept = kept & (T - 1 - k + W <= last_age)
                    dz2 += tl.load(dshort + (k - T), mask=kept, other=0.0).to(tl.float32)
                    dz1 += tl.load(dshort + D * W + (k - T), mask=kept, other=0.0).to(tl.float32)
                    dz0 += tl.load(dshort + 2 * D * W + (k - T), mask=kept, other=0.0).to(tl.float32)
                tl.store(dshort_in + k, dz2, mask=inside)
                tl.store(dshort_in + D * W + k, dz1, mask=inside)
                tl.store(dshort_in + 2 * D * W + k, dz0, mask=inside)

    if PARAMETERS:
        sums += (row * tl.num_programs(1) + tl.program_id(1)) * ((3 * (K + 1) + 4 * N + 1) * D) + channel
        for k in tl.static_range(K):
            tl.store(sums + k * D, dtaps2[k], mask=inside)
            tl.store(sums + (K + 1 + k) * D, dtaps1[k], mask=inside)
            tl.store(sums + (2 * K + 2 + k) * D, dtaps0[k], mask=inside)
        tl.store(sums + K * D, doff2, mask=inside)
        tl.store(sums + (2 * K + 1) * D, doff1, mask=inside)
        tl.store(sums + (3 * K + 2) * D, doff0, mask=inside)
        if REAL:  # p = exp(λ), and load_residues negated the second of a pair
            dp_re = scale(dp_re, p_re)
            dp_im = scale(dp_im, p_im)
            dr_im = negate(dr_im)
        for n in tl.static_range(N):
            at_n = sums + (3 * (K + 1) + 2 * n) * D
            tl.store(at_n, dp_re[n], mask=inside)
            tl.store(at_n + D, dp_im[n], mask=inside)
            tl.store(at_n + 2 * N * D, dr_re[n], mask=inside)
            tl.store(at_n + (2 * N + 1) * D, dr_im[n], mask=inside)
        tl.store(sums + (3 * (K + 1) + 4 * N) * D, dgain, mask=inside)
