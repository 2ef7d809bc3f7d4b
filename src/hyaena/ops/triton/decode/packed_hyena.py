"""The Hyena operator over the next tokens of several rows, each from its own state, step by step.

A thread owns one channel of one row and walks through the row's tokens. That takes as many steps as the longest row has
tokens, and is meant for some hundreds: the kernel of prefills (``ops.triton.hyena``) divides long rows into segments.
The number of tokens, and the steps after which states are copied, are read on the device. The states move in place.
The references are ``ops.hyena`` and ``ops.hyena_states`` of each row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.hyena import HyenaState, RowTables
from hyaena.ops.long_conv import ModalFilter
from hyaena.ops.triton.hyena.step import filter_step, read_filter
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

CHANNELS = 32
TOGETHER = 8
"""Steps whose inputs are loaded together, while those before them are computed."""


@triton.jit
def load_short(short, channel, row, inside, D: tl.constexpr, K: tl.constexpr):
    """The last K-1 inputs of the short filter, oldest first."""
    window = ()
    for k in tl.static_range(K - 1):
        window = window + (tl.load(short + (row * 3 * D + channel) * (K - 1) + k, mask=inside, other=0.0),)
    return window


@triton.jit
def store_short(short, window, channel, row, inside, D: tl.constexpr, K: tl.constexpr):
    """The inverse of ``load_short``."""
    for k in tl.static_range(K - 1):
        tl.store(short + (row * 3 * D + channel) * (K - 1) + k, window[k], mask=inside)


@triton.jit
def store_states(short, long, window2, window1, window0, states, channel, row, inside,
                 D: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Both states of one row."""
    store_short(short, window2, channel, row, inside, D, K)
    store_short(short, window1, D + channel, row, inside, D, K)
    store_short(short, window0, 2 * D + channel, row, inside, D, K)
    for n in tl.static_range(N):
        at = row * D * N * 2 + (channel * N + n) * 2
        tl.store(long + at, states[2 * n], mask=inside)
        tl.store(long + at + 1, states[2 * n + 1], mask=inside)


@triton.jit
def either(taken, new, old, PART: tl.constexpr):
    """A tuple of new tensors; with PART the old ones where the step is not taken."""
    out = new
    if PART:
        out = ()
        for i in tl.static_range(len(new)):
            out = out + (tl.where(taken, new[i], old[i]),)
    return out


