"""Read memory as fast as this package's kernels can: what the bandwidth of a machine is measured with."""

from __future__ import annotations

from array import array
from functools import cache, reduce

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from hyaena.ops.cpu import team
from hyaena.ops.cpu.memory import FLOAT32, STAMP, function, kernel, store, take, word
from hyaena.ops.cpu.vectors import FLOAT, INT64, LANES, constant, fma, fold, loop, read

BLOCK = 1 << 14
"""Numbers that a thread takes together."""
SIDE_BY_SIDE = 4
"""Sums of a register each, whose additions do not wait for one another."""


@intrinsic
def squares(context, address):
    """The sum of the squares of ``BLOCK`` float32 numbers at an address."""

    def generate(_, builder, signature, arguments):
        numbers = builder.inttoptr(arguments[0], FLOAT.as_pointer())

        def add(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            places = [builder.add(index, constant(i * LANES, INT64)) for i in range(SIDE_BY_SIDE)]
            found = [read(builder, FLOAT, numbers, place, LANES) for place in places]
            return [fma(builder, total, value, value) for total, value in zip(totals, found, strict=True)]

        zeros = [constant(0.0, FLOAT, LANES)] * SIDE_BY_SIDE
        totals = loop(builder, constant(0, INT64), constant(BLOCK, INT64), LANES * SIDE_BY_SIDE, zeros, add)
        return fold(builder, reduce(builder.fadd, totals), builder.fadd)

    return types.float32(types.int64), generate


@function
def read_blocks(p):
    """The sum of squares of each block: after their counter come their number, their address, and that of the sums."""
    while True:
        block = take(p, 0)
        if block >= word(p, 1):
            return
        start = word(p, 2) + block * BLOCK * 4
        store(FLOAT32, word(p, 3), block, squares(start))


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
    sums = torch.empty(x.numel() // BLOCK, dtype=torch.float32, device="cpu")
    team.run(_kernel().address, array("q", (0, len(sums), x.data_ptr(), sums.data_ptr())), torch.get_num_threads())
    return sums
