"""The ends of a step: the rows of the embedding table for tokens, and the most probable token of logits."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from hyaena.ops.cpu.memory import (
    STAMP,
    exp,
    function,
    kernel,
    load,
    rank,
    short_word,
    size,
    store,
    store_real,
    store_short_word,
    store_word,
    take,
    word,
)

PIECE = 1024
"""Logits of which the largest is found before it is compared with others'."""

# Places of the arguments; 0 counts rows, and 1 nothing.
IDS, ROWS, WIDTH, TABLE, LENGTHS, LIMITS, X = range(2, 9)  # of embedding
LOGITS, CHOSEN, OUTPUTS = 2, 5, 6  # of choosing, beside ROWS and WIDTH


@function
def embed_rows(p, token):
    """Count one more token in every row, and copy the rows of its table."""
    width, lengths = word(p, WIDTH), word(p, LENGTHS)
    while True:
        row = take(p, 0)
        if row >= word(p, ROWS):
            return
        store_short_word(lengths, row, min(short_word(lengths, row) + 1, short_word(word(p, LIMITS), row)))
        start = word(word(p, IDS), row) * width
        for k in range(width):
            store(token, word(p, X), row * width + k, load(token, word(p, TABLE), start + k))


@function
def largest_of(token, logits, start, stop):
    """The rank of the largest of some logits: loops over ranks become vectors, and a NaN is the largest."""
    most = rank(np.float32(-np.inf))
    for k in range(start, stop):
        most = max(most, rank(load(token, logits, k)))
    return most


@function
def choose_row(p, token, row):
    """The first of the largest logits of a row, its log-probability, and whether they are finite."""
    width, output = word(p, WIDTH), word(p, OUTPUTS) + row * 24
    logits = word(p, LOGITS) + row * width * size(token)
    best, start = rank(np.float32(-np.inf)), np.int64(0)
    for first in range(0, width, PIECE):
        most = largest_of(token, logits, first, min(width, first + PIECE))
        if most > best:
            best, start = most, first
    chosen = start
    while chosen < width - 1 and rank(load(token, logits, chosen)) != best:  # none is, where all are a NaN with a sign
        chosen += 1
    largest, total = load(token, logits, chosen), np.float32(0)
    for k in range(width):
        total += exp(load(token, logits, k) - largest)
    finite = math.isfinite(largest) and total == total  # a NaN with a sign ranks below all
    store_word(word(p, CHOSEN), row, chosen if finite else 0)
    store_real(output, 0, float(chosen if finite else 0))
    store_real(output, 1, -math.log(np.float64(total)))
    store_real(output, 2, 1.0 if finite else 0.0)


@function
def choose_rows(p, token):
    """The rows that this thread takes."""
    row = take(p, 0)
    while row < word(p, ROWS):
        choose_row(p, token, row)
        row = take(p, 0)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def embed(token):
    """The kernel that looks up rows of a table of this dtype."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        embed_rows(p, token)

    return entry


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def choose(token):
    """The kernel that chooses from logits of this dtype."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        choose_rows(p, token)

    return entry
