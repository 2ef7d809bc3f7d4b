"""Pieces of the backward kernels of ``segments``, in which a warp owns a channel.

Lanes, tiles and factors are as in ``segments``. A lane has half as many numbers as with a word, so that twice as many
warps share a processor: with the sums of parameters' gradients, those of a word fill 255 registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.common import convolve
from hyaena.ops.triton.hyena.segments_lanes import zeros
from hyaena.ops.triton.hyena.segments_shared import copy_tile, turn_tile
from hyaena.ops.triton.hyena.toeplitz import from_lane
from hyaena.ops.triton.hyena.toeplitz_backward import transpose


@triton.jit
def number_from_lane(x, lane, EMULATED: tl.constexpr):
    """A float32 number of another lane of the warp."""
    return from_lane(x.to(tl.int32, bitcast=True), lane, EMULATED).to(tl.float32, bitcast=True)


@triton.jit
def turn_blocks(lines, rooms, at, FROM: tl.constexpr, EMULATED: tl.constexpr):
    """``turn_tile`` of the blocks from FROM on."""
    for k in tl.static_range(FROM, 4):
        turn_tile(lines[k], rooms[k], at, EMULATED)


@triton.jit
def copy_blocks(rooms, at, z, dy, start, T, first, FROM: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr,
                EMULATED: tl.constexpr):  # fmt: skip
    """Begin to copy a tile of the blocks of z (u2, u1, u0), FROM one on, and of dy, to place ``at``."""
    ROW: tl.constexpr = 3 * D // 2
    for k in tl.static_range(FROM, 3):
        copy_tile(rooms[k], at, z + k * (D // 2), start, T, first, z, ROW, WORDS, False, EMULATED, True)
    copy_tile(rooms[3], at, dy, start, T, first, z, D // 2, WORDS, False, EMULATED, True)


@triton.jit
def load_filters_of(weight, bias, channel, D: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``load_filter`` of a channel of u2, u1 and u0."""
    return (
        load_filter(weight, bias, channel, K, HAS_BIAS),
        load_filter(weight, bias, D + channel, K, HAS_BIAS),
        load_filter(weight, bias, 2 * D + channel, K, HAS_BIAS),
    )


@triton.jit
def load_filter(weight, bias, channel, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Taps and bias of a channel's short filter."""
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(weight + channel * K + k).to(tl.float32),)
    offset = zeros(channel)
    if HAS_BIAS:
        offset = tl.load(bias + channel).to(tl.float32)
    return taps, offset


@triton.jit
def histories(x, before, lane, EMULATED: tl.constexpr):
    """The numbers of the steps before each of a lane's two segments; ``before``: of a tile, right in the last lane."""
    REACH: tl.constexpr = len(before)
    last = lane % 4 == 3
    first = ()
    second = ()
    for k in tl.static_range(REACH):
        theirs = tl.where(last, x[8 - REACH + k], x[4 - REACH + k])
        theirs = tl.where(lane == 31, before[k], theirs)
        first = first + (number_from_lane(theirs, (lane + 31) % 32, EMULATED),)
        theirs = tl.where(last, x[4 - REACH + k], x[8 - REACH + k])
        second = second + (number_from_lane(theirs, lane // 4 * 4 + (lane + 3) % 4, EMULATED),)
    return first, second


@triton.jit
def filter_channel(x, past, filter):
    """The short filter at a lane's eight steps."""
    out = ()
    for h in tl.static_range(2):
        history = past[h]
        for i in tl.static_range(4):
            u, history = convolve(filter[0], filter[1], history, x[4 * h + i])
            out = out + (u,)
    return out


@triton.jit
def filter_back(du, later, taps, lane, EMULATED: tl.constexpr):
    """The gradient of a short filter's input; ``later``: du of the first steps of the next tile, right in lane 0."""
    REACH: tl.constexpr = len(later)
    first = du[0:4]
    second = du[4:8]
    for k in tl.static_range(REACH):
        theirs = tl.where(lane % 4 == 0, du[4 + k], du[k])
        first = first + (number_from_lane(theirs, lane // 4 * 4 + (lane + 1) % 4, EMULATED),)
        theirs = tl.where(lane == 0, later[k], tl.where(lane % 4 == 0, du[k], du[4 + k]))
        second = second + (number_from_lane(theirs, (lane + 1) % 32, EMULATED),)
    every = (first, second)
    out = ()
    for i in tl.static_range(8):
        x = taps[REACH] * every[i // 4][i % 4]
        for k in tl.static_range(REACH):
            x = tl.fma(taps[REACH - 1 - k], every[i // 4][i % 4 + 1 + k], x)
        out = out + (x,)
    return out


@triton.jit
def add_filter_gradient(sums, du, x, past):
    """Add a lane's share of the gradient of a short filter's taps, and of its bias where there is a sum for it."""
    K: tl.constexpr = len(past[0]) + 1
    every = (past[0] + x[0:4], past[1] + x[4:8])
    out = ()
    for k in tl.static_range(K):
        total = sums[k]
        for i in tl.static_range(8):
            total = tl.fma(du[i], every[i // 4][i % 4 + k], total)
        out = out + (total,)
    for k in tl.static_range(len(sums) - K):
        total = sums[K + k]
        for i in tl.static_range(8):
            total += du[i]
        out = out + (total,)
    return out


@triton.jit
def no_sums(lane, COUNT: tl.constexpr):
    """COUNT zeros."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (zeros(lane),)
    return out


@triton.jit
def sum_warp(x, lane, EMULATED: tl.constexpr):
    """The sum of x over the lanes of a warp, in all of them."""
    for k in tl.static_range(5):
        x += number_from_lane(x, lane ^ (1 << k), EMULATED)
    return x


@triton.jit
def store_filter_gradient(to, sums, lane, D: tl.constexpr, EMULATED: tl.constexpr):
    """Store the gradient of the taps of a short filter, and of its bias: float32 [K+1,3D], ``to`` its channel."""
    for j in tl.static_range(len(sums)):
        tl.store(to + j * (3 * D), sum_warp(sums[j], lane, EMULATED), mask=lane == 0)


@triton.jit
def turn(words, EMULATED: tl.constexpr):
    """Every word of a factor, its matrices of 8 × 8 transposed."""
    out = ()
    for i in tl.static_range(len(words)):
        out = out + (transpose(words[i], EMULATED),)
    return out


@triton.jit
def as_left(turned):
    """A left factor [step,segment] of the turned words of one [segment,step]."""
    return turned[0], turned[2], turned[1], turned[3]


@triton.jit
def store_turned(to, sums, owner, q, lane, N: tl.constexpr):
    """Store sums over segments of steps and four modes, [D,16,N,2], of a channel."""
    mode = 4 * q + lane % 4
    step = lane // 8 * 4 + lane // 4 % 2
    for i in tl.static_range(4):
        tl.store(to + ((owner * 16 + step + i // 2 * 2) * N + mode) * 2 + i % 2, sums[i], mask=mode < N)
