"""Products of many rows with a narrow matrix on processors that multiply tiles of bfloat16 numbers (AMX).

    y[m,e] = Σ_d x[m,d]·w[e,d],   x, w and y rounded to bfloat16, sums in float32

The unit of such processors multiplies a tile of 16 rows and 32 columns of x with one of 32 columns and 16 outputs of
the matrix, in which two neighbouring columns of an output lie side by side. So a thread widens some outputs into that
order, panels of all columns, in its own cache, and multiplies them with every row of x before it takes the next: a
weight is read once, narrow, and never written to memory wide. The reference is the product of ``ops.widen``.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from array import array
from functools import lru_cache

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from hyaena.ops import cpu
from hyaena.ops.cpu import team
from hyaena.ops.cpu.matrices import form_of
from hyaena.ops.cpu.memory import STAMP, function, hold, kernel, take, word
from hyaena.ops.cpu.narrow import COLUMNS
from hyaena.ops.cpu.vectors import BYTE, FLOAT, INT16, INT32, INT64, constant, loop, read, rounded
from hyaena.ops.cpu.widen import wide_block
from hyaena.ops.narrow import Narrow

SIDE = 16
"""Rows of a tile of x, and columns of one of weights."""
TILE_BYTES = 1024
PAIR = 2 * SIDE
"""Rows and outputs that are multiplied together, two tiles each way."""

DEPTH = 256
"""Columns that are multiplied at a time: so much of ``PAIR`` rows of x stays in the first cache for all panels."""

CROWDED = 2048
"""Rows of so many columns begin at one place of the first cache, which holds 12 of them: depth is of no use there."""

SHARED_BYTES = 1 << 20
"""Of panels that share one reading of x: they stay in the second cache of such processors, of 2 MiB."""

# Places of the arguments; 0 counts panels of outputs.
X, ROWS, WIDTH, OUTPUTS, TOGETHER, CODES, SCALES, MINIMA, Y = range(1, 10)


def _tile(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    """An instruction on tiles."""
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    function = builder.module.globals.get(f"llvm.x86.{name}")
    if function is None:
        function = ir.Function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, arguments)


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, BYTE.as_pointer())


def _each_sum(builder: ir.IRBuilder, name: str, sums: ir.Value) -> None:
    """Load or store tiles 0 to 3 at their places in ``sums``."""
    for tile in range(4):
        corner = (tile // 2 * SIDE * PAIR + tile % 2 * SIDE) * 4
        place = builder.add(sums, constant(corner, INT64))
        _tile(builder, name, constant(tile, BYTE), _pointer(builder, place), constant(4 * PAIR, INT64))


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of a square of registers: in each stage, halves of blocks of twice the size change places."""
    size = len(rows)
    step = size // 2
    while step:
        for i in range(size):
            if i & step:
                continue
            a, b = rows[i], rows[i + step]
            low = [j if not j & step else size + j - step for j in range(size)]
            high = [j + step if not j & step else size + j for j in range(size)]
            masks = (ir.Constant(ir.VectorType(INT32, size), mask) for mask in (low, high))
            rows[i], rows[i + step] = (builder.shuffle_vector(a, b, mask) for mask in masks)
        step //= 2
    return rows


