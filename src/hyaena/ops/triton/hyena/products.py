"""Segments of a modal filter as matrix products: what the forward kernel does on matrix units.

In a segment of L steps a channel's filter is the Toeplitz matrix of its first L taps, and its modes take part at the
segment's ends alone. With w the products of a segment's steps and s the modes before it, as real numbers::

    e = w·G        G[j,m] = p_m^(L-1-j)          what the segment adds to the modes
    y = w·H + s·R  H[j,i] = h[i-j], the skip on its diagonal        R[m,i] = R_m p_m^(i+1), real part

Complex modes are two columns of G and two rows of R each, all real parts first. A factor in float32 is the sum of two
bfloat16, and the product of their low parts is left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import pole
from hyaena.ops.triton.hyena.words import has, stack, stay, unstack


@triton.jit
def in_two(x):
    """A float32 tensor as the sum of two of bfloat16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def only(terms, here):
    """Two terms, zero where a condition does not hold."""
    return tl.where(here, terms[0], 0.0).to(tl.bfloat16), tl.where(here, terms[1], 0.0).to(tl.bfloat16)


@triton.jit
def multiply(x, y, total, OPERAND: tl.constexpr):
    """``total + x·y`` for tuples of terms, of which the product of the second two is left out; batched."""
    for i in tl.static_range(len(x)):
        for j in tl.static_range(len(y)):
            if i + j < 2:
                if tl.float32 == OPERAND:  # the interpreter, which has no products of bfloat16
                    total = tl.dot(x[i].to(tl.float32), y[j].to(tl.float32), total, input_precision="ieee")
                else:
                    total = tl.dot(x[i], y[j], total)
    return total


@triton.jit
def load_tables(response, gathers, readouts, channel, D: tl.constexpr, L: tl.constexpr, M: tl.constexpr):
    """H [BD,L,L], G [BD,L,M] and R [BD,M,L] of the channels [BD,1,1], each in two terms.

    ``response`` float32 [D,L], ``gathers`` [D,L,M], ``readouts`` [D,M,L].
    """
    inside = channel < D
    j = tl.arange(0, L)[None, :, None]
    i = tl.arange(0, L)[None, None, :]
    m = tl.arange(0, M)
    h = tl.load(response + channel * L + (i - j), mask=inside & (i >= j), other=0.0)
    g = tl.load(gathers + (channel * L + j) * M + m[None, None, :], mask=inside, other=0.0)
    r = tl.load(readouts + (channel * M + m[None, :, None]) * L + i, mask=inside, other=0.0)
    return in_two(h), in_two(g), in_two(r)


@triton.jit
def as_matrices(ws):
    """A tuple of L tensors [BW,S,P], steps of segments, as [BD,S,L]."""
    L: tl.constexpr = len(ws)
    BW: tl.constexpr = ws[0].shape[0]
    S: tl.constexpr = ws[0].shape[1]
    P: tl.constexpr = ws[0].shape[2]
    w = tl.reshape(stack(ws, L), (BW, S, P, L))
    return tl.reshape(tl.permute(w, (0, 2, 1, 3)), (BW * P, S, L))


@triton.jit
def as_steps(y, P: tl.constexpr):
    """The inverse of ``as_matrices``."""
    BW: tl.constexpr = y.shape[0] // P
    S: tl.constexpr = y.shape[1]
    L: tl.constexpr = y.shape[2]
    y = tl.permute(tl.reshape(y, (BW, P, S, L)), (0, 1, 3, 2))
    y = tl.reshape(stay(tl.reshape(y, (BW, P * L * S))), (BW, P, L, S))
    return unstack(tl.permute(y, (0, 3, 1, 2)))


