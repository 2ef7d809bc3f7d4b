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

from hyaena.ops.cpu.memory import STAMP, exp, function, hold, inverse, kernel, load, real, size, take, word
from hyaena.ops.cpu.narrow import bytes_of_vector, is_narrow, neighbours, round_vector, write_sums
from hyaena.ops.cpu.vectors import EIGHT, LANES, MANY, add_numbers, prefetch, put_numbers

LEAST_BYTES = 1 << 13
"""Weights of the shortest run, about."""
TOGETHER = 16
"""Outputs that are computed for all rows before the next ones, or before those of a gate's other matrix, at most: of
``neighbours`` a multiple. Runs consist of so many, but for the last."""

LINE = 16
"""float32 numbers of a cache line."""

SILU, GELU, IDENTITY = 0, 1, 2
ACTIVATION = {"silu": SILU, "gelu": GELU, "identity": IDENTITY}

# Places of the arguments; 0 counts runs, and 1 nothing.
X, ROWS, WIDTH, OUTPUTS, LEAST, THREADS, NORM, EPS, INSIDE, Y, WEIGHT, SCALE, MINIMUM, BIAS, RESIDUAL = range(2, 17)
UP, UP_SCALE, UP_MINIMUM, ACT = BIAS, RESIDUAL, 17, 18  # of a gate, which has no bias and no residual


