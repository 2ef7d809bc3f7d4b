"""Attention of the newest token of each row: rotate, store, and read the past once.

Keys and values of a row and of a key/value head are read in pieces of ``SPLIT`` tokens, which threads take one after
another; each piece serves all query heads that share it. The pieces of a row depend on its length alone and are added
in their order, so that its numbers depend neither on threads nor on other rows.

Where keys and values lie: a row of its own is ``[G,capacity,head_dim]`` at an address of a table; on pages, slot s of a
row is slot ``s % PAGE`` of page ``numbers[row, s // PAGE]`` of the storage ``[G,slots,head_dim]`` of all rows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hyaena.ops.cpu.memory import (
    FLOAT32,
    STAMP,
    exp,
    function,
    hold,
    kernel,
    load,
    real,
    short_word,
    size,
    store,
    take,
    word,
)
from hyaena.ops.cpu.vectors import dot
from hyaena.ops.pages import PAGE

SPLIT = 256
"""Tokens of a piece: a multiple of a page. Long enough to hide what adding pieces costs, short enough to share out."""

# Places of the arguments; 0 counts pieces and 1 those that are finished.
Q, ROWS, HEADS, GROUPS, HEAD_DIM, LENGTHS, KEYS, VALUES, SLOTS, PAGES, PAGES_WIDTH, Y = range(2, 14)
COS, SIN = 14, 15  # of rotating
SPLITS, PARTS, SCALE = 14, 15, 16  # of attention


@function
def place(p, row, group, slot, head_dim):
    """The slot in a row's storage, counted in numbers from ``base``."""
    pages = word(p, PAGES)
    if pages == 0:
        return (group * short_word(word(p, SLOTS), row) + slot) * head_dim
    page = short_word(pages, row * word(p, PAGES_WIDTH) + slot // PAGE)
    return (group * word(p, SLOTS) + page * PAGE + slot % PAGE) * head_dim


@function
def base(p, row, which):
    """The address of a row's keys or values."""
    table = word(p, which)
    return word(table, row) if word(p, PAGES) == 0 else table


@function
def turn(token, source, target_token, target, half, cos, sin):
    """Rotate one head of ``2·half`` numbers."""
    for i in range(half):
        a, b = load(token, source, i), load(token, source, i + half)
        c, s = load(FLOAT32, cos, i), load(FLOAT32, sin, i)
        store(target_token, target, i, a * c - b * s)
        store(target_token, target, i + half, b * c + a * s)


@function
def rotate_rows(p, token, kv_token):
    """Rotate queries and keys, and store keys and values in the newest slots."""
    heads, groups, head_dim, itemsize = word(p, HEADS), word(p, GROUPS), word(p, HEAD_DIM), size(token)
    half = head_dim // 2
    while True:
        row = take(p, 0)
        if row >= word(p, ROWS):
            return
        slot = short_word(word(p, LENGTHS), row) - 1
        cos, sin = word(p, COS) + slot * half * 4, word(p, SIN) + slot * half * 4
        source = word(p, Q) + row * (heads + 2 * groups) * head_dim * itemsize
        target = word(p, Y) + row * heads * head_dim * itemsize
        for head in range(heads):
            turn(token, source + head * head_dim * itemsize, token, target + head * head_dim * itemsize, half, cos, sin)
        keys, values = base(p, row, KEYS), base(p, row, VALUES)
        for group in range(groups):
            offset = place(p, row, group, slot, head_dim) * size(kv_token)
            key = source + (heads + group) * head_dim * itemsize
            value = source + (heads + groups + group) * head_dim * itemsize
            turn(token, key, kv_token, keys + offset, half, cos, sin)
            for i in range(head_dim):
                store(kv_token, values + offset, i, load(token, value, i))


@function
def score(kv_token, keys, head_dim, q, count, out):
    """Products of one query with ``count`` neighbouring keys."""
    for t in range(count):
        store(FLOAT32, out, t, dot(kv_token, keys + t * head_dim * size(kv_token), head_dim, q))


@function
def mix(kv_token, values, head_dim, weights, count, out):
    """Add ``count`` neighbouring values times their weights to out."""
    t = 0
    while t + 4 <= count:
        a, b = load(FLOAT32, weights, t), load(FLOAT32, weights, t + 1)
        c, d = load(FLOAT32, weights, t + 2), load(FLOAT32, weights, t + 3)
        start = t * head_dim
        for i in range(head_dim):
            total = a * load(kv_token, values, start + i) + b * load(kv_token, values, start + head_dim + i)
            total += c * load(kv_token, values, start + 2 * head_dim + i)
            total += d * load(kv_token, values, start + 3 * head_dim + i)
            store(FLOAT32, out, i, load(FLOAT32, out, i) + total)
        t += 4
    while t < count:
        a = load(FLOAT32, weights, t)
        for i in range(head_dim):
            store(FLOAT32, out, i, load(FLOAT32, out, i) + a * load(kv_token, values, t * head_dim + i))
        t += 1


@function
def normalise(scores, count):
    """Turn scores into e^(score - largest), in place; the largest and the sum."""
    largest = np.float32(-np.inf)
    for t in range(count):
        value = load(FLOAT32, scores, t)
        largest = value if value > largest else largest
    total = np.float32(0)
    for t in range(count):
        value = exp(load(FLOAT32, scores, t) - largest)
        store(FLOAT32, scores, t, value)
        total += value
    return largest, total


@function
def read_piece(p, kv_token, row, group, split, queries, scores, part):
    """Attention of a group's queries to one piece: largest score, sum of weights, and weighted values, per head."""
    shared, head_dim = word(p, HEADS) // word(p, GROUPS), word(p, HEAD_DIM)
    start = split * SPLIT
    count = min(short_word(word(p, LENGTHS), row) - start, SPLIT)
    keys, values, itemsize = base(p, row, KEYS), base(p, row, VALUES), size(kv_token)
    step = PAGE if word(p, PAGES) else SPLIT  # what lies together
    for t in range(0, count, step):
        here = place(p, row, group, start + t, head_dim) * itemsize
        for head in range(shared):
            out = scores + (head * SPLIT + t) * 4
            score(kv_token, keys + here, head_dim, queries + head * head_dim * 4, min(step, count - t), out)
    stride = head_dim + 2
    for head in range(shared):
        largest, total = normalise(scores + head * SPLIT * 4, count)
        store(FLOAT32, part, head * stride, largest)
        store(FLOAT32, part, head * stride + 1, total)
        for i in range(head_dim):
            store(FLOAT32, part, head * stride + 2 + i, np.float32(0))
    for t in range(0, count, step):
        here = place(p, row, group, start + t, head_dim) * itemsize
        for head in range(shared):
            weights, out = scores + (head * SPLIT + t) * 4, part + (head * stride + 2) * 4
            mix(kv_token, values + here, head_dim, weights, min(step, count - t), out)


@function
def add_pieces(p, token):
    """The result of every head from its pieces."""
    heads, groups, head_dim, splits = word(p, HEADS), word(p, GROUPS), word(p, HEAD_DIM), word(p, SPLITS)
    shared, stride = heads // groups, head_dim + 2
    for row in range(word(p, ROWS)):
        used = (short_word(word(p, LENGTHS), row) + SPLIT - 1) // SPLIT
        for head in range(heads):
            first = word(p, PARTS) + (((row * groups + head // shared) * splits) * shared + head % shared) * stride * 4
            step = shared * stride  # from piece to piece
            largest = np.float32(-np.inf)
            for split in range(used):
                value = load(FLOAT32, first, split * step)
                largest = value if value > largest else largest
            total = np.float32(0)
            for split in range(used):
                weight = exp(load(FLOAT32, first, split * step) - largest)
                total += weight * load(FLOAT32, first, split * step + 1)
                for i in range(head_dim):  # collected in the first piece
                    value = weight * load(FLOAT32, first, split * step + 2 + i)
                    if split:
                        value += load(FLOAT32, first, 2 + i)
                    store(FLOAT32, first, 2 + i, value)
            for i in range(head_dim):
                store(token, word(p, Y), (row * heads + head) * head_dim + i, load(FLOAT32, first, 2 + i) / total)


@function
def attend_pieces(p, token, kv_token):
    """Attention of every row; the thread that finishes the last piece adds them."""
    rows, heads, groups, head_dim = word(p, ROWS), word(p, HEADS), word(p, GROUPS), word(p, HEAD_DIM)
    splits, scale = word(p, SPLITS), np.float32(real(p, SCALE))
    shared = heads // groups
    pieces = rows * groups * splits
    piece = take(p, 0)
    if piece >= pieces:
        return
    wide, room = np.empty(shared * head_dim, np.float32), np.empty(shared * SPLIT, np.float32)
    queries, scores = wide.ctypes.data, room.ctypes.data
    while piece < pieces:
        split, group, row = piece % splits, piece // splits % groups, piece // (splits * groups)
        if split * SPLIT < short_word(word(p, LENGTHS), row):
            start = (row * heads + group * shared) * head_dim
            for i in range(shared * head_dim):
                store(FLOAT32, queries, i, load(token, word(p, Q), start + i) * scale)
            part = word(p, PARTS) + piece * shared * (head_dim + 2) * 4
            read_piece(p, kv_token, row, group, split, queries, scores, part)
        if take(p, 1) == pieces - 1:
            add_pieces(p, token)
        piece = take(p, 0)
    hold(wide)
    hold(room)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def rotate_and_cache(token, kv_token):
    """The kernel that rotates and stores, for activations, and keys and values, of these dtypes."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        rotate_rows(p, token, kv_token)

    return entry


@lru_cache(maxsize=None, typed=True)
def attend(token, kv_token):
    """The kernel of attention for activations, and keys and values, of these dtypes."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        attend_pieces(p, token, kv_token)

    return entry