@intrinsic
def write_panel(context, form, first, width, codes, scales, minima, target):
    """Widen ``PAIR`` rows of a narrow matrix from ``first`` on into tiles: two for each ``COLUMNS`` columns."""

    def generate(context, builder, signature, arguments):
        _, first, width, codes, scales, minima, target = arguments
        blocks = builder.udiv(width, constant(COLUMNS, INT64))

        def body(block: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            for tile in range(2):
                rows = []
                for i in range(SIDE):
                    row = builder.add(first, constant(tile * SIDE + i, INT64))
                    values = wide_block(builder, form, row, block, blocks, (codes, scales, minima))
                    values = rounded(builder, types.uint16, values, ordinary=True)
                    rows.append(builder.bitcast(values, ir.VectorType(INT32, SIDE)))
                place = builder.add(builder.mul(block, constant(2, INT64)), constant(tile, INT64))
                place = builder.add(target, builder.mul(place, constant(TILE_BYTES, INT64)))
                for i, column in enumerate(_transposed(builder, rows)):
                    there = builder.inttoptr(
                        builder.add(place, constant(4 * SIDE * i, INT64)), column.type.as_pointer()
                    )
                    builder.store(column, there, align=4)
            return carried

        loop(builder, constant(0, INT64), blocks, 1, [], body)
        return context.get_dummy_value()

    return types.void(form, *[types.int64] * 6), generate


@intrinsic
def configure(context, address):
    """Give this thread the tiles that 64 bytes at an address describe."""

    def generate(context, builder, signature, arguments):
        _tile(builder, "ldtilecfg", _pointer(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def release(context):
    """Give the tiles of this thread back."""

    def generate(context, builder, signature, arguments):
        _tile(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def clear(context):
    """Begin sums."""

    def generate(context, builder, signature, arguments):
        for tile in range(4):
            _tile(builder, "tilezero", constant(tile, BYTE))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def resume(context, sums):
    """Go on with sums that ``multiply`` wrote."""

    def generate(context, builder, signature, arguments):
        _each_sum(builder, "tileloadd64", arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def multiply(context, x, stride, panel, blocks, sums):
    """Add the products of ``PAIR`` rows of x with a panel to the sums, and write those, float32 [PAIR,PAIR].

    Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights.
    """

    def generate(context, builder, signature, arguments):
        x, stride, panel, blocks, sums = arguments
        line = constant(4 * SIDE, INT64)

        def body(block: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            here = builder.add(x, builder.mul(block, line))
            weights = builder.add(panel, builder.mul(block, constant(2 * TILE_BYTES, INT64)))
            for i in range(2):
                rows = builder.add(here, builder.mul(stride, constant(i * SIDE, INT64)))
                _tile(builder, "tileloadd64", constant(4 + i, BYTE), _pointer(builder, rows), stride)
                columns = builder.add(weights, constant(i * TILE_BYTES, INT64))
                _tile(builder, "tileloadd64", constant(6 + i, BYTE), _pointer(builder, columns), line)
            for tile in range(4):
                _tile(
                    builder,
                    "tdpbf16ps",
                    constant(tile, BYTE),
                    constant(4 + tile // 2, BYTE),
                    constant(6 + tile % 2, BYTE),
                )
            return carried

        loop(builder, constant(0, INT64), blocks, 1, [], body)
        _each_sum(builder, "tilestored64", sums)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def write_rounded(context, sums, target, outputs):
    """Write float32 [PAIR,PAIR] as bfloat16, a row every so many outputs."""

    def generate(context, builder, signature, arguments):
        sums, target, outputs = arguments
        sums, target = (builder.inttoptr(a, k.as_pointer()) for a, k in ((sums, FLOAT), (target, INT16)))

        def body(row: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            values = read(builder, FLOAT, sums, builder.mul(row, constant(PAIR, INT64)), PAIR)
            out = rounded(builder, types.uint16, values, ordinary=True)
            there = builder.gep(target, [builder.mul(row, outputs)])
            builder.store(out, builder.bitcast(there, out.type.as_pointer()), align=2)
            return carried

        loop(builder, constant(0, INT64), constant(PAIR, INT64), 1, [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@function
def panels(p, form):
    """The panels of outputs that this thread takes. The last rows and outputs are computed with those before them."""
    rows, width, outputs, x, y = word(p, ROWS), word(p, WIDTH), word(p, OUTPUTS), word(p, X), word(p, Y)
    count, together, size = (outputs + PAIR - 1) // PAIR, word(p, TOGETHER), width * PAIR * 2
    depth = DEPTH if width % CROWDED else width
    ticket = take(p, 0) * together
    if ticket >= count:
        return
    room = np.empty(together * size + 64, np.uint8)
    panel = (room.ctypes.data + 63) & -64
    sums = np.empty(together * PAIR * PAIR, np.float32)
    shape = np.zeros(64, np.uint8)
    shape[0] = 1  # the only kind of registers there is
    for tile in range(8):
        shape[16 + 2 * tile], shape[48 + tile] = 4 * SIDE, SIDE  # bytes of a row, and rows
    configure(shape.ctypes.data)
    while ticket < count:
        stop = min(ticket + together, count)
        for i in range(ticket, stop):
            output, place = min(i * PAIR, outputs - PAIR), panel + (i - ticket) * size
            write_panel(form, output, width, word(p, CODES), word(p, SCALES), word(p, MINIMA), place)
        for start in range(0, rows, PAIR):
            first = min(start, rows - PAIR)
            for column in range(0, width, depth):
                blocks = min(depth, width - column) // COLUMNS
                for i in range(stop - ticket):
                    there = sums.ctypes.data + i * PAIR * PAIR * 4
                    if column:
                        resume(there)
                    else:
                        clear()
                    weights = panel + i * size + column * PAIR * 2
                    multiply(x + (first * width + column) * 2, width * 2, weights, blocks, there)
            for i in range(stop - ticket):
                output = min((ticket + i) * PAIR, outputs - PAIR)
                write_rounded(sums.ctypes.data + i * PAIR * PAIR * 4, y + 2 * (first * outputs + output), outputs)
        ticket = take(p, 0) * together
    release()
    hold(room)
    hold(sums)
    hold(shape)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def product(form):
    """The kernel for weights of this form."""
    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        panels(p, form)

    return entry


@functools.cache
def _permitted() -> bool:
    """Ask the system for the registers of tiles, which it keeps only for processes that want them; whether it does."""
    if not cpu.multiplies_tiles() or sys.platform != "linux":
        return False
    request, permission, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM
    return ctypes.CDLL(None).syscall(request, permission, tile_data) == 0


def many_rows(x: Tensor, layer: Narrow) -> Tensor | None:
    """``weight·x``: x [...,D] -> [...,E], without bias, on torch's threads; None where tiles do not serve."""
    form, (outputs, width) = form_of(layer), layer.shape
    x, rows = x.contiguous(), x.numel() // width
    tensors = [t for t in layer[:3] if t is not None]
    whole = all(t.is_contiguous() for t in tensors)
    if x.dtype != torch.bfloat16 or form is None or not whole or min(rows, outputs) < PAIR or not _permitted():
        return None
    y = x.new_empty(*x.shape[:-1], outputs)
    addresses = [t.data_ptr() for t in tensors] + [0] * (3 - len(tensors))
    threads, panels = torch.get_num_threads(), -(-outputs // PAIR)
    together = max(1, min(SHARED_BYTES // (2 * PAIR * width), panels // (2 * threads)))
    words = array("q", (0, x.data_ptr(), rows, width, outputs, together, *addresses, y.data_ptr()))
    team.run(product(form).address, words, min(threads, -(-panels // together)))
    return y
