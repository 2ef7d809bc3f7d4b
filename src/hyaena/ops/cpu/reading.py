"""Read memory as fast as this package's kernels can: what the bandwidth of a machine is measured with."""

from __future__ import annotations

from array import array
from functools import cache

import torch
from torch import Tensor

from hyaena.ops.cpu import team
from hyaena.ops.cpu.memory import FLOAT32, STAMP, function, kernel, store, take, word
from hyaena.ops.cpu.vectors import dot

BLOCK = 1 << 14
"""Numbers that a thread takes together."""


@function
def read_blocks(p):
    """The sum of squares of each block: after their counter come their number, their address, and that of the sums."""
    while True:
        block = take(p, 0)
        if block >= word(p, 1):
            return
        start = word(p, 2) + block * BLOCK * 4
        store(FLOAT32, word(p, 3), block, dot(FLOAT32, start, BLOCK, start))


@cache
def _kernel():
    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        read_blocks(p)

    return entry


def sums_of_squares(x: Tensor) -> Tensor:
    """Read float32 numbers once, on torch's threads: the sums of squares of blocks of ``BLOCK``, of whole blocks."""
    sums = torch.empty(x.numel() // BLOCK, device="cpu")
    team.run(_kernel().address, array("q", (0, len(sums), x.data_ptr(), sums.data_ptr())), torch.get_num_threads())
    return sums
