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
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import advance, load_modes, load_step, load_taps, power, split_double


@triton.jit
def load_window(pointer, fir, keep, t, T, inside, D: tl.constexpr, W: tl.constexpr, U: tl.constexpr,
                HAS_FIR: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """Steps t-W … t+U-1 of one block of z; ``pointer`` is step 0."""
    window = ()
    for j in tl.static_range(W + U):
        at = t + (j - W)
        window = window + (load_step(pointer + at * 3 * D, fir, keep, at, T, inside, W, True, HAS_FIR, HAS_MASK),)
    return window


@triton.jit
def filter_window(taps, offset, window, keep, t, T, U: tl.constexpr, HAS_MASK: tl.constexpr):
    """The short filter's output at steps t … t+U-1, zero where a step is padding."""
    out = ()
    for j in tl.static_range(U):
        value = offset + taps[0] * window[j]
        for k in tl.static_range(1, len(taps)):
            value += taps[k] * window[j + k]
        if HAS_MASK:
            value = tl.where(tl.load(keep + t + j, mask=t + j < T, other=0) != 0, value, 0.0)
        out = out + (value,)
    return out


@triton.jit
def retreat(p_re, p_im, r_re, r_im, nu_re, nu_im, dg):
    """λ from ν of the step after and dg of this one: two tuples over the modes."""
    re = ()
    im = ()
    for n in tl.static_range(len(p_re)):
        re = re + (nu_re[n] + r_re[n] * dg,)
        im = im + (nu_im[n] - r_im[n] * dg,)
    return re, im


@triton.jit
def turn_back(p_re, p_im, re, im):
    """``conj(p)·λ``."""
    out_re = ()
    out_im = ()
    for n in tl.static_range(len(p_re)):
        out_re = out_re + (p_re[n] * re[n] + p_im[n] * im[n],)
        out_im = out_im + (p_re[n] * im[n] - p_im[n] * re[n],)
    return out_re, out_im


@triton.jit
def zeros(N: tl.constexpr, BD: tl.constexpr):
    """N tensors of zeros, float32 [BD]."""
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros((BD,), tl.float32),)
    return out


@triton.jit
def load_rows(buffer, channel, inside, N: tl.constexpr, D: tl.constexpr):
    """Complex numbers laid out [N,2,D]."""
    re = ()
    im = ()
    for n in tl.static_range(N):
        re = re + (tl.load(buffer + 2 * n * D + channel, mask=inside, other=0.0),)
        im = im + (tl.load(buffer + (2 * n + 1) * D + channel, mask=inside, other=0.0),)
    return re, im


@triton.jit
def store_rows(buffer, channel, inside, re, im, N: tl.constexpr, D: tl.constexpr):
    """The inverse of ``load_rows``."""
    for n in tl.static_range(N):
        tl.store(buffer + 2 * n * D + channel, re[n], mask=inside)
        tl.store(buffer + (2 * n + 1) * D + channel, im[n], mask=inside)


