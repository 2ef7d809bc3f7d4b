"""The inner steps of ``feedback`` compiled for the processor by numba: a few rows of a weight at a time in its cache.

The plain operators pass over a column of all rows several times; its errors are formed in another order here.
"""

from __future__ import annotations

import functools
from array import array

import numpy as np
import torch
from torch import Tensor

from hyaena.ops.cpu import team
from hyaena.ops.cpu.memory import FLOAT32, STAMP, function, kernel, load, store, take, word

TILE = 64
"""Rows of the weight that a thread takes at a time."""

MOST = 64
"""Columns of a step, at most."""

# Places of the arguments; 0 counts tiles.
COLUMNS, ROWS, LATER, WANTED, INVERSE, SCALE, FACTOR, STRIDE, LOW, HIGH, Q, ERROR = range(1, 13)


@function
def choose_tile(p, first, count, error, made_up):
    """The columns of ``count`` rows from ``first`` on, the last column first."""
    columns, rows = word(p, COLUMNS), word(p, ROWS)
    low, high = np.float32(word(p, LOW)), np.float32(word(p, HIGH))
    for column in range(columns - 1, -1, -1):
        place = column * rows + first
        for k in range(count):
            made_up[k] = load(FLOAT32, word(p, LATER), place + k)
        for other in range(column + 1, columns):
            factor = load(FLOAT32, word(p, FACTOR), column * word(p, STRIDE) + other)
            for k in range(count):
                made_up[k] += factor * error[other, k]
        for k in range(count):
            wanted = load(FLOAT32, word(p, WANTED), place + k)
            q = wanted + made_up[k] * load(FLOAT32, word(p, INVERSE), place + k)
            q = min(max(np.rint(q), low), high)
            error[column, k] = (wanted - q) * load(FLOAT32, word(p, SCALE), place + k)
            store(FLOAT32, word(p, Q), place + k, q)
            store(FLOAT32, word(p, ERROR), place + k, error[column, k])


@functools.cache
def choosing():
    """The kernel: tiles of rows, as many as this thread takes."""
    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        choose_tiles(p)

    return entry


@function
def choose_tiles(p):
    """The tiles that this thread takes."""
    error, made_up = np.empty((MOST, TILE), np.float32), np.empty(TILE, np.float32)
    rows = word(p, ROWS)
    first = take(p, 0) * TILE
    while first < rows:
        choose_tile(p, first, min(TILE, rows - first), error, made_up)
        first = take(p, 0) * TILE


def choose_columns(
    wanted: Tensor,
    inverse: Tensor,
    scale: Tensor,
    later: Tensor,
    factor: Tensor,
    q: Tensor,
    error: Tensor,
    *,
    limits: tuple[int, int],
) -> None:
    """Write q and errors of S columns of all rows, the last column first; see ``feedback.choose_columns``.

    Args:
        wanted, inverse, scale, later: float32 [S,E], contiguous, S <= 64.
        factor: float32 [S,S], its rows contiguous.
        q, error: float32 [S,E], contiguous; written.
        limits: the least and the largest q.
    """
    columns, rows = wanted.shape
    words = (columns, rows, later.data_ptr(), wanted.data_ptr(), inverse.data_ptr(), scale.data_ptr())
    words += (factor.data_ptr(), factor.stride(0), *limits, q.data_ptr(), error.data_ptr())
    threads = min(torch.get_num_threads(), -(-rows // TILE))
    team.run(choosing().address, array("q", (0, *words)), threads)
