"""The operator with modes, backward: the long filter's share by matrix products, before ``direct_backward``.

With w = u1·u0 and dg = dy·u2 cut into chunks of C steps, rows of matrices [chunks,C] of every channel, and a real pair
for every complex number. Inside a chunk the filter is a Toeplitz product; between chunks it is its modes s, and b, the
conjugate of the gradient of a state::

    s[c+1] = p^C s[c] + Σ_i p^(C-1-i) w[c,i]            b[c-1] = p^C b[c] + R Σ_i p^(i+1) dg[c,i]
    g[c,j] = Σ_{i<=j} h[j-i] w[c,i] + Re R p^(j+1) s[c]   dw[c,j] = Σ_{i>=j} h[i-j] dg[c,i] + Re p^(C-1-j) b[c]

The parameters' gradients need no state inside a chunk, only four sums over chunks::

    m[t] = Σ dg[c,i+t] w[c,i]     X[i] = Σ w[c,i] b[c]     Y[i] = Σ dg[c,i] s[c]     Z = Σ b[c] s[c]
    conj dR = Σ_t p^t m[t] + Σ_i p^(i+1) Y[i]
    conj dp = R Σ_t t p^(t-1) m[t] + R Σ_i (i+1) p^i Y[i] + Σ_i (C-1-i) p^(C-2-i) X[i] + C p^(C-1) Z

So the cost of a number hardly grows with the modes. Products take bfloat16 factors: w, dg, states and powers in two
terms where parameters or states depend on them, in one for g and dw, which are bfloat16.

Four kernels: powers of the poles; w and dg with time contiguous; s, and b; everything else, a program for every channel
and row. Tuples hold terms, or the parts of a number: two, or one of real modes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import power
from hyaena.ops.triton.hyena.modal import multiply, terms


@triton.jit
def times(a, b):
    """The product of two numbers of one or two parts."""
    if len(a) == 1:  # noqa: SIM108, one branch is compiled
        out = (a[0] * b[0],)
    else:
        out = (a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0])
    return out


@triton.jit
def plus(a, b):
    """The sum of two tuples."""
    out = ()
    for k in tl.static_range(len(a)):
        out = out + (a[k] + b[k],)
    return out


@triton.jit
def every_power(re, im, SIZE: tl.constexpr, REAL: tl.constexpr):
    """p^0 … p^(SIZE-1) of float64 [1,NP]: two [SIZE,NP]; SIZE is a power of four at most 64."""
    ROOT: tl.constexpr = 8 if SIZE == 64 else 4
    NP: tl.constexpr = re.shape[1]
    i = tl.arange(0, ROOT)[:, None]
    none = tl.zeros((ROOT, NP), tl.float64)
    low_re, low_im = power(re + none, im + none, i, 4, REAL)
    high_re, high_im = power(re + none, im + none, i * ROOT, 6, REAL)
    low_re, low_im = low_re[None, :, :], low_im[None, :, :]
    high_re, high_im = high_re[:, None, :], high_im[:, None, :]
    if REAL:
        out_re = high_re * low_re
        out_im = high_im * low_im
    else:
        out_re = high_re * low_re - high_im * low_im
        out_im = high_re * low_im + high_im * low_re
    return tl.reshape(out_re, (SIZE, NP)), tl.reshape(out_im, (SIZE, NP))


@triton.jit
def join_parts(re, im, PARTS: tl.constexpr):
    """Numbers [R,NP] with their parts side by side, [R,PARTS·NP]."""
    if PARTS == 1:  # noqa: SIM108, one branch is compiled
        out = re
    else:
        out = tl.reshape(tl.join(re, im), (re.shape[0], 2 * re.shape[1]))
    return out


@triton.jit
def split_parts(x, PARTS: tl.constexpr):
    """The inverse of ``join_parts``: a tuple of the parts."""
    if PARTS == 1:  # noqa: SIM108, one branch is compiled
        out = (x,)
    else:
        out = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return out


@triton.jit
def modal_powers_kernel(poles, residues, powers, hops, out_of, taps, D: tl.constexpr, N: tl.constexpr,
                        NP: tl.constexpr, C: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Tables of every channel, float32: p^0 … p^C, p^0 … p^MC, R·p^1 … R·p^C, and the first C taps.

    ``powers`` [D,C+1,NP,PARTS], ``hops`` [D,M+1,NP,PARTS], ``out_of`` [D,C,NP,PARTS], ``taps`` [D,C]; ``poles`` and
    ``residues`` [D,N,PARTS] float32; of real modes the poles' logarithms. Grid: (D,). Powers are formed in float64.
    """
    REAL: tl.constexpr = PARTS == 1
    LINE: tl.constexpr = PARTS * NP
    channel = tl.program_id(0)
    mode = tl.arange(0, NP)[None, :]
    column = tl.arange(0, LINE)[None, :]
    at = (channel * N + mode) * PARTS
    inside = mode < N
    re = tl.load(poles + at, mask=inside, other=0.0).to(tl.float64)
    im = tl.load(poles + at + (PARTS - 1), mask=inside, other=0.0).to(tl.float64)
    if REAL:
        re = tl.exp(re)
    r_re = tl.load(residues + at, mask=inside, other=0.0).to(tl.float64)
    r_im = tl.load(residues + at + (PARTS - 1), mask=inside, other=0.0).to(tl.float64)
    step = tl.arange(0, C)[:, None]
    out_re, out_im = every_power(re, im, C, REAL)
    to = powers + channel * ((C + 1) * LINE) + column
    tl.store(to + step * LINE, join_parts(out_re, out_im, PARTS).to(tl.float32))
    q_re, q_im = power(re, im, C + tl.zeros_like(mode), 8, REAL)
    tl.store(to + C * LINE, join_parts(q_re, q_im, PARTS).to(tl.float32))
    if REAL:
        h_re = out_re * r_re
        h_im = h_re
        next_re = h_re * re
        next_im = next_re
    else:
        h_re = out_re * r_re - out_im * r_im
        h_im = out_re * r_im + out_im * r_re
        next_re = h_re * re - h_im * im
        next_im = h_re * im + h_im * re
    tl.store(taps + channel * C + tl.arange(0, C), tl.sum(h_re, axis=1).to(tl.float32))
    to = out_of + channel * (C * LINE) + column
    tl.store(to + step * LINE, join_parts(next_re, next_im, PARTS).to(tl.float32))
    step = tl.arange(0, M)[:, None]
    out_re, out_im = every_power(q_re, q_im, M, REAL)
    to = hops + channel * ((M + 1) * LINE) + column
    tl.store(to + step * LINE, join_parts(out_re, out_im, PARTS).to(tl.float32))
    q_re, q_im = power(q_re, q_im, M + tl.zeros_like(mode), 8, REAL)
    tl.store(to + M * LINE, join_parts(q_re, q_im, PARTS).to(tl.float32))


