"""Narrow weights (``ops.Narrow``) made wide in one read and one write, for products with many rows of x.

The reference is ``ops.widen``: a number is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from array import array
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
from hyaena.ops.cpu.vectors import BYTE, FLOAT, HALF, INT32, INT64, constant, fma, loop, read, rounded, spread
from hyaena.ops.narrow import Narrow

GRAIN = 1 << 15
"""Numbers that a thread widens before it looks for more, about; a second thread is woken for as many."""

# Places of the arguments; 0 counts runs of rows.
ROWS, WIDTH, STEP, CODES, SCALES, MINIMA, TARGET = range(1, 8)


@intrinsic
def write_wide(context, token, form, row, width, codes, scales, minima, target):
    """Write a row of a narrow matrix at these addresses to that row of ``target``, in the token's dtype."""
    bits, blocks, has_minima = FORMS[form]
    half = COLUMNS // 2

    def generate(context, builder, signature, arguments):
        _, _, row, width, *addresses = arguments
        floats = HALF if blocks else FLOAT
        kinds = BYTE, floats, floats, rounded(builder, token, constant(0.0, FLOAT)).type
        codes, scales, minima, target = (
            builder.inttoptr(address, kind.as_pointer()) for address, kind in zip(addresses, kinds, strict=True)
        )
        per_row = builder.udiv(width, constant(COLUMNS, INT64))
        first = builder.mul(row, per_row)

        def of_group(address: ir.Value, block: ir.Value) -> ir.Value:
            group = builder.udiv(block, constant(blocks, INT64)) if blocks else row
            found = read(builder, floats, address, group, 1)
            found = builder.fpext(found, FLOAT) if blocks else found
            unordered = builder.fcmp_unordered("uno", found, found)  # then all products are NaN, none is looked at
            return spread(builder, builder.select(unordered, constant(math.nan, FLOAT), found), COLUMNS)

        def body(block: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            place = builder.mul(block, constant(COLUMNS, INT64))
            if bits == 8:
                numbers = builder.sext(read(builder, BYTE, codes, place, COLUMNS), ir.VectorType(INT32, COLUMNS))
            else:
                pairs = read(builder, BYTE, codes, builder.mul(block, constant(half, INT64)), half)
                low, high = builder.and_(pairs, constant(15, BYTE, half)), builder.lshr(pairs, constant(4, BYTE, half))
                both = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(INT32, COLUMNS), [*range(COLUMNS)]))
                numbers = builder.zext(both, ir.VectorType(INT32, COLUMNS))
                if not has_minima:
                    numbers = builder.sub(numbers, constant(8, INT32, COLUMNS))
            values = builder.sitofp(numbers, ir.VectorType(FLOAT, COLUMNS))
            if has_minima:
                values = fma(builder, of_group(minima, block), values, of_group(scales, block))
            else:
                values = builder.fmul(values, of_group(scales, block))
            out = rounded(builder, token, values, ordinary=True)
            there = builder.gep(target, [place])
            builder.store(out, builder.bitcast(there, out.type.as_pointer()), align=2)
            return carried

        loop(builder, first, builder.add(first, per_row), 1, [], body)
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
