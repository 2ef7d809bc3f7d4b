"""Products of few rows with a matrix that is read once: a linear layer, and the gate of an MLP.

Threads take blocks of neighbouring outputs until none are left. Every block computes its outputs for all rows of x, so
a weight comes from memory once. An output's sum has one order, whatever the number of rows and threads.

The sum itself is ``vectors.dot``, for weights of every dtype.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from hyaena.ops.cpu.memory import STAMP, function, hold, kernel, load, real, size, store, take, word
from hyaena.ops.cpu.vectors import dot

BLOCK_BYTES = 1 << 16
"""Weights of a block, about: long enough for a processor to read ahead, short enough to share out evenly."""

SILU, GELU, IDENTITY = 0, 1, 2
ACTIVATION = {"silu": SILU, "gelu": GELU, "identity": IDENTITY}

# Places of the arguments; 0 counts blocks.
X, ROWS, WIDTH, OUTPUTS, BLOCK, NORM, EPS, INSIDE, Y, WEIGHT, BIAS, RESIDUAL = range(1, 13)
UP, ACT = BIAS, RESIDUAL  # of a gate, which has neither


@function
def widen(p, token, out):
    """Write norm(x) of all rows to out, float32: the prologue of a product. Squares are summed in float64."""
    x, width, weight = word(p, X), word(p, WIDTH), word(p, NORM)
    for row in range(word(p, ROWS)):
        start = row * width
        if weight == 0:
            for k in range(width):
                out[start + k] = load(token, x, start + k)
            continue
        total = 0.0
        for k in range(width):
            value = np.float64(load(token, x, start + k))
            total += value * value
        eps = real(p, EPS)
        root = math.sqrt(total / width + eps) if word(p, INSIDE) else math.sqrt(total / width) + eps
        scale = 1.0 / root
        for k in range(width):
            value = np.float32(np.float64(load(token, x, start + k)) * scale)
            out[start + k] = value * load(token, weight, k)


@function
def finish(p, token, row, output, value):
    """Add bias and residual, round once."""
    bias, residual = word(p, BIAS), word(p, RESIDUAL)
    place = row * word(p, OUTPUTS) + output
    if bias:
        value += load(token, bias, output)
    if residual:
        value += load(token, residual, place)
    store(token, word(p, Y), place, value)


@function
def linear_blocks(p, token, weight_token):
    """``residual + weight·norm(x) + bias`` for the blocks that this thread takes."""
    rows, width, outputs = word(p, ROWS), word(p, WIDTH), word(p, OUTPUTS)
    weight, block = word(p, WEIGHT), word(p, BLOCK)
    first = take(p, 0) * block
    if first >= outputs:
        return
    wide = np.empty(rows * width, np.float32)
    x = wide.ctypes.data
    widen(p, token, wide)
    bytes_of_row = width * size(weight_token)
    while first < outputs:
        for output in range(first, min(first + block, outputs)):
            for row in range(rows):
                value = dot(weight_token, weight + output * bytes_of_row, width, x + row * width * 4)
                finish(p, token, row, output, value)
        first = take(p, 0) * block
    hold(wide)


@function
def activate(value, activation):
    """The activation of a gate, in float64: there are few of them."""
    wide = np.float64(value)
    if activation == SILU:
        return wide / (1.0 + math.exp(-wide))
    if activation == GELU:
        return 0.5 * wide * (1.0 + math.erf(wide * 0.7071067811865476))
    return wide


@function
def gate_blocks(p, token, weight_token):
    """``act(gate·norm(x)) · (up·norm(x))`` for the blocks that this thread takes."""
    rows, width, outputs = word(p, ROWS), word(p, WIDTH), word(p, OUTPUTS)
    gates, ups, activation, y = word(p, WEIGHT), word(p, UP), word(p, ACT), word(p, Y)
    block = word(p, BLOCK)
    first = take(p, 0) * block
    if first >= outputs:
        return
    wide = np.empty(rows * width, np.float32)
    x = wide.ctypes.data
    widen(p, token, wide)
    bytes_of_row = width * size(weight_token)
    products = np.empty(rows * block, np.float32)  # of the gate: each matrix is read in one piece
    while first < outputs:
        count = min(block, outputs - first)
        for i in range(count):
            for row in range(rows):
                here = gates + (first + i) * bytes_of_row
                products[row * block + i] = dot(weight_token, here, width, x + row * width * 4)
        for i in range(count):
            for row in range(rows):
                value = dot(weight_token, ups + (first + i) * bytes_of_row, width, x + row * width * 4)
                value = np.float32(activate(products[row * block + i], activation) * value)
                store(token, y, row * outputs + first + i, value)
        first = take(p, 0) * block
    hold(wide)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def linear(token, weight_token):
    """The kernel of a linear layer whose activations and weights are of these dtypes."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        linear_blocks(p, token, weight_token)

    return entry


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def gate(token, weight_token):
    """The kernel of a gate whose activations and weights are of these dtypes."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        gate_blocks(p, token, weight_token)

    return entry
