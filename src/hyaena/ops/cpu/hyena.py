"""One step of the Hyena operator: short filter, gate, long filter, gate, with both states updated in place.

Everything is elementwise in the channel, so threads take blocks of channels of a row. Numbers are float32 between
loading and storing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hyaena.ops.cpu.memory import FLOAT32, STAMP, expm1, function, kernel, load, size, store, take, word

BLOCK = 128
"""Channels that a thread takes together."""

COMPLEX, REAL, TAPS = 0, 1, 2

# Places of the arguments; 0 counts blocks, and 1 nothing.
Z, ROWS, CHANNELS, SHORT_TAPS, SHORT_WEIGHT, SHORT_BIAS, SHORT, LONG, FILTERS, MODES, A, B, SKIP, Y = range(2, 16)


@function
def short_filter(p, token, short_token, row, channel):
    """The short filter of one of the 3D channels, and its window moved on."""
    taps, width = word(p, SHORT_TAPS), 3 * word(p, CHANNELS)
    now = load(token, word(p, Z), row * width + channel)
    weight, bias = channel * taps, word(p, SHORT_BIAS)
    window = word(p, SHORT) + (row * width + channel) * (taps - 1) * size(short_token)
    total = load(token, bias, channel) if bias else np.float32(0)
    total += load(token, word(p, SHORT_WEIGHT), weight + taps - 1) * now
    for k in range(taps - 1):
        total += load(token, word(p, SHORT_WEIGHT), weight + k) * load(short_token, window, k)
    for k in range(taps - 2):
        store(short_token, window, k, load(short_token, window, k + 1))
    if taps > 1:
        store(short_token, window, taps - 2, now)
    return total


@function
def complex_modes(p, token, state, numbers, x):
    """``s = p·s + x``, ``Re Σ R·s`` for complex modes; real and imaginary parts lie side by side."""
    poles, residues, total = word(p, A), word(p, B), np.float32(0)
    for n in range(word(p, MODES)):
        re, im = 2 * n, 2 * n + 1
        a, b = load(FLOAT32, poles, numbers * 2 + re), load(FLOAT32, poles, numbers * 2 + im)
        s, t = load(FLOAT32, state, re), load(FLOAT32, state, im)
        u, v = a * s - b * t + x, a * t + b * s
        store(FLOAT32, state, re, u)
        store(FLOAT32, state, im, v)
        total += load(FLOAT32, residues, numbers * 2 + re) * u - load(FLOAT32, residues, numbers * 2 + im) * v
    return total


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
def step_blocks(p, token, short_token, kind):
    """The step for the blocks of channels that this thread takes."""
    channels, modes, skip = word(p, CHANNELS), word(p, MODES), word(p, SKIP)
    shared = channels // word(p, FILTERS)
    blocks = (channels + BLOCK - 1) // BLOCK
    # numbers of a state: a window has one fewer than taps, a complex mode two
    width = 2 * modes if kind == COMPLEX else modes if kind == REAL else modes - 1
    while True:
        item = take(p, 0)
        if item >= word(p, ROWS) * blocks:
            return
        row, first = item // blocks, item % blocks * BLOCK
        for channel in range(first, min(first + BLOCK, channels)):
            gate = short_filter(p, token, short_token, row, channel)
            x = short_filter(p, token, short_token, row, channels + channel)
            x *= short_filter(p, token, short_token, row, 2 * channels + channel)
            state = word(p, LONG) + (row * channels + channel) * width * 4
            numbers = channel // shared * modes
            if kind == COMPLEX:
                y = complex_modes(p, token, state, numbers, x)
            elif kind == REAL:
                y = real_modes(p, token, state, numbers, x)
            else:
                y = explicit_taps(p, token, state, numbers, x)
            if skip:
                y += load(token, skip, channel) * x
            store(token, word(p, Y), row * channels + channel, y * gate)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def step(token, short_token, kind):
    """The kernel of a step for activations, and windows of the short filter, of these dtypes, and a kind of filter."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        step_blocks(p, token, short_token, kind)

    return entry