@triton.jit
def walk(z2, z1, z0, taps2, taps1, taps0, direct, modes, window2, window1, window0, states, y, count, inside,
         D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """Take the steps whose inputs were loaded, with PART the first ``count`` of them; y is written.

    Returns:
        The three windows of inputs and the states behind the last step.
    """
    for i in tl.static_range(len(z2)):
        taken = i < count
        seen2 = window2 + (z2[i],)
        seen1 = window1 + (z1[i],)
        seen0 = window0 + (z0[i],)
        w = filter_step(taps1, seen1, K) * filter_step(taps0, seen0, K)
        out = direct * w
        moved = ()
        for n in tl.static_range(N):
            p_re, p_im, r_re, r_im = modes[4 * n], modes[4 * n + 1], modes[4 * n + 2], modes[4 * n + 3]
            new_re = p_re * states[2 * n] - p_im * states[2 * n + 1] + w
            new_im = p_re * states[2 * n + 1] + p_im * states[2 * n]
            out += r_re * new_re - r_im * new_im
            moved = moved + (new_re, new_im)
        out *= filter_step(taps2, seen2, K)
        here = inside
        if PART:
            here = inside & taken
        tl.store(y + i * D, out.to(y.dtype.element_ty), mask=here)
        states = either(taken, moved, states, PART)
        window2 = either(taken, seen2[1:], window2, PART)
        window1 = either(taken, seen1[1:], window1, PART)
        window0 = either(taken, seen0[1:], window0, PART)
    return window2, window1, window0, states


@triton.jit
def load_inputs(z, t, end, channel, inside, D: tl.constexpr, TOGETHER: tl.constexpr):
    """Inputs of the next steps at one block of channels: a tuple of [BD]."""
    numbers = ()
    for i in tl.static_range(TOGETHER):
        numbers = numbers + (tl.load(z + (t + i) * 3 * D + channel, mask=inside & (t + i < end), other=0.0),)
    return numbers


# tables are parts of one tensor: no compilation for each of their alignments
@triton.jit(do_not_specialize_on_alignment=["begins", "counts", "stop_begins", "stops"])
def _packed_hyena_kernel(z, weight, bias, poles, residues, skip, short, long, short_copies, long_copies,
                         begins, counts, stop_begins, stops, y,
                         D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
                         HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, COPIES: tl.constexpr,
                         TOGETHER: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Some channels of one row. Grid: (channels / BD, rows)."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = channel < D
    taps2 = read_filter(weight, bias, channel, inside, K, HAS_BIAS)
    taps1 = read_filter(weight, bias, D + channel, inside, K, HAS_BIAS)
    taps0 = read_filter(weight, bias, 2 * D + channel, inside, K, HAS_BIAS)
    direct = tl.zeros((BD,), tl.float32)
    if HAS_SKIP:
        direct = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    modes = ()
    for n in tl.static_range(N):
        at = (channel * N + n) * 2
        modes = modes + (tl.load(poles + at, mask=inside, other=0.0), tl.load(poles + at + 1, mask=inside, other=0.0))
        modes = modes + (
            tl.load(residues + at, mask=inside, other=0.0),
            tl.load(residues + at + 1, mask=inside, other=0.0),
        )
    gdc_wait(OVERLAP)
    gdc_launch_dependents(OVERLAP)
    begin = tl.load(begins + row)
    count = tl.load(counts + row)
    if count == 0:
        return
    window2 = load_short(short, channel, row, inside, D, K)
    window1 = load_short(short, D + channel, row, inside, D, K)
    window0 = load_short(short, 2 * D + channel, row, inside, D, K)
    states = ()
    for n in tl.static_range(N):
        at = row * D * N * 2 + (channel * N + n) * 2
        states = states + (tl.load(long + at, mask=inside, other=0.0), tl.load(long + at + 1, mask=inside, other=0.0))
    z += begin.to(tl.int64) * 3 * D
    y += begin.to(tl.int64) * D

    stop = tl.load(stop_begins + row)
    last_stop = tl.load(stop_begins + row + 1)
    t = begin * 0
    while t < count:
        end = count
        if COPIES:  # noqa: SIM102, one is a constant
            if stop < last_stop:
                end = tl.load(stops + stop)
        next2 = load_inputs(z, t, end, channel, inside, D, TOGETHER)
        next1 = load_inputs(z, t, end, D + channel, inside, D, TOGETHER)
        next0 = load_inputs(z, t, end, 2 * D + channel, inside, D, TOGETHER)
        while t + TOGETHER <= end:
            z2, z1, z0 = next2, next1, next0
            next2 = load_inputs(z, t + TOGETHER, end, channel, inside, D, TOGETHER)
            next1 = load_inputs(z, t + TOGETHER, end, D + channel, inside, D, TOGETHER)
            next0 = load_inputs(z, t + TOGETHER, end, 2 * D + channel, inside, D, TOGETHER)
            window2, window1, window0, states = walk(
                z2, z1, z0, taps2, taps1, taps0, direct, modes, window2, window1, window0, states,
                y + t * D + channel, end - t, inside, D, N, K, False,
            )  # fmt: skip
            t += TOGETHER
        if t < end:
            window2, window1, window0, states = walk(
                next2, next1, next0, taps2, taps1, taps0, direct, modes, window2, window1, window0, states,
                y + t * D + channel, end - t, inside, D, N, K, True,
            )  # fmt: skip
        t = end
        if COPIES:
            if stop < last_stop:
                store_states(short_copies, long_copies, window2, window1, window0, states, channel,
                             stop.to(tl.int64), inside, D, N, K)  # fmt: skip
            stop += 1
    store_states(short, long, window2, window1, window0, states, channel, row, inside, D, N, K)


def packed_hyena(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: ModalFilter,
    state: HyenaState,
    rows: RowTables,
    copies: HyenaState | None,
    *,
    overlap: bool = False,
) -> Tensor:
    """Read z [T,3D] -> y [T,D]: the tokens of R rows, whose states move to the end of their tokens, in place.

    Args:
        z: the biased input projection.
        short_weight, short_bias, long_filter: see ``ops.hyena``; what ``ops.triton.unsupported_reason`` takes.
        state: of R rows, contiguous, the window of inputs in the dtype of z.
        rows: which tokens are whose, and where states are copied.
        copies: where they are copied to, of S rows; None where none are.
    """
    poles, residues, long = (torch.view_as_real(t) for t in (long_filter.poles, long_filter.residues, state.long))
    channels, modes = poles.shape[:2]
    y = z.new_empty(z.shape[0], channels)
    saved = state if copies is None else copies
    _packed_hyena_kernel[(triton.cdiv(channels, CHANNELS), state.short.shape[0])](
        z, short_weight.contiguous(), z if short_bias is None else short_bias, poles.contiguous(),
        residues.contiguous(), z if long_filter.skip is None else long_filter.skip, state.short, long, saved.short,
        torch.view_as_real(saved.long), *rows, y,
        D=channels, N=modes, K=short_weight.shape[-1], BD=CHANNELS, HAS_BIAS=short_bias is not None,
        HAS_SKIP=long_filter.skip is not None, COPIES=copies is not None, TOGETHER=TOGETHER, OVERLAP=overlap,
        launch_pdl=overlap, num_warps=1,
    )  # fmt: skip
    return y