@function
def next_run(p, seen, stop):
    """The outputs, first and behind the last, that nobody has taken: a share of what is left, at least ``LEAST``.

    Args:
        seen, stop: how many runs lie before a place, and that place: those that the last call returned, 0 at first.

    Returns:
        The first output, the one behind the last, and how many runs end there.
    """
    ticket, total, least, parts = take(p, 0), word(p, OUTPUTS), word(p, LEAST), 2 * word(p, THREADS)
    start = stop
    for _ in range(seen, ticket + 1):
        start = stop
        if start >= total:
            break
        stop = start + -(-max(least, (total - start) // parts) // TOGETHER) * TOGETHER
    return start, min(total, stop), ticket + 1


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
        scale = inverse(root)
        for k in range(width):
            value = np.float32(np.float64(load(token, x, start + k)) * scale)
            out[start + k] = value * load(token, weight, k)


@function
def aligned(array):
    """The first address in an array of float32, ``LINE`` longer than needed, at which a cache line begins."""
    return (array.ctypes.data + 63) & -64


@function
def prologue(p, token, form):
    """norm(x) of all rows as ``write_sums`` takes it: its address, and the array that holds it."""
    rows, width = word(p, ROWS), word(p, WIDTH)
    plain = size(token) == 4 and word(p, NORM) == 0
    wide = np.empty(0 if plain else rows * width + LINE, np.float32)
    x = word(p, X) if plain else aligned(wide)
    if not plain:
        widen(p, token, wide[(x - wide.ctypes.data) // 4 :])
    if not is_narrow(form):
        return x, wide
    stride = bytes_of_vector(form, width)
    rounded = np.empty(rows * stride // 4 + LINE, np.float32)
    for row in range(rows):
        round_vector(form, width, x + row * width * 4, aligned(rounded) + row * stride)
    hold(wide)
    return aligned(rounded), rounded


@function
def some_rows(form, count, weight, scale, minimum, first, stop, width, x, target, room, ahead, pace):
    """Outputs from ``first`` to ``stop`` for ``count`` rows of x, whose results are ``room`` bytes apart.

    Meanwhile each of them brings what lies as far behind ``ahead`` as its weights lie behind those of the first.
    """
    step = neighbours(form, count)
    for output in range(first, stop, step):
        place, here = target + 4 * (output - first), ahead + (output - first) * width * size(form)
        write_sums(form, count, weight, scale, minimum, output, stop - 1, width, x, place, room, here, pace)


@function
def bring(form, weight, output, count, width):
    """Have the weights of ``count`` outputs from ``output`` on brought to the cache."""
    if not is_narrow(form):
        start = weight + output * width * size(form)
        for place in range(start, start + count * width * size(form), 64):
            prefetch(place)


@function
def all_rows(form, rows, weight, scale, minimum, first, stop, width, x, target, room, following):
    """Outputs from ``first`` to ``stop`` for all rows of x, whose results are ``room`` bytes apart.

    The weights of the ``following`` outputs are brought meanwhile, evenly: else the first rows of x would wait for
    them, and the processor would not read ahead while the others are multiplied. Negative where nothing follows.
    """
    stride, step = bytes_of_vector(form, width), neighbours(form, MANY)
    many, pairs = rows - rows % MANY, rows - rows % 2
    ahead, part, pace = weight + first * width * size(form), 0, 0
    if following >= 0 and many > MANY:
        parts = many // MANY
        ahead = weight + following * width * size(form)
        part, pace = step * width * size(form) // parts, step * LANES * size(form) // parts
    for row in range(0, many, MANY):
        here, there = x + row * stride, target + row * room
        some_rows(form, MANY, weight, scale, minimum, first, stop, width, here, there, room, ahead, pace)
        ahead += part
    for row in range(many, pairs, 2):
        here, there = x + row * stride, target + row * room
        some_rows(form, 2, weight, scale, minimum, first, stop, width, here, there, room, 0, 0)
    if pairs < rows:
        here, there = x + pairs * stride, target + pairs * room
        some_rows(form, 1, weight, scale, minimum, first, stop, width, here, there, room, 0, 0)


@function
def finish(p, token, first, outputs, values, room, bias, residual):
    """Add bias and residual, or 0, to these outputs of all rows, and round once."""
    step, offset = word(p, OUTPUTS) * size(token), first * size(token)
    y, bias, residual = word(p, Y) + offset, bias + offset if bias else 0, residual + offset if residual else 0
    for row in range(word(p, ROWS)):
        here, there = values + row * room, residual + row * step if residual else 0
        if outputs == EIGHT:  # a number that is known needs no loop
            finish_row(token, EIGHT, here, bias, there, y + row * step)
        else:
            finish_row(token, outputs, here, bias, there, y + row * step)


@function
def finish_row(token, outputs, values, bias, residual, y):
    """Add what there is to outputs of a row, and round once."""
    if bias:
        add_numbers(token, bias, outputs, values)
    if residual:
        add_numbers(token, residual, outputs, values)
    put_numbers(token, values, outputs, y)


@function
def together(rows):
    """Outputs that are computed for so many rows of x before the next ones: their weights stay in the first cache."""
    return TOGETHER // 2 if rows >= MANY else TOGETHER


@function
def block_at(p, start, stop, block, seen):
    """How many outputs of a run are computed together; where the next ones begin, and their run ends; the runs seen."""
    count = min(block, stop - start)
    if start + count < stop:
        return count, start + count, stop, seen
    following, end, seen = next_run(p, seen, stop)
    return count, following, end, seen


@function
def linear_runs(p, token, form):
    """``residual + weight·norm(x) + bias`` for the runs that this thread takes."""
    rows, width, block = word(p, ROWS), word(p, WIDTH), together(word(p, ROWS))
    weight, scale, minimum = word(p, WEIGHT), word(p, SCALE), word(p, MINIMUM)
    start, stop, seen = next_run(p, 0, 0)
    if start >= stop:
        return
    if rows > MANY:
        bring(form, weight, start, block, width)
    x, given = prologue(p, token, form)
    values = np.empty(rows * block, np.float32)
    target = values.ctypes.data
    while start < stop:
        count, following, end, seen = block_at(p, start, stop, block, seen)
        upcoming = following if following < end else -1
        all_rows(form, rows, weight, scale, minimum, start, start + count, width, x, target, 4 * block, upcoming)
        finish(p, token, start, count, target, 4 * block, word(p, BIAS), word(p, RESIDUAL))
        start, stop = following, end
    hold(given)
    hold(values)


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
    rows, width, block = word(p, ROWS), word(p, WIDTH), together(word(p, ROWS))
    gates, scale, minimum = word(p, WEIGHT), word(p, SCALE), word(p, MINIMUM)
    ups, up_scale, up_minimum = word(p, UP), word(p, UP_SCALE), word(p, UP_MINIMUM)
    start, stop, seen = next_run(p, 0, 0)
    if start >= stop:
        return
    if rows > MANY:
        bring(form, gates, start, block, width)
        bring(form, ups, start, block, width)
    x, given = prologue(p, token, form)
    values = np.zeros((2, rows * block), np.float32)
    target = values.ctypes.data
    other = target + 4 * rows * block
    while start < stop:
        count, following, end, seen = block_at(p, start, stop, block, seen)
        upcoming = following if following < end else -1
        all_rows(form, rows, gates, scale, minimum, start, start + count, width, x, target, 4 * block, upcoming)
        all_rows(form, rows, ups, up_scale, up_minimum, start, start + count, width, x, other, 4 * block, upcoming)
        activate(values[0], word(p, ACT))
        for i in range(rows * block):
            values[0, i] *= values[1, i]
        finish(p, token, start, count, target, 4 * block, 0, 0)
        start, stop = following, end
    hold(given)
    hold(values)


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