@triton.jit
def ends_to_rows(e, NP: tl.constexpr, P: tl.constexpr, RUN: tl.constexpr):
    """e [BD,S,M] as rows of the chain, see ``forward.to_rows``: two tuples of RUN tensors [S/RUN,NP·BD]."""
    BD: tl.constexpr = e.shape[0]
    S: tl.constexpr = e.shape[1]
    for _ in tl.static_range(4):  # columns beyond the modes are zero
        if e.shape[2] > 2 * NP:
            e, _rest = tl.split(tl.permute(tl.reshape(e, (BD, S, 2, e.shape[2] // 2)), (0, 1, 3, 2)))
    parts = tl.permute(tl.reshape(e, (BD, S // RUN, RUN, 2, NP)), (1, 3, 2, 4, 0))
    rows = stay(tl.reshape(parts, (S // RUN, 2 * RUN * NP * BD)))
    rows = unstack(tl.permute(tl.reshape(rows, (S // RUN, 2 * RUN, NP * BD)), (0, 2, 1)))
    return rows[:RUN], rows[RUN:]


@triton.jit
def rows_to_states(re, im, NP: tl.constexpr, M: tl.constexpr):
    """The inverse of ``ends_to_rows``: [BD,S,M], with zeros for columns beyond the modes."""
    RUN: tl.constexpr = len(re)
    RUNS: tl.constexpr = re[0].shape[0]
    BD: tl.constexpr = re[0].shape[1] // NP
    s = tl.reshape(stack(re + im, 2 * RUN), (RUNS, NP, BD, 2, RUN))
    s = tl.reshape(tl.permute(s, (2, 0, 4, 3, 1)), (BD, RUNS * RUN, 2 * NP))
    for _ in tl.static_range(4):
        if s.shape[2] < M:
            s = tl.reshape(tl.permute(tl.join(s, tl.zeros_like(s)), (0, 1, 3, 2)), (BD, RUNS * RUN, 2 * s.shape[2]))
    return s


@triton.jit
def document_numbers(bounds, W: tl.constexpr, L: tl.constexpr):
    """How many documents began in a segment up to each of its steps, int32 [1,S,L], of bounds [1,S]."""
    S: tl.constexpr = bounds.shape[1]
    begins = has(tl.reshape(bounds, (S, 1)), W + tl.arange(0, L)[None, :]).to(tl.int32)
    return tl.cumsum(begins, axis=1)[None, :, :]


@triton.jit
def outputs(w, s, numbers, response, readouts, OPERAND: tl.constexpr, HAS_RESET: tl.constexpr):
    """``w·H + s·R`` float32 [BD,S,L]; w [BD,S,L] and s [BD,S,M] in two terms each."""
    y = tl.zeros(w[0].shape, tl.float32)
    y = multiply(s, readouts, y, OPERAND)
    if HAS_RESET:  # the modes before a segment are those of its first document
        y = tl.where(numbers == 0, y, 0.0)
        for number in range(0, tl.max(tl.max(tl.max(numbers, axis=2), axis=1), axis=0) + 1):
            here = numbers == number
            part = multiply(only(w, here), response, tl.zeros(y.shape, tl.float32), OPERAND)
            y += tl.where(here, part, 0.0)
    else:
        y = multiply(w, response, y, OPERAND)
    return y


@triton.jit
def tables_kernel(poles, residues, skip, response, gathers, readouts, D: tl.constexpr, N: tl.constexpr,
                  NP: tl.constexpr, L: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, REAL: tl.constexpr,
                  HAS_SKIP: tl.constexpr):  # fmt: skip
    """Fill what ``load_tables`` reads, in float64. Grid: (channels / BD,). Columns without a mode are the caller's."""
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    h = ()
    for _ in tl.static_range(L):
        h = h + (tl.zeros((BD,), tl.float64),)
    for n in range(N):
        at = (channel * N + n) * 2
        p_re, p_im = pole(poles, at, inside, REAL)
        r_re = tl.load(residues + at, mask=inside, other=0.0).to(tl.float64)
        r_im = tl.load(residues + at + 1, mask=inside, other=0.0).to(tl.float64)
        q_re = tl.full((BD,), 1.0, tl.float64)
        q_im = tl.full((BD,), 1.0 if REAL else 0.0, tl.float64)
        sums = ()
        for t in tl.static_range(L):
            to = gathers + (channel * L + L - 1 - t) * M + n
            tl.store(to, q_re.to(tl.float32), mask=inside)
            tl.store(to + NP, q_im.to(tl.float32), mask=inside)
            if REAL:
                sums = sums + (h[t] + r_re * q_re + r_im * q_im,)
                q_re = q_re * p_re
                q_im = q_im * p_im
                out_re = r_re * q_re
                out_im = r_im * q_im
            else:
                sums = sums + (h[t] + r_re * q_re - r_im * q_im,)
                new_re = q_re * p_re - q_im * p_im
                q_im = q_re * p_im + q_im * p_re
                q_re = new_re
                out_re = r_re * q_re - r_im * q_im
                out_im = -(r_re * q_im + r_im * q_re)
            to = readouts + (channel * M + n) * L + t
            tl.store(to, out_re.to(tl.float32), mask=inside)
            tl.store(to + NP * L, out_im.to(tl.float32), mask=inside)
        h = sums
    for t in tl.static_range(L):
        value = h[t]
        if HAS_SKIP and t == 0:
            value += tl.load(skip + channel, mask=inside, other=0.0).to(tl.float64)
        tl.store(response + channel * L + t, value.to(tl.float32), mask=inside)
