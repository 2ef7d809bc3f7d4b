"""Products of few rows with a matrix that is read once: a linear layer, and the gate of an MLP.

Threads take runs of neighbouring outputs until none are left: long runs first, which a processor reads ahead in, short
ones at the end, so that all finish together. A few outputs are computed for all rows of x, ``MANY`` rows at a time: a
weight comes from memory once, and x of these rows stays in the first cache. An output's sum has one order, whatever the
number of rows and threads.

The sums themselves are ``narrow.write_sums``, for weights of every form.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from hyaena.ops.cpu.memory import STAMP, exp, function, hold, kernel, load, prefetch, real, size, store, take, word
from hyaena.ops.cpu.narrow import bytes_of_vector, is_narrow, neighbours, round_vector, write_sums
from hyaena.ops.cpu.vectors import MANY

LEAST_BYTES = 1 << 13
"""Weights of the shortest run, about."""
TOGETHER = 16
"""Outputs that are computed for all rows before the next ones, or before those of a gate's other matrix: of
``neighbours`` a multiple."""

LINE = 16
"""float32 numbers of a cache line."""

SILU, GELU, IDENTITY = 0, 1, 2
ACTIVATION = {"silu": SILU, "gelu": GELU, "identity": IDENTITY}

# Places of the arguments; 0 counts runs, and 1 nothing.
X, ROWS, WIDTH, OUTPUTS, LEAST, THREADS, NORM, EPS, INSIDE, Y, WEIGHT, SCALE, MINIMUM, BIAS, RESIDUAL = range(2, 17)
UP, UP_SCALE, UP_MINIMUM, ACT = BIAS, RESIDUAL, 17, 18  # of a gate, which has no bias and no residual


@function
def next_run(p):
    """The outputs, first and behind the last, that nobody has taken: a share of what is left, at least ``LEAST``."""
    ticket, total, least, parts = take(p, 0), word(p, OUTPUTS), word(p, LEAST), 2 * word(p, THREADS)
    start = 0
    for _ in range(ticket):
        if start >= total:
            break
        start += max(least, (total - start) // parts)
    return start, min(total, start + max(least, (total - start) // parts))


@function
def widen(p, token, out):
    """Write norm(x) of all rows to an array, float32. Squares are summed in float64."""
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
def aligned(array):
    """The first address in an array of float32, ``LINE`` longer than needed, at which a cache line begins."""
    return (array.ctypes.data + 63) & -64


@function
def prologue(p, token, form):
    """norm(x) of all rows as ``write_sums`` takes it, from the ``aligned`` address of an array on."""
    rows, width = word(p, ROWS), word(p, WIDTH)
    wide = np.empty(rows * width + LINE, np.float32)
    widen(p, token, wide[(aligned(wide) - wide.ctypes.data) // 4 :])
    if not is_narrow(form):
        return wide
    stride = bytes_of_vector(form, width)
    rounded = np.empty(rows * stride // 4 + LINE, np.float32)
    for row in range(rows):
        round_vector(form, width, aligned(wide) + row * width * 4, aligned(rounded) + row * stride)
    hold(wide)
    return rounded


@function
def some_rows(form, count, weight, scale, minimum, first, stop, width, x, target):
    """Outputs from ``first`` to ``stop`` for ``count`` rows of x, results ``[count,TOGETHER]``."""
    step = neighbours(form, count)
    for output in range(first, stop, step):
        place = target + 4 * (output - first)
        write_sums(form, count, weight, scale, minimum, output, stop - 1, width, x, place, 4 * TOGETHER)


@function
def bring(form, weight, output, width, part, parts):
    """Have one of so many parts of the weights of the ``TOGETHER`` outputs from ``output`` on brought to the cache."""
    if is_narrow(form):
        return
    count = TOGETHER * width * size(form)
    start = weight + output * width * size(form)
    for place in range(start + part * count // parts, start + (part + 1) * count // parts, 64):
        prefetch(place)


@function
def all_rows(form, rows, weight, scale, minimum, first, stop, end, width, x, target):
    """Outputs from ``first`` to ``stop`` for all rows of x, results ``[rows,TOGETHER]``.

    The weights of the next outputs, before ``end``, are on their way meanwhile: else the first rows of x would wait for
    them, and the processor would not read ahead while the others are multiplied.
    """
    stride, room = bytes_of_vector(form, width), 4 * TOGETHER
    many, pairs = rows - rows % MANY, rows - rows % 2
    for row in range(0, many, MANY):
        some_rows(form, MANY, weight, scale, minimum, first, stop, width, x + row * stride, target + row * room)
        if stop < end and many > MANY:
            bring(form, weight, stop, width, row // MANY, many // MANY)
    for row in range(many, pairs, 2):
        some_rows(form, 2, weight, scale, minimum, first, stop, width, x + row * stride, target + row * room)
    if pairs < rows:
        some_rows(form, 1, weight, scale, minimum, first, stop, width, x + pairs * stride, target + pairs * room)


@function
def finish(p, token, first, outputs, values):
    """Add bias and residual to these outputs of all rows, and round once."""
    bias, residual = word(p, BIAS), word(p, RESIDUAL)
    for row in range(word(p, ROWS)):
        start, place = row * TOGETHER, row * word(p, OUTPUTS) + first
        if bias:
            for i in range(outputs):
                values[start + i] += load(token, bias, first + i)
        if residual:
            for i in range(outputs):
                values[start + i] += load(token, residual, place + i)
        for i in range(outputs):
            store(token, word(p, Y), place + i, values[start + i])


@function
def linear_runs(p, token, form):
    """``residual + weight·norm(x) + bias`` for the runs that this thread takes."""
    rows, width = word(p, ROWS), word(p, WIDTH)
    weight, scale, minimum = word(p, WEIGHT), word(p, SCALE), word(p, MINIMUM)
    start, stop = next_run(p)
    if start >= stop:
        return
    if rows > MANY:
        bring(form, weight, start, width, 0, 1)
    given, values = prologue(p, token, form), np.empty(rows * TOGETHER, np.float32)
    x, target = aligned(given), values.ctypes.data
    while start < stop:
        for first in range(start, stop, TOGETHER):
            count = min(TOGETHER, stop - first)
            all_rows(form, rows, weight, scale, minimum, first, first + count, stop, width, x, target)
            finish(p, token, first, count, values)
        start, stop = next_run(p)
    hold(given)


@function
def activate(values, activation):
    """The activation of a gate, in place: x·sigmoid(x), or x times the normal distribution function of x."""
    if activation == SILU:
        for i in range(len(values)):
            value = values[i]
            power = exp(-abs(value))
            share = np.float32(1) if value >= 0 else power
            values[i] = value * (share / (np.float32(1) + power)) if value == value else value
    elif activation == GELU:
        for i in range(len(values)):
            wide = np.float64(values[i])
            values[i] = 0.5 * wide * (1.0 + math.erf(wide * 0.7071067811865476))


@function
def gate_runs(p, token, form):
    """``act(gate·norm(x)) · (up·norm(x))`` for the runs that this thread takes."""
    rows, width, outputs = word(p, ROWS), word(p, WIDTH), word(p, OUTPUTS)
    gates, scale, minimum = word(p, WEIGHT), word(p, SCALE), word(p, MINIMUM)
    ups, up_scale, up_minimum = word(p, UP), word(p, UP_SCALE), word(p, UP_MINIMUM)
    start, stop = next_run(p)
    if start >= stop:
        return
    if rows > MANY:
        bring(form, gates, start, width, 0, 1)
        bring(form, ups, start, width, 0, 1)
    x_wide, values = prologue(p, token, form), np.zeros((2, rows * TOGETHER), np.float32)
    x, target = aligned(x_wide), values.ctypes.data
    other = target + 4 * rows * TOGETHER
    while start < stop:
        for first in range(start, stop, TOGETHER):  # each matrix is read in one piece
            count = min(TOGETHER, stop - first)
            all_rows(form, rows, gates, scale, minimum, first, first + count, stop, width, x, target)
            all_rows(form, rows, ups, up_scale, up_minimum, first, first + count, stop, width, x, other)
            activate(values[0], word(p, ACT))
            for row in range(rows):
                for i in range(count):
                    place = row * TOGETHER + i
                    store(token, word(p, Y), row * outputs + first + i, values[0, place] * values[1, place])
        start, stop = next_run(p)
    hold(x_wide)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def linear(token, form):
    """The kernel of a linear layer whose activations are of this dtype and weights of this form."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        linear_runs(p, token, form)

    return entry


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def gate(token, form):
    """The kernel of a gate whose activations are of this dtype and weights of this form."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        gate_runs(p, token, form)

    return entry
