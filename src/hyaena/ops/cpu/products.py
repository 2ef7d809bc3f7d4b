"""Products of few rows with a matrix that is read once: a linear layer, and the gate of an MLP.

Threads take blocks of neighbouring outputs until none are left. Every block computes its outputs for all rows of x, so
a weight comes from memory once. An output's sum has one order, whatever the number of rows and threads.

A format of weights is a function ``four(token, weights, width, x) -> 4 sums`` and its tail for single outputs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from hyaena.ops.cpu.memory import FLOAT32, STAMP, function, kernel, load, real, size, store, take, word

BLOCK_BYTES = 1 << 16
"""Weights of a block, about: long enough for a processor to read ahead, short enough to share out evenly."""

SILU, GELU, IDENTITY = 0, 1, 2
ACTIVATION = {"silu": SILU, "gelu": GELU, "identity": IDENTITY}

# Places of the arguments; 0 counts blocks.
X, ROWS, WIDTH, OUTPUTS, BLOCK, NORM, EPS, INSIDE, Y, WEIGHT, BIAS, RESIDUAL = range(1, 13)
UP, ACT = BIAS, RESIDUAL  # of a gate, which has neither


@function
def one(token, weights, width, x):
    """The sum of products of one row of weights with x, float32."""
    total = np.float32(0)
    for k in range(width):
        total += load(token, weights, k) * load(FLOAT32, x, k)
    return total


@function
def four(token, weights, width, x):
    """The same of four neighbouring rows: x is loaded once, and four sums hide the latency of an addition."""
    a = b = c = d = np.float32(0)
    for k in range(width):
        value = load(FLOAT32, x, k)
        a += load(token, weights, k) * value
        b += load(token, weights, k + width) * value
        c += load(token, weights, k + 2 * width) * value
        d += load(token, weights, k + 3 * width) * value
    return a, b, c, d


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
        last = min(first + block, outputs)
        output = first
        while output + 4 <= last:
            for row in range(rows):
                a, b, c, d = four(weight_token, weight + output * bytes_of_row, width, x + row * width * 4)
                finish(p, token, row, output, a)
                finish(p, token, row, output + 1, b)
                finish(p, token, row, output + 2, c)
                finish(p, token, row, output + 3, d)
            output += 4
        while output < last:
            for row in range(rows):
                value = one(weight_token, weight + output * bytes_of_row, width, x + row * width * 4)
                finish(p, token, row, output, value)
            output += 1
        first = take(p, 0) * block


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
    while first < outputs:
        last = min(first + block, outputs)
        output = first
        while output < last:
            count = 4 if output + 4 <= last else 1
            for row in range(rows):
                vector, place = x + row * width * 4, row * outputs + output
                here = output * bytes_of_row
                if count == 4:
                    a, b, c, d = four(weight_token, gates + here, width, vector)
                    e, f, g, h = four(weight_token, ups + here, width, vector)
                    store(token, y, place, np.float32(activate(a, activation) * e))
                    store(token, y, place + 1, np.float32(activate(b, activation) * f))
                    store(token, y, place + 2, np.float32(activate(c, activation) * g))
                    store(token, y, place + 3, np.float32(activate(d, activation) * h))
                else:
                    a = one(weight_token, gates + here, width, vector)
                    e = one(weight_token, ups + here, width, vector)
                    store(token, y, place, np.float32(activate(a, activation) * e))
            output += count
        first = take(p, 0) * block


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