@triton.jit(do_not_specialize=["T"])
def backward_sums_kernel(z, dy, weight, bias, poles, residues, fir, keep, ahead, behind, T,
                         D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
                         BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIR: tl.constexpr,
                         HAS_MASK: tl.constexpr):  # fmt: skip
    """What every chunk adds to both recurrences. Grid: (channels / BD, chunks, rows); outputs [B,chunks,N,2,D]."""
    W: tl.constexpr = K - 1
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    z += row * T * 3 * D + channel
    dy += row * T * D + channel
    keep += row * T
    fir += (row * 3 * D + channel) * W
    begin = tl.cast(chunk, tl.int64) * C
    place = (row * tl.num_programs(1) + chunk) * (2 * N * D)

    p_re, p_im = load_modes(poles, channel, inside, N)
    taps1, off1 = load_taps(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0, off0 = load_taps(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    re = zeros(N, BD)
    im = zeros(N, BD)
    for i in range(0, C, U):
        t = begin + i
        x1 = load_window(z + D, fir + D * W, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
        x0 = load_window(z + 2 * D, fir + 2 * D * W, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
        u1 = filter_window(taps1, off1, x1, keep, t, T, U, HAS_MASK)
        u0 = filter_window(taps0, off0, x0, keep, t, T, U, HAS_MASK)
        for j in tl.static_range(U):
            re, im = advance(p_re, p_im, re, im, u1[j] * u0[j])
    store_rows(ahead + place, channel, inside, re, im, N, D)

    r_re, r_im = load_modes(residues, channel, inside, N)
    taps2, off2 = load_taps(weight, bias, channel, inside, K, HAS_BIAS)
    nu_re = zeros(N, BD)
    nu_im = zeros(N, BD)
    for i in range(0, C, U):
        t = begin + W + C - U - i
        x2 = load_window(z, fir, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
        u2 = filter_window(taps2, off2, x2, keep, t, T, U, HAS_MASK)
        for j in tl.static_range(U - 1, -1, -1):
            slope = tl.load(dy + (t + j) * D, mask=inside & (t + j < T), other=0.0).to(tl.float32)
            lambda_re, lambda_im = retreat(p_re, p_im, r_re, r_im, nu_re, nu_im, slope * u2[j])
            nu_re, nu_im = turn_back(p_re, p_im, lambda_re, lambda_im)
    store_rows(behind + place, channel, inside, nu_re, nu_im, N, D)


@triton.jit(do_not_specialize=["T", "chunks"])
def backward_chain_kernel(poles, iir, diir, ahead, behind, T, chunks,
                          D: tl.constexpr, N: tl.constexpr, W: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
                          BD: tl.constexpr, HAS_IIR: tl.constexpr, HAS_DIIR: tl.constexpr):  # fmt: skip
    """Both recurrences through the chunks, in place. Grid: (channels / BD, N, 2·rows); odd rows run in reverse.

    ``ahead`` [B,chunks,N,2,D] becomes s before each chunk, ``behind`` becomes ν behind each chunk's last W steps.
    """
    mode = tl.program_id(1)
    row = (tl.program_id(2) // 2).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    flat = (channel * N + mode) * 2
    p_re = tl.load(poles + flat, mask=inside, other=0.0).to(tl.float64)
    p_im = tl.load(poles + flat + 1, mask=inside, other=0.0).to(tl.float64)
    start = (row * chunks * N + mode) * 2 * D + channel
    STRIDE: tl.constexpr = 2 * N * D
    q_re, q_im = power(p_re, p_im, C)
    q_re, q_re_low = split_double(q_re)
    q_im, q_im_low = split_double(q_im)
    re = tl.zeros((BD,), tl.float32)
    im = tl.zeros((BD,), tl.float32)
    if tl.program_id(2) % 2 == 0:
        if HAS_IIR:
            re = tl.load(iir + row * D * N * 2 + flat, mask=inside, other=0.0)
            im = tl.load(iir + row * D * N * 2 + flat + 1, mask=inside, other=0.0)
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
                low_re = q_re_low * re - q_im_low * im + e_re[u]
                low_im = q_re_low * im + q_im_low * re + e_im[u]
                re, im = q_re * re - q_im * im + low_re, q_re * im + q_im * re + low_im
    else:
        if HAS_DIIR:
            re = tl.load(diir + row * D * N * 2 + flat, mask=inside, other=0.0)
            im = tl.load(diir + row * D * N * 2 + flat + 1, mask=inside, other=0.0)
        # The boundaries are at W steps into each chunk, or at T: the last two spans may be shorter than C.
        for back in range(0, tl.minimum(chunks, 2)):
            chunk = chunks - 1 - back
            span = tl.minimum((chunk + 1) * C + W, T) - tl.minimum(chunk * C + W, T)
            e_re, e_im = power(p_re, p_im, span)
            at = behind + start + tl.cast(chunk, tl.int64) * STRIDE
            sum_re = tl.load(at, mask=inside, other=0.0)
            sum_im = tl.load(at + D, mask=inside, other=0.0)
            tl.store(at, re, mask=inside)
            tl.store(at + D, im, mask=inside)
            new_re = e_re * re + e_im * im + sum_re
            new_im = e_re * im - e_im * re + sum_im
            re = new_re.to(tl.float32)
            im = new_im.to(tl.float32)
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
                low_re = q_re_low * re + q_im_low * im + e_re[u]
                low_im = q_re_low * im - q_im_low * re + e_im[u]
                re, im = q_re * re + q_im * im + low_re, q_re * im - q_im * re + low_im


@triton.jit
def add_taps(total, du, window, j: tl.constexpr):
    """Add du[t]·z[t-k] to the gradient of every tap; j is the step's place in its batch of steps."""
    out = ()
    for k in tl.static_range(len(total)):
        out = out + (total[k] + du * window[j + k],)
    return out


@triton.jit
def spread(taps, du, later):
    """The gradient of z at the step of du: ``Σ_k taps[W-k]·du[t+k]``; ``later`` holds du of the W steps after it."""
    W: tl.constexpr = len(later)
    out = taps[W] * du
    for k in tl.static_range(W):
        out += taps[W - 1 - k] * later[k]
    return out, ((du,) + later)[:W]


@triton.jit(do_not_specialize=["T", "chunks", "run"])
def backward_gradients_kernel(z, dy, weight, bias, poles, residues, skip, fir, keep, dfir, ahead, behind, saved,
                              dz, sums, dfir_in, diir_in, T, chunks, run,
                              D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
                              BD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr,
                              HAS_FIR: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DFIR: tl.constexpr):  # fmt: skip
    """Gradients, a program for ``run`` chunks of BD channels of a row. Grid: (channels / BD, runs, rows).

    sums [B,runs,3(K+1)+4N+1,D]: taps and bias of x2, x1 and v, then poles and residues as [N,2], then skip.
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
    fir += (row * 3 * D + channel) * W
    dfir += (row * 3 * D + channel) * W
    dfir_in += (row * 3 * D + channel) * W

    p_re, p_im = load_modes(poles, channel, inside, N)
    r_re, r_im = load_modes(residues, channel, inside, N)
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

    first = tl.program_id(1) * run
    for chunk in range(first, tl.minimum(first + run, chunks)):
        begin = tl.cast(chunk, tl.int64) * C
        place = (row * chunks + chunk) * (2 * N * D)

        # Forward: the modes before every batch of U steps.
        re, im = load_rows(ahead + place, channel, inside, N, D)
        for batch in range(BATCHES):
            store_rows(saved + batch * (2 * N * BD), local, local < BD, re, im, N, BD)
            t = begin + batch * U
            x1 = load_window(z + D, fir + D * W, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
            x0 = load_window(z + 2 * D, fir + 2 * D * W, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
            u1 = filter_window(taps1, off1, x1, keep, t, T, U, HAS_MASK)
            u0 = filter_window(taps0, off0, x0, keep, t, T, U, HAS_MASK)
            for j in tl.static_range(U):
                re, im = advance(p_re, p_im, re, im, u1[j] * u0[j])
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
            x2 = load_window(z, fir, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
            x1 = load_window(z + D, fir + D * W, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
            x0 = load_window(z + 2 * D, fir + 2 * D * W, keep, t, T, inside, D, W, U, HAS_FIR, HAS_MASK)
            u2 = filter_window(taps2, off2, x2, keep, t, T, U, HAS_MASK)
            u1 = filter_window(taps1, off1, x1, keep, t, T, U, HAS_MASK)
            u0 = filter_window(taps0, off0, x0, keep, t, T, U, HAS_MASK)
            re, im = load_rows(saved + batch * (2 * N * BD), local, local < BD, N, BD)
            path_re = (re,)
            path_im = (im,)
            for j in tl.static_range(U):
                re, im = advance(p_re, p_im, re, im, u1[j] * u0[j])
                path_re = path_re + (re,)
                path_im = path_im + (im,)
            for j in tl.static_range(U - 1, -1, -1):
                at = t + j
                live = at < stop
                slope = tl.load(dy + at * D, mask=inside & live, other=0.0).to(tl.float32)
                s_re = path_re[j + 1]
                s_im = path_im[j + 1]
                w = u1[j] * u0[j]
                dg = slope * u2[j]
                g = gain * w
                for n in tl.static_range(N):
                    g += r_re[n] * s_re[n]
                    g -= r_im[n] * s_im[n]
                lambda_re, lambda_im = retreat(p_re, p_im, r_re, r_im, nu_re, nu_im, dg)
                new_re, new_im = turn_back(p_re, p_im, lambda_re, lambda_im)
                dw = gain * dg
                held_re = ()
                held_im = ()
                for n in tl.static_range(N):
                    dw += lambda_re[n]
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

                # Parameters: only this chunk's own steps.
                mine = at < end
                own2 = tl.where(mine, du2, 0.0)
                own1 = tl.where(mine, du1, 0.0)
                own0 = tl.where(mine, du0, 0.0)
                dtaps2 = add_taps(dtaps2, own2, x2, j)
                dtaps1 = add_taps(dtaps1, own1, x1, j)
                dtaps0 = add_taps(dtaps0, own0, x0, j)
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
                    old_re = path_re[j][n]
                    old_im = path_im[j][n]
                    sum_pre = sum_pre + (dp_re[n] + mine_re * old_re + mine_im * old_im,)
                    sum_pim = sum_pim + (dp_im[n] - mine_re * old_im + mine_im * old_re,)
                    sum_rre = sum_rre + (dr_re[n] + own * s_re[n],)
                    sum_rim = sum_rim + (dr_im[n] - own * s_im[n],)
                dp_re = sum_pre
                dp_im = sum_pim
                dr_re = sum_rre
                dr_im = sum_rim

                dz2, later2 = spread(taps2, du2, later2)
                dz1, later1 = spread(taps1, du1, later1)
                dz0, later0 = spread(taps0, du0, later0)
                if HAS_DFIR:  # the last W inputs are the state that the operator returned
                    kept = inside & (at >= T - W) & (at < T)
                    dz2 += tl.load(dfir + (at - T + W), mask=kept, other=0.0).to(tl.float32)
                    dz1 += tl.load(dfir + D * W + (at - T + W), mask=kept, other=0.0).to(tl.float32)
                    dz0 += tl.load(dfir + 2 * D * W + (at - T + W), mask=kept, other=0.0).to(tl.float32)
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
            store_modes_rows = diir_in + row * D * N * 2
            for n in tl.static_range(N):
                tl.store(store_modes_rows + (channel * N + n) * 2, nu_re[n], mask=inside)
                tl.store(store_modes_rows + (channel * N + n) * 2 + 1, nu_im[n], mask=inside)
            nothing = tl.zeros((BD,), tl.float32)
            for k in tl.static_range(W - 1, -1, -1):  # the place in the state of step k - W
                dz2, later2 = spread(taps2, nothing, later2)
                dz1, later1 = spread(taps1, nothing, later1)
                dz0, later0 = spread(taps0, nothing, later0)
                if HAS_DFIR:  # a sequence shorter than the window leaves some of it in the state
                    kept = inside & (k - T >= 0)
                    dz2 += tl.load(dfir + (k - T), mask=kept, other=0.0).to(tl.float32)
                    dz1 += tl.load(dfir + D * W + (k - T), mask=kept, other=0.0).to(tl.float32)
                    dz0 += tl.load(dfir + 2 * D * W + (k - T), mask=kept, other=0.0).to(tl.float32)
                tl.store(dfir_in + k, dz2, mask=inside)
                tl.store(dfir_in + D * W + k, dz1, mask=inside)
                tl.store(dfir_in + 2 * D * W + k, dz0, mask=inside)

    sums += (row * tl.num_programs(1) + tl.program_id(1)) * ((3 * (K + 1) + 4 * N + 1) * D) + channel
    for k in tl.static_range(K):
        tl.store(sums + k * D, dtaps2[k], mask=inside)
        tl.store(sums + (K + 1 + k) * D, dtaps1[k], mask=inside)
        tl.store(sums + (2 * K + 2 + k) * D, dtaps0[k], mask=inside)
    tl.store(sums + K * D, doff2, mask=inside)
    tl.store(sums + (2 * K + 1) * D, doff1, mask=inside)
    tl.store(sums + (3 * K + 2) * D, doff0, mask=inside)
    for n in tl.static_range(N):
        at_n = sums + (3 * (K + 1) + 2 * n) * D
        tl.store(at_n, dp_re[n], mask=inside)
        tl.store(at_n + D, dp_im[n], mask=inside)
        tl.store(at_n + 2 * N * D, dr_re[n], mask=inside)
        tl.store(at_n + (2 * N + 1) * D, dr_im[n], mask=inside)
    tl.store(sums + (3 * (K + 1) + 4 * N) * D, dgain, mask=inside)
