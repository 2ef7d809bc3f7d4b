"""Attention of the newest token of each row: rotate, store, and read the past once.

Keys and values of a row and of a key/value head are read in pieces, which threads take one after another; each piece
serves all query heads that share it. The pieces of a row depend on its length alone and are added in their order, so
that its numbers depend neither on threads nor on other rows.

Where keys and values lie: a row of its own is ``[G,capacity]`` slots at an address of a table; on pages, slot s of a
row is slot ``s % PAGE`` of page ``numbers[row, s // PAGE]`` of the storage ``[G,slots]`` of all rows. The scale of a
slot in int8 (``ops.slots``) multiplies the score of a key, and the weight of a value: products see the whole numbers.
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
    nearest,
    rank,
    real,
    scale_size,
    short_word,
    size,
    store,
    take,
    unrank,
    word,
)
from hyaena.ops.cpu.reads import mix, scores
from hyaena.ops.cpu.vectors import put_numbers
from hyaena.ops.pages import PAGE
from hyaena.ops.slots import INVERSE, LARGEST

SPLIT = 256
"""Tokens of a piece, at least: long enough to hide what adding pieces costs, short enough to share out."""
MOST_SPLITS = 64
"""Pieces of a row."""
MOST_HEADS = 4
"""Heads that are computed together, unless only 5 or 7 come out even."""

# Places of the arguments; 0 counts pieces and 1 those that are finished.
Q, ROWS, HEADS, GROUPS, HEAD_DIM, LENGTHS, KEYS, VALUES, SLOTS, PAGES, PAGES_WIDTH, Y = range(2, 14)
COS, SIN = 14, 15  # of rotating
PARTS, SCALE = 14, 15  # of attention


@function
def slot_size(kv_token, head_dim):
    """Bytes of a slot."""
    return head_dim * size(kv_token) + scale_size(kv_token)


@function
def place(p, kv_token, row, group, slot):
    """Bytes from ``base`` to a slot."""
    pages, stride = word(p, PAGES), slot_size(kv_token, word(p, HEAD_DIM))
    if pages == 0:
        return (group * short_word(word(p, SLOTS), row) + slot) * stride
    page = short_word(pages, row * word(p, PAGES_WIDTH) + slot // PAGE)
    return (group * word(p, SLOTS) + page * PAGE + slot % PAGE) * stride


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
def write_slot(kv_token, target, numbers, head_dim):
    """Store float32 numbers in a slot, with their scale where it has one: those of ``ops.slots``, to the bit."""
    scale = np.float32(1)
    if scale_size(kv_token):
        most = rank(np.float32(0))
        for i in range(head_dim):
            most = max(most, rank(np.abs(load(FLOAT32, numbers, i))))  # NaN is the largest
        scale = unrank(most) * np.float32(INVERSE)
        store(FLOAT32, target + head_dim, 0, scale)
        scale = np.float32(1) if scale == 0 else scale
    largest = np.float32(LARGEST)
    for i in range(head_dim):
        value = load(FLOAT32, numbers, i)
        if scale_size(kv_token):
            value = nearest(value / scale)
            value = value if value > -largest else -largest  # NaN has no integer
            value = value if value < largest else largest
        store(kv_token, target, i, value)


@function
def rotate_rows(p, token, kv_token):
    """Rotate queries and keys, and store keys and values in the newest slots."""
    heads, groups, head_dim, itemsize = word(p, HEADS), word(p, GROUPS), word(p, HEAD_DIM), size(token)
    half = head_dim // 2
    room = np.empty(head_dim, np.float32)
    wide, row = room.ctypes.data, take(p, 0)
    while row < word(p, ROWS):
        slot = short_word(word(p, LENGTHS), row) - 1
        cos, sin = word(p, COS) + slot * half * 4, word(p, SIN) + slot * half * 4
        source = word(p, Q) + row * (heads + 2 * groups) * head_dim * itemsize
        target = word(p, Y) + row * heads * head_dim * itemsize
        for head in range(heads):
            turn(token, source + head * head_dim * itemsize, token, target + head * head_dim * itemsize, half, cos, sin)
        keys, values = base(p, row, KEYS), base(p, row, VALUES)
        for group in range(groups):
            offset = place(p, kv_token, row, group, slot)
            key = source + (heads + group) * head_dim * itemsize
            value = source + (heads + groups + group) * head_dim * itemsize
            turn(token, key, FLOAT32, wide, half, cos, sin)
            write_slot(kv_token, keys + offset, wide, head_dim)
            for i in range(head_dim):
                store(FLOAT32, wide, i, load(token, value, i))
            write_slot(kv_token, values + offset, wide, head_dim)
        row = take(p, 0)
    hold(room)


@function
def times_scales(kv_token, slots, head_dim, count, numbers):
    """Multiply a float32 number for each of ``count`` neighbouring slots by their scales, where they have some."""
    if scale_size(kv_token):
        for t in range(count):
            scale = load(FLOAT32, slots + t * slot_size(kv_token, head_dim) + head_dim, 0)
            store(FLOAT32, numbers, t, load(FLOAT32, numbers, t) * scale)


@function
def read_keys(kv_token, heads, shared, keys, head_dim, queries, count, out, out_stride, beside):
    """Scores of ``count`` neighbouring keys for all heads that share them."""
    stride, of_head = slot_size(kv_token, head_dim), head_dim * 4
    for head in range(0, shared, heads):
        here, there = queries + head * of_head, out + head * out_stride
        scores(kv_token, heads, keys, stride, head_dim, here, count, there, out_stride, beside)
    for head in range(shared):
        times_scales(kv_token, keys, head_dim, count, out + head * out_stride)


@function
def read_values(kv_token, heads, shared, values, head_dim, weights, weights_stride, count, out, out_stride, beside):
    """Add ``count`` neighbouring values times their weights to the results of all heads that share them.

    The weights are those of the numbers in the slots afterwards.
    """
    for head in range(shared):
        times_scales(kv_token, values, head_dim, count, weights + head * weights_stride)
    stride = slot_size(kv_token, head_dim)
    for head in range(0, shared, heads):
        here, there = weights + head * weights_stride, out + head * out_stride
        mix(kv_token, heads, values, stride, head_dim, here, weights_stride, count, there, out_stride, beside)


@function
def normalise(scores, count):
    """Turn scores into e^(score - largest), in place; the largest and the sum."""
    most = rank(np.float32(-np.inf))
    for t in range(count):
        most = max(most, rank(load(FLOAT32, scores, t)))
    largest, total = unrank(most), np.float32(0)
    for t in range(count):
        value = exp(load(FLOAT32, scores, t) - largest)
        store(FLOAT32, scores, t, value)
        total += value
    return largest, total


@function
def piece_of(length):
    """Tokens of a piece of a row that holds so many: whole pages, at most ``MOST_SPLITS`` of them."""
    return max(SPLIT, (length + MOST_SPLITS * PAGE - 1) // (MOST_SPLITS * PAGE) * PAGE)


@function
def read_piece(p, kv_token, heads, row, group, start, count, queries, weights, part, following):
    """Attention of a group's queries to one piece: largest score, sum of weights, and weighted values, per head.

    Values are on their way while keys are multiplied, and then the keys of the piece that follows, see ``piece_at``.
    """
    shared, head_dim = word(p, HEADS) // word(p, GROUPS), word(p, HEAD_DIM)
    keys, values = base(p, row, KEYS), base(p, row, VALUES)
    room, stride = count * 4, (head_dim + 2) * 4
    for t in range(0, count, PAGE):
        here, some = place(p, kv_token, row, group, start + t), min(PAGE, count - t)
        read_keys(kv_token, heads, shared, keys + here, head_dim, queries, some, weights + t * 4, room, values + here)
    for head in range(shared):
        largest, total = normalise(weights + head * room, count)
        store(FLOAT32, part + head * stride, 0, largest)
        store(FLOAT32, part + head * stride, 1, total)
        for i in range(head_dim):
            store(FLOAT32, part + head * stride, 2 + i, np.float32(0))
    next_row, next_group, next_start, next_count = following
    for t in range(0, count, PAGE):
        here, some = values + place(p, kv_token, row, group, start + t), min(PAGE, count - t)
        beside = here
        if t < next_count:
            beside = base(p, next_row, KEYS) + place(p, kv_token, next_row, next_group, next_start + t)
        read_values(kv_token, heads, shared, here, head_dim, weights + t * 4, room, some, part + 8, stride, beside)


@function
def pieces_of(length):
    """How many pieces a row has that holds so many tokens."""
    return (length + piece_of(length) - 1) // piece_of(length)


@function
def divide(p, token, row, head, part, total):
    """The result of a head: weighted values by the sum of their weights."""
    head_dim = word(p, HEAD_DIM)
    for i in range(head_dim):
        store(FLOAT32, part, i, load(FLOAT32, part, i) / total)
    put_numbers(token, part, head_dim, word(p, Y) + (row * word(p, HEADS) + head) * head_dim * size(token))


@function
def add_pieces(p, token):
    """The result of every head of a row of several pieces from these."""
    heads, groups, head_dim = word(p, HEADS), word(p, GROUPS), word(p, HEAD_DIM)
    shared, stride = heads // groups, (head_dim + 2) * 4
    step = shared * stride  # from piece to piece
    for row in range(word(p, ROWS)):
        used = pieces_of(short_word(word(p, LENGTHS), row))
        for head in range(heads if used > 1 else 0):
            first = word(p, PARTS) + (row * groups + head // shared) * MOST_SPLITS * step + head % shared * stride
            largest = np.float32(-np.inf)
            for split in range(used):
                value = load(FLOAT32, first + split * step, 0)
                largest = value if value > largest else largest
            total = np.float32(0)
            for split in range(used):
                here = first + split * step
                weight = exp(load(FLOAT32, here, 0) - largest)
                total += weight * load(FLOAT32, here, 1)
                for i in range(head_dim):  # collected in the first piece
                    value = weight * load(FLOAT32, here, 2 + i)
                    if split:
                        value += load(FLOAT32, first, 2 + i)
                    store(FLOAT32, first, 2 + i, value)
            divide(p, token, row, head, first + 8, total)


@function
def piece_at(p, piece, pieces, splits):
    """Row, group, first token and number of tokens of a piece; none where there is no such piece."""
    groups = word(p, GROUPS)
    row, group = piece // (splits * groups), piece // splits % groups
    if piece >= pieces:
        return row, group, 0, 0
    length = short_word(word(p, LENGTHS), row)
    start = piece % splits * piece_of(length)
    return row, group, start, max(0, min(length - start, piece_of(length)))


@function
def attend_pieces(p, token, kv_token, together):
    """Attention of every row. The thread that finishes the last piece of all adds those of rows that have several."""
    rows, heads, groups, head_dim = word(p, ROWS), word(p, HEADS), word(p, GROUPS), word(p, HEAD_DIM)
    scale, shared, longest, splits = np.float32(real(p, SCALE)), heads // groups, 0, 0
    for row in range(rows):
        length = short_word(word(p, LENGTHS), row)
        longest, splits = max(longest, length), max(splits, pieces_of(length))
    pieces, of_head = rows * groups * splits, (head_dim + 2) * 4
    piece = take(p, 0)
    if piece >= pieces:
        return
    wide, room = np.empty(shared * head_dim, np.float32), np.empty(shared * piece_of(longest), np.float32)
    queries, weights = wide.ctypes.data, room.ctypes.data
    here = piece_at(p, piece, pieces, splits)
    while piece < pieces:
        upcoming = take(p, 0)
        following = piece_at(p, upcoming, pieces, splits)
        row, group, start, count = here
        if count:
            first = (row * heads + group * shared) * head_dim
            for i in range(shared * head_dim):
                store(FLOAT32, queries, i, load(token, word(p, Q), first + i) * scale)
            part = word(p, PARTS) + ((row * groups + group) * MOST_SPLITS + piece % splits) * shared * of_head
            read_piece(p, kv_token, together, row, group, start, count, queries, weights, part, following)
            if count == short_word(word(p, LENGTHS), row):
                for head in range(shared):
                    sums = part + head * of_head
                    divide(p, token, row, group * shared + head, sums + 8, load(FLOAT32, sums, 1))
        if take(p, 1) == pieces - 1:
            add_pieces(p, token)
        piece, here = upcoming, following
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


def together_of(shared: int) -> int:
    """How many of the heads that share keys and values are computed together: they come out even."""
    dividing = [count for count in range(1, 2 * MOST_HEADS) if shared % count == 0]
    few = max(count for count in dividing if count <= MOST_HEADS)
    return few if few > 1 else max(dividing)


@lru_cache(maxsize=None, typed=True)
def attend(token, kv_token, together):
    """The kernel of attention for activations, and keys and values, of these dtypes, and so many heads together."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        attend_pieces(p, token, kv_token, together)

    return entry