@triton.jit
def load_taps_of(weight, bias, channel, inside, K: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``common.load_taps`` where the weight is [K,3D]: neighbouring channels are read together."""
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(weight + k * (3 * D) + channel, mask=inside, other=0.0).to(tl.float32),)
    offset = tl.zeros_like(taps[0])
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def filtered(z, short, keep, t, T, taps, offset, inside, ROW: tl.constexpr, HAS_SHORT: tl.constexpr,
             HAS_MASK: tl.constexpr):  # fmt: skip
    """The short filter's output [TIME,BD] at steps t [TIME,1]."""
    K: tl.constexpr = len(taps)
    out = offset + tl.zeros((t.shape[0], inside.shape[1]), tl.float32)
    for k in tl.static_range(K):
        at = t - (K - 1 - k)
        here = (at >= 0) & (at < T)
        if HAS_MASK:
            here = here & (tl.load(keep + at, mask=here, other=0) != 0)
        x = tl.load(z + at.to(tl.int64) * ROW, mask=here & inside, other=0.0).to(tl.float32)
        if HAS_SHORT:
            x += tl.load(short + (at + K - 1) * ROW, mask=(at < 0) & inside, other=0.0).to(tl.float32)
        out = tl.fma(taps[k], x, out)
    return out


@triton.jit
def store_turned(out, x, size, t, channel, stop, D: tl.constexpr, FACTOR: tl.constexpr):
    """Store the terms of x [TIME,BD] with time contiguous, rows of ``stop`` steps."""
    parts = terms(x, FACTOR)
    at = out + tl.trans(channel).to(tl.int64) * stop + tl.trans(t)
    for k in tl.static_range(len(parts)):
        tl.store(at + k * size, tl.trans(parts[k]), mask=tl.trans((t < stop) & (channel < D)))


@triton.jit(do_not_specialize=["T", "chunks"])
def modal_inputs_kernel(z, dy, weight, bias, short, keep, out, T, chunks, D: tl.constexpr, K: tl.constexpr,
                        C: tl.constexpr, BD: tl.constexpr, FACTOR: tl.constexpr, TERMS: tl.constexpr,
                        HAS_BIAS: tl.constexpr, HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """``out`` [2,TERMS,B,D,chunks·C]: w and dg, zero from T on. Grid: (chunks, blocks of BD channels, rows)."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * C + tl.arange(0, C)[:, None]
    channel = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    inside = channel < D
    stop = chunks * C
    size = tl.num_programs(2).to(tl.int64) * D * stop
    z += row * T * (3 * D) + channel
    dy += row * T * D + channel
    short += row * (K - 1) * (3 * D) + channel
    keep += row * T
    out += row * D * stop
    kept = t < T
    if HAS_MASK:
        kept = kept & (tl.load(keep + t, mask=t < T, other=0) != 0)
    taps1, off1 = load_taps_of(weight, bias, D + channel, inside, K, D, HAS_BIAS)
    taps0, off0 = load_taps_of(weight, bias, 2 * D + channel, inside, K, D, HAS_BIAS)
    w = filtered(z + D, short + D, keep, t, T, taps1, off1, inside, 3 * D, HAS_SHORT, HAS_MASK)
    w *= filtered(z + 2 * D, short + 2 * D, keep, t, T, taps0, off0, inside, 3 * D, HAS_SHORT, HAS_MASK)
    store_turned(out, tl.where(kept, w, 0.0), size, t, channel, stop, D, FACTOR)
    taps2, off2 = load_taps_of(weight, bias, channel, inside, K, D, HAS_BIAS)
    dg = filtered(z, short, keep, t, T, taps2, off2, inside, 3 * D, HAS_SHORT, HAS_MASK)
    dg *= tl.load(dy + t.to(tl.int64) * D, mask=kept & inside, other=0.0).to(tl.float32)
    store_turned(out + TERMS * size, tl.where(kept, dg, 0.0), size, t, channel, stop, D, FACTOR)


@triton.jit
def compose(a_re, a_im, x_re, x_im, b_re, b_im, y_re, y_im):
    """The step ``s -> a·s + x``, then ``s -> b·s + y``."""
    return (
        a_re * b_re - a_im * b_im,
        a_re * b_im + a_im * b_re,
        tl.fma(b_re, x_re, tl.fma(-b_im, x_im, y_re)),
        tl.fma(b_re, x_im, tl.fma(b_im, x_re, y_im)),
    )


@triton.jit
def compose_real(a, x, b, y):
    """``compose`` of real modes."""
    return a * b, tl.fma(b, x, y)


@triton.jit
def scan(decay, x, REVERSE: tl.constexpr):
    """``s[m] = decay·s[m-1] + x[m]`` along the rows, or from the last one."""
    every = tl.zeros_like(x[0])
    if len(x) == 1:
        out = tl.associative_scan((decay[0] + every, x[0]), 0, compose_real, reverse=REVERSE)
    else:
        out = tl.associative_scan((decay[0] + every, decay[1] + every, x[0], x[1]), 0, compose, reverse=REVERSE)
    return out[len(x) :]


@triton.jit
def row_of(x, row):
    """One row of every part, [1,NP]."""
    out = ()
    for k in tl.static_range(len(x)):
        here = tl.arange(0, x[k].shape[0])[:, None] == row
        out = out + (tl.sum(tl.where(here, x[k], 0.0), axis=0)[None, :],)
    return out


@triton.jit
def load_tile(x, size, begin, chunks, M: tl.constexpr, C: tl.constexpr, TERMS: tl.constexpr):
    """The terms of M chunks from ``begin`` on, [M,C]."""
    chunk = begin + tl.arange(0, M)[:, None]
    out = ()
    for k in tl.static_range(TERMS):
        at = x + k * size + (chunk * C + tl.arange(0, C)[None, :])
        out = out + (tl.load(at, mask=chunk < chunks, other=0.0),)
    return out


@triton.jit
def turn(x):
    """Every term, transposed."""
    out = ()
    for k in tl.static_range(len(x)):
        out = out + (tl.trans(x[k]),)
    return out


@triton.jit
def sum_rows(x, PARTS: tl.constexpr):
    """Numbers [R,PARTS·NP] summed over their rows, a tuple of [1,NP]."""
    return split_parts(tl.sum(x, axis=0)[None, :], PARTS)


@triton.jit
def times_joined(a, b, PARTS: tl.constexpr):
    """The product of numbers with their parts side by side."""
    out = times(split_parts(a, PARTS), split_parts(b, PARTS))
    return join_parts(out[0], out[PARTS - 1], PARTS)


@triton.jit(do_not_specialize=["chunks"])
def modal_states_kernel(x, powers, hops, out_of, first, states, last, chunks, D: tl.constexpr, N: tl.constexpr,
                        NP: tl.constexpr, C: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, FACTOR: tl.constexpr,
                        TERMS: tl.constexpr, STAGES: tl.constexpr, REVERSE: tl.constexpr,
                        HAS_FIRST: tl.constexpr):  # fmt: skip
    """s before every chunk, from w, or with REVERSE b, from dg. Grid: (D, rows).

    ``x`` as ``modal_inputs_kernel`` makes it, tables as ``modal_powers_kernel`` does. Row c of ``states`` float32
    [B,D,chunks+M,N,PARTS] is s[c], or b[c-1]. ``first`` and ``last`` [B,D,N,PARTS] are the state before the first chunk
    and the conjugate of b there.
    """
    LINE: tl.constexpr = PARTS * NP
    LIVE: tl.constexpr = PARTS * N
    channel = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * D + channel
    size = tl.num_programs(1).to(tl.int64) * D * chunks * C
    x += row * chunks * C
    states += row * (chunks + M) * LIVE
    powers += channel * ((C + 1) * LINE)
    hops += channel * ((M + 1) * LINE)
    line = tl.arange(0, LINE)[None, :]
    active = line < LIVE
    step = tl.arange(0, C)[:, None]
    place = tl.arange(0, M)[:, None]
    decay = split_parts(tl.load(hops + LINE + line), PARTS)
    tiles = (chunks + M - 1) // M
    start = tl.zeros((1, LINE), tl.float32)
    if REVERSE:
        x += TERMS * size
        enter = tl.load(out_of + channel * (C * LINE) + step * LINE + line)
        after = tl.load(hops + (M - place) * LINE + line)
        tl.store(states + tiles * (M * LIVE) + line, start, mask=active)
    else:
        enter = tl.load(powers + (C - 1 - step) * LINE + line)
        after = tl.load(hops + (place + 1) * LINE + line)
        if HAS_FIRST:
            start += tl.load(first + row * LIVE + line, mask=active, other=0.0)
        tl.store(states + line, start, mask=active)
        states += LIVE
    enter = terms(enter, FACTOR)
    after = split_parts(after, PARTS)
    carry = split_parts(start, PARTS)
    for i in tl.range(0, tiles, num_stages=STAGES):
        begin = i * M
        if REVERSE:
            begin = (tiles - 1 - i) * M
        added = multiply(load_tile(x, size, begin, chunks, M, C, TERMS), enter, tl.zeros((M, LINE), tl.float32))
        s = plus(scan(decay, split_parts(added, PARTS), REVERSE), times(after, carry))
        to = states + (begin + place) * LIVE + line
        tl.store(to, join_parts(s[0], s[PARTS - 1], PARTS), mask=active)
        carry = row_of(s, 0 if REVERSE else M - 1)
    if REVERSE:
        end = join_parts(carry[0], carry[PARTS - 1], PARTS)
        tl.store(last + row * LIVE + line, end * conjugate(line, PARTS), mask=active)


@triton.jit
def conjugate(line, PARTS: tl.constexpr):
    """The signs of the parts of a conjugate."""
    return 1.0 - 2.0 * (line % PARTS).to(tl.float32)


@triton.jit(do_not_specialize=["chunks"])
def modal_products_kernel(x, powers, out_of, taps, residues, ahead, behind, g, dw, outers, sums, chunks,
                          D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
                          PARTS: tl.constexpr, FACTOR: tl.constexpr, TERMS: tl.constexpr, STAGES: tl.constexpr,
                          EXACT: tl.constexpr, PARAMETERS: tl.constexpr):  # fmt: skip
    """g and dw from w, dg and both states, and the gradients of poles and residues. Grid: (D, rows).

    ``ahead`` and ``behind`` are what ``modal_states_kernel`` makes; ``g`` and ``dw`` [B,D/2,chunks·C/16,2,16], so
    that a program writes whole sectors; ``outers`` [B,D,C,C] is room for m; ``sums`` [B,D,2,N,PARTS] are the gradients
    of poles (of real modes: of their logarithms) and residues. Numbers have their parts side by side. With EXACT g and
    dw are right to their own rounding.
    """
    LINE: tl.constexpr = PARTS * NP
    LIVE: tl.constexpr = PARTS * N
    channel = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * D + channel
    size = tl.num_programs(1).to(tl.int64) * D * chunks * C
    x += row * chunks * C
    slopes = x + TERMS * size
    g += row // 2 * 2 * chunks * C + row % 2 * 16
    dw += row // 2 * 2 * chunks * C + row % 2 * 16
    ahead += row * (chunks + M) * LIVE
    behind += row * (chunks + M) * LIVE + LIVE
    powers += channel * ((C + 1) * LINE)
    out_of += channel * (C * LINE)
    line = tl.arange(0, LINE)[None, :]
    active = line < LIVE
    sign = conjugate(line, PARTS)
    step = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    place = tl.arange(0, M)[:, None]
    lag = column - step
    MOST: tl.constexpr = 2 if EXACT else 1
    h = terms(tl.load(taps + channel * C + lag, mask=lag >= 0, other=0.0), FACTOR)[:MOST]
    leave = turn(terms(tl.load(out_of + step * LINE + line) * sign, FACTOR)[:MOST])
    back = turn(terms(tl.load(powers + (C - 1 - step) * LINE + line) * sign, FACTOR)[:MOST])
    total = tl.zeros((C, C), tl.float32)
    of_w = tl.zeros((C, LINE), tl.float32)
    of_dg = tl.zeros((C, LINE), tl.float32)
    of_states = tl.zeros((M, LINE), tl.float32)
    for i in tl.range(0, (chunks + M - 1) // M, num_stages=STAGES):
        begin = i * M
        w = load_tile(x, size, begin, chunks, M, C, TERMS)
        d = load_tile(slopes, size, begin, chunks, M, C, TERMS)
        here = active & (begin + place < chunks)
        at = (begin + place) * LIVE + line
        s = tl.load(ahead + at, mask=here, other=0.0)
        b = tl.load(behind + at, mask=here, other=0.0)
        s_terms = terms(s, FACTOR)
        b_terms = terms(b, FACTOR)
        to = (begin + place) * (2 * C) + (column // 16 * 32 + column % 16)
        out = multiply(w[:MOST], h, tl.zeros((M, C), tl.float32))
        out = multiply(s_terms[:MOST], leave, out)
        tl.store(g + to, out.to(g.dtype.element_ty), mask=begin + place < chunks)
        out = multiply(d[:MOST], turn(h), tl.zeros((M, C), tl.float32))
        out = multiply(b_terms[:MOST], back, out)
        tl.store(dw + to, out.to(dw.dtype.element_ty), mask=begin + place < chunks)
        if PARAMETERS:
            turned = turn(d)
            total = multiply(turned, w, total)
            of_dg = multiply(turned, s_terms, of_dg)
            of_w = multiply(turn(w), b_terms, of_w)
            of_states += times_joined(b, s, PARTS)

    if PARAMETERS:
        outers += row * (C * C)
        tl.store(outers + step * C + column, total)
        tl.debug_barrier()
        found = tl.load(outers + column * C + (column - step), mask=column >= step, other=0.0)
        found = tl.sum(found, axis=1)[:, None]  # m of every lag
        now = tl.load(powers + step * LINE + line)
        before = tl.load(powers + tl.maximum(step - 1, 0) * LINE + line)
        next = tl.load(powers + (step + 1) * LINE + line)
        rest = tl.load(powers + tl.maximum(C - 2 - step, 0) * LINE + line) * (C - 1 - step)
        whole = split_parts(tl.load(powers + (C - 1) * LINE + line) * C, PARTS)
        residue = split_parts(tl.load(residues + channel * LIVE + line, mask=active, other=0.0), PARTS)
        dr = sum_rows(found * now + times_joined(next, of_dg, PARTS), PARTS)
        own = found * step * before + times_joined(now, of_dg, PARTS) * (step + 1)
        dp = plus(times(residue, sum_rows(own, PARTS)), sum_rows(times_joined(rest, of_w, PARTS), PARTS))
        dp = plus(dp, times(whole, sum_rows(of_states, PARTS)))
        if PARTS == 1:  # of the logarithm
            dp = times(dp, (tl.load(powers + LINE + line),))
        to = sums + row * (2 * LIVE) + line
        tl.store(to, join_parts(dp[0], dp[PARTS - 1], PARTS) * sign, mask=active)
        tl.store(to + LIVE, join_parts(dr[0], dr[PARTS - 1], PARTS) * sign, mask=active)
