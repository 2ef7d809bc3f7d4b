"""One step of the Hyena operator: short filter, gate, long filter, gate, with both states updated in place.

Everything is elementwise in the channel, so threads take blocks of channels of a row. Numbers are float32 between
loading and storing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hyaena.ops.cpu.filters import complex_filters, short_filters
from hyaena.ops.cpu.memory import FLOAT32, STAMP, expm1, function, hold, kernel, load, size, store, take, word
from hyaena.ops.cpu.vectors import add_numbers, put_numbers

BLOCK = 128
"""Channels that a thread takes together."""

COMPLEX, REAL, TAPS = 0, 1, 2

# Places of the arguments; 0 counts blocks, and 1 nothing.
Z, ROWS, CHANNELS, SHORT_WEIGHT, SHORT_BIAS, SHORT, LONG, FILTERS, MODES, A, B, SKIP, Y = range(2, 15)


@function
def real_modes(p, token, state, numbers, x):
    """``s += expm1(λ)·s + x``, ``Σ R·s`` for real modes; A holds λ."""
    poles, residues, total = word(p, A), word(p, B), np.float32(0)
    for n in range(word(p, MODES)):
        s = load(FLOAT32, state, n)
        s += expm1(load(FLOAT32, poles, numbers + n)) * s + x
        store(FLOAT32, state, n, s)
        total += load(FLOAT32, residues, numbers + n) * s
    return total


@function
def explicit_taps(p, token, state, numbers, x):
    """``Σ h[k]·x[t-k]`` over a window of the last inputs, oldest first, which moves on."""
    taps, window = word(p, A), word(p, MODES) - 1
    total = load(token, taps, numbers) * x
    for k in range(window):
        total += load(token, taps, numbers + window - k) * load(FLOAT32, state, k)
    for k in range(window - 1):
        store(FLOAT32, state, k, load(FLOAT32, state, k + 1))
    if window > 0:
        store(FLOAT32, state, window - 1, x)
    return total


@function
def long_filters(p, token, kind, row, first, count, inputs, out):
    """The long filters of ``count`` channels from ``first`` on, whose inputs and outputs are float32 at addresses."""
    channels, modes = word(p, CHANNELS), word(p, MODES)
    shared = channels // word(p, FILTERS)
    # numbers of a state: a window has one fewer than taps, a complex mode two
    width = 2 * modes if kind == COMPLEX else modes if kind == REAL else modes - 1
    state = word(p, LONG) + (row * channels + first) * width * 4
    if kind == COMPLEX:
        complex_filters(word(p, A), word(p, B), state, modes, shared, first, count, inputs, out)
        return
    for i in range(count):
        numbers, x = (first + i) // shared * modes, load(FLOAT32, inputs, i)
        if kind == REAL:
            y = real_modes(p, token, state + i * width * 4, numbers, x)
        else:
            y = explicit_taps(p, token, state + i * width * 4, numbers, x)
        store(FLOAT32, out, i, y)


@function
def step_blocks(p, token, short_token, kind, taps):
    """The step for the blocks of channels that this thread takes."""
    channels, skip = word(p, CHANNELS), word(p, SKIP)
    blocks, bias = (channels + BLOCK - 1) // BLOCK, word(p, SHORT_BIAS)
    filtered, results = np.empty((3, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    gates, inputs, factors = filtered[0], filtered[1], filtered[2]
    while True:
        item = take(p, 0)
        if item >= word(p, ROWS) * blocks:
            break
        row, first = item // blocks, item % blocks * BLOCK
        count = min(BLOCK, channels - first)
        for part in range(3):
            channel = part * channels + first
            place, target = row * 3 * channels + channel, filtered.ctypes.data + part * BLOCK * 4
            x, weights = word(p, Z) + place * size(token), word(p, SHORT_WEIGHT) + channel * taps * size(token)
            windows = word(p, SHORT) + place * (taps - 1) * size(short_token)
            short_filters(token, short_token, taps, x, weights, windows, count, target)
            if bias:
                add_numbers(token, bias + channel * size(token), count, target)
        for i in range(count):
            inputs[i] *= factors[i]
        long_filters(p, token, kind, row, first, count, inputs.ctypes.data, results.ctypes.data)
        if skip:
            for i in range(count):
                results[i] += load(token, skip, first + i) * inputs[i]
        for i in range(count):
            results[i] *= gates[i]
        put_numbers(token, results.ctypes.data, count, word(p, Y) + (row * channels + first) * size(token))
    hold(filtered)
    hold(results)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def step(token, short_token, kind, taps):
    """The kernel of a step for activations, and windows of the short filter, of these dtypes, a kind of filter, and so
    many taps of the short one.
    """

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        step_blocks(p, token, short_token, kind, taps)

    return entry
