"""Narrow weights (``ops.Narrow``) made wide in one read and one write, for products with many rows of x.

The reference is ``ops.widen``: a number is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from hyaena.ops.cpu import team
from hyaena.ops.cpu.matrices import form_of
from hyaena.ops.cpu.memory import STAMP, TOKENS, function, kernel, take, word
from hyaena.ops.cpu.narrow import COLUMNS, FORMS
from hyaena.ops.cpu.vectors import BYTE, FLOAT, HALF, INT32, INT64, constant, fma, loop, read, rounded, spread, stored
from hyaena.ops.narrow import Narrow

GRAIN = 1 << 15
"""Numbers that a thread widens before it looks for more, about; a second thread is woken for as many."""

# Places of the arguments; 0 counts runs of rows.
ROWS, WIDTH, STEP, CODES, SCALES, MINIMA, TARGET = range(1, 8)


def wide_block(
    builder: ir.IRBuilder,
    form: types.Type,
    row: ir.Value,
    block: ir.Value,
    blocks: ir.Value,
    matrix: Sequence[ir.Value],
) -> ir.Value:
    """The ``COLUMNS`` numbers of a block of a row, of so many blocks, as float32; a NaN among them has few bits set.

    Args:
        builder: of the kernel.
        form: the token of the weights' form.
        row, block, blocks: which, and how many a row has.
        matrix: addresses of codes, scales and minima; those that a form does not have are not read.
    """
    bits, group, has_minima = FORMS[form]
    floats, half = HALF if group else FLOAT, COLUMNS // 2
    kinds = BYTE, floats, floats
    codes, scales, minima = (builder.inttoptr(a, kind.as_pointer()) for a, kind in zip(matrix, kinds, strict=True))
    block = builder.add(builder.mul(row, blocks), block)

    def of_group(address: ir.Value) -> ir.Value:
        place = builder.udiv(block, constant(group, INT64)) if group else row
        found = read(builder, floats, address, place, 1)
        found = builder.fpext(found, FLOAT) if group else found
        unordered = builder.fcmp_unordered("uno", found, found)
        return spread(builder, builder.select(unordered, constant(math.nan, FLOAT), found), COLUMNS)

    wide = ir.VectorType(INT32, COLUMNS)
    if bits == 8:
        place = builder.mul(block, constant(COLUMNS, INT64))
        numbers = builder.sext(read(builder, BYTE, codes, place, COLUMNS), wide)
    else:
        pairs = read(builder, BYTE, codes, builder.mul(block, constant(half, INT64)), half)
        low, high = builder.and_(pairs, constant(15, BYTE, half)), builder.lshr(pairs, constant(4, BYTE, half))
        numbers = builder.zext(builder.shuffle_vector(low, high, ir.Constant(wide, [*range(COLUMNS)])), wide)
        if not has_minima:
            numbers = builder.sub(numbers, constant(8, INT32, COLUMNS))
    values = builder.sitofp(numbers, ir.VectorType(FLOAT, COLUMNS))
    if has_minima:
        return fma(builder, of_group(minima), values, of_group(scales))
    return builder.fmul(values, of_group(scales))


@intrinsic
def write_wide(context, token, form, row, width, codes, scales, minima, target):
    """Write a row of a narrow matrix at these addresses to that row of ``target``, in the token's dtype."""

    def generate(context, builder, signature, arguments):
        _, _, row, width, *matrix, target = arguments
        blocks = builder.udiv(width, constant(COLUMNS, INT64))
        first = builder.mul(row, width)
        target = builder.inttoptr(target, stored(token).as_pointer())

        def body(block: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            values = wide_block(builder, form, row, block, blocks, matrix)
            out = rounded(builder, token, values, ordinary=True)
            there = builder.gep(target, [builder.add(first, builder.mul(block, constant(COLUMNS, INT64)))])
            builder.store(out, builder.bitcast(there, out.type.as_pointer()), align=2)
            return carried

        loop(builder, constant(0, INT64), blocks, 1, [], body)
        return context.get_dummy_value()

    integers = [types.int64] * 6
    return types.void(token, form, *integers), generate


@function
def widen_runs(p, token, form):
    """The runs of rows that this thread takes."""
    rows, step = word(p, ROWS), word(p, STEP)
    first = take(p, 0) * step
    while first < rows:
        for row in range(first, min(first + step, rows)):
            write_wide(
                token, form, row, word(p, WIDTH), word(p, CODES), word(p, SCALES), word(p, MINIMA), word(p, TARGET)
            )
        first = take(p, 0) * step


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def widening(token, form):
    """The kernel that writes numbers of this dtype from weights of this form."""
    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        widen_runs(p, token, form)

    return entry


def widen(layer: Narrow, dtype: torch.dtype, rows: slice) -> Tensor | None:
    """``ops.widen`` of weights on a CPU, on torch's threads; None where the kernel does not take them."""
    form = form_of(layer)
    tensors = [t[rows] for t in layer[:3] if t is not None]
    if form is None or dtype not in TOKENS or not all(t.is_contiguous() and t.device.type == "cpu" for t in tensors):
        return None
    count, width = len(tensors[0]), layer.shape[1]
    y = torch.empty(count, width, dtype=dtype, device="cpu")
    step = max(1, GRAIN // width)
    addresses = [t.data_ptr() for t in tensors] + [0] * (3 - len(tensors))
    words = array("q", (0, count, width, step, *addresses, y.data_ptr()))
    threads = min(torch.get_num_threads(), -(-count // step))
    team.run(widening(TOKENS[dtype], form).address, words, threads)
    return y
