"""Sums of products with a row of a narrow matrix (``ops.Narrow``), in integers.

    Σ_d w[d]·x[d] = Σ_b scale[b]·step[b]·Σ_{d in b} q[d]·i[d] + Σ_b offset[b]·s[b],   b = blocks of 32 columns

The vector is rounded to integers of 16 bits first, ``x[d] ≈ step[b]·i[d]`` with ``step = max|x|/32767`` in each block:
an error of 2e-5 of x, a hundredth of what rounding to bfloat16 costs. So a product of 16 numbers, with sums of pairs,
is one instruction, and 4 bits need not be widened: four masks turn 16 bits of the weights into four numbers. ``s[b]``
is the sum of the rounded x, and the offset the minimum, or ``-8·scale`` for 4 bits without minima.

The numbers of x lie in the order in which those masks find the weights'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hyaena.ops.cpu.vectors import (
    BYTE,
    FLOAT,
    HALF,
    INT16,
    INT32,
    INT64,
    MANY,
    NEIGHBOURS,
    NEIGHBOURS_OF_FEW,
    constant,
    float_sums,
    fma,
    fold,
    loop,
    pick,
    portion,
    prefetch_ahead,
    read,
    spread,
    stored,
)

COLUMNS = 32
"""Of a block: they share a step of x. A group of weights is one of them or several."""
PANEL = 4
"""Blocks whose 4-bit numbers are read together; what remains of a row is read block by block."""
LARGEST = 32767.0


class Form(NamedTuple):
    """How narrow weights are stored.

    Attributes:
        bits: of a number.
        blocks: that share a scale; 0 for a scale per row, of float32.
        minima: whether a group has a minimum.
    """

    bits: int
    blocks: int
    minima: bool = False


ROW8, BLOCK8, BLOCK4, AFFINE4, WIDE4 = np.int8(0), np.uint8(0), np.int32(0), np.uint32(0), np.int64(0)
"""Tokens of the forms, numbers whose types name them."""

FORMS = {
    types.int8: Form(8, 0),
    types.uint8: Form(8, 1),
    types.int32: Form(4, 1),
    types.uint32: Form(4, 1, minima=True),
    types.int64: Form(4, PANEL, minima=True),
}


class _Vector(NamedTuple):
    """Addresses of a rounded vector's parts, one after another: integers, the steps of all blocks, their sums of x.

    The step of a block stands there once for each of the four lanes of a register that its sums are in.
    """

    integers: ir.Value
    steps: ir.Value
    sums: ir.Value

    @classmethod
    def at(cls, builder: ir.IRBuilder, address: ir.Value, width: ir.Value) -> _Vector:
        steps = builder.add(address, builder.mul(width, constant(2, INT64)))
        sums = builder.add(steps, builder.udiv(width, constant(COLUMNS // 16, INT64)))
        pointers = zip((address, steps, sums), (INT16, FLOAT, FLOAT), strict=True)
        return cls(*(builder.inttoptr(a, kind.as_pointer()) for a, kind in pointers))


def _bytes_of_vector(builder: ir.IRBuilder, form: types.Type, width: ir.Value) -> ir.Value:
    if form not in FORMS:
        return builder.mul(width, constant(4, INT64))
    blocks = builder.udiv(width, constant(COLUMNS, INT64))  # 32·2 + 4·4 + 4 bytes each, and the next one aligned
    return builder.and_(
        builder.add(builder.mul(blocks, constant(84, INT64)), constant(63, INT64)), constant(-64, INT64)
    )


@intrinsic
def is_narrow(context, form):
    """Whether weights of a form are multiplied with a vector that ``round_vector`` has written."""
    return types.boolean(form), lambda context, builder, signature, arguments: ir.Constant(
        ir.IntType(1), int(form in FORMS)
    )


@intrinsic
def bytes_of_vector(context, form, width):
    """Bytes of a vector of so many columns, as ``sums`` takes it for weights of a form."""

    def generate(_, builder, signature, arguments):
        return _bytes_of_vector(builder, form, arguments[1])

    return types.int64(form, types.int64), generate


@intrinsic
def round_vector(context, form, width, x, target):
    """Write ``width`` float32 numbers at x as integers, steps and sums to target, for weights of a form."""
    if form not in FORMS:
        return types.void(form, types.int64, types.int64, types.int64), lambda context, *_: context.get_dummy_value()
    packed = FORMS[form].bits == 4

    def generate(context, builder, signature, arguments):
        _, width, x, target = arguments
        vector = _Vector.at(builder, target, width)
        x = builder.inttoptr(x, FLOAT.as_pointer())

        def block(index: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
            """Round a block: where its integers go unless they are packed, and they."""
            values = read(builder, FLOAT, x, builder.mul(index, constant(COLUMNS, INT64)), COLUMNS)
            wide = ir.VectorType(INT32, COLUMNS)
            sizes = builder.and_(builder.bitcast(values, wide), constant(0x7FFFFFFF, INT32, COLUMNS))
            # the bits of numbers without sign are in the order of the numbers; those of infinity and NaN are above all
            most = fold(builder, sizes, lambda a, b: builder.select(builder.icmp_signed(">", a, b), a, b))
            most = builder.bitcast(most, FLOAT)
            step = builder.fmul(most, constant(1 / LARGEST, FLOAT))
            none = builder.fcmp_ordered("==", most, constant(0.0, FLOAT))
            scale = builder.select(none, constant(0.0, FLOAT), builder.fdiv(constant(LARGEST, FLOAT), most))
            # added to 1.5·2^23 a number is rounded to its last bits, which are the integer's
            shifted = fma(builder, constant(12582912.0, FLOAT, COLUMNS), values, spread(builder, scale, COLUMNS))
            integers = builder.trunc(builder.bitcast(shifted, wide), ir.VectorType(INT16, COLUMNS))
            total = fold(builder, builder.sext(integers, wide), builder.add)
            steps = spread(builder, step, 4)
            place = builder.gep(vector.steps, [builder.mul(index, constant(4, INT64))])
            builder.store(steps, builder.bitcast(place, steps.type.as_pointer()), align=4)
            # through the step: what is not finite stays so
            builder.store(builder.fmul(builder.sitofp(total, FLOAT), step), builder.gep(vector.sums, [index]), align=4)
            return integers

        def write(integers: ir.Value, place: ir.Value) -> None:
            there = builder.bitcast(builder.gep(vector.integers, [place]), integers.type.as_pointer())
            builder.store(integers, there, align=2)

        def panels(count: int):
            def body(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                for i in range(count):
                    integers = block(builder.add(index, constant(i, INT64)))
                    start = builder.mul(index, constant(COLUMNS, INT64))
                    if not packed:
                        write(integers, start)
                        continue
                    for part, first in enumerate((0, 16, 1, 17)):  # of the four masks
                        place = builder.add(start, constant(8 * (part * count + i), INT64))
                        write(pick(builder, integers, range(first, first + 16, 2)), place)
                return carried

            return body

        blocks = builder.udiv(width, constant(COLUMNS, INT64))
        whole = builder.and_(blocks, constant(-PANEL, INT64)) if packed else constant(0, INT64)
        loop(builder, constant(0, INT64), whole, PANEL, [], panels(PANEL))
        loop(builder, whole, blocks, 1, [], panels(1))
        return context.get_dummy_value()

    return types.void(form, types.int64, types.int64, types.int64), generate


def _pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Products of integers of 16 bits, added in pairs of neighbours: LLVM knows an instruction for this pattern."""
    count = a.type.count
    wide = ir.VectorType(INT32, count)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide), flags=("nsw",))
    return builder.add(*(pick(builder, products, range(first, count, 2)) for first in range(2)))


def _add_all(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    values = list(values)
    while len(values) > 1:
        values = [builder.add(*values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def _sums8(
    builder: ir.IRBuilder, form: Form, codes: ir.Value, scales: ir.Value, blocks: ir.Value, vectors: Sequence[_Vector]
) -> list[ir.Value]:
    """8 bits, half a block to a register; two sums, of even and of odd blocks."""
    half = COLUMNS // 2
    lanes = half // 2

    def add(count: int):
        def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            prefetch_ahead(builder, codes, builder.mul(index, constant(COLUMNS, INT64)))
            for i in range(count):
                block = builder.add(index, constant(i, INT64))
                start = builder.mul(block, constant(COLUMNS, INT64))
                places = [builder.add(start, constant(part * half, INT64)) for part in range(2)]
                wide = [
                    builder.sext(read(builder, BYTE, codes, place, half), ir.VectorType(INT16, half))
                    for place in places
                ]
                for row, x in enumerate(vectors):
                    parts = [
                        _pairs(builder, w, read(builder, INT16, x.integers, place, half))
                        for w, place in zip(wide, places, strict=True)
                    ]
                    part = builder.sitofp(_add_all(builder, parts), ir.VectorType(FLOAT, lanes))
                    scale = read(builder, FLOAT, x.steps, builder.mul(block, constant(4, INT64)), 1)
                    if form.blocks:
                        scale = builder.fmul(scale, builder.fpext(read(builder, HALF, scales, block, 1), FLOAT))
                    place = row * 2 + i
                    totals[place] = fma(builder, totals[place], part, spread(builder, scale, lanes))
            return totals

        return body

    whole = builder.and_(blocks, constant(-2, INT64))
    zeros = [constant(0.0, FLOAT, lanes)] * (2 * len(vectors))
    totals = loop(builder, constant(0, INT64), whole, 2, zeros, add(2))
    totals = loop(builder, whole, blocks, 1, totals, add(1))
    return [fold(builder, builder.fadd(*totals[2 * row : 2 * row + 2]), builder.fadd) for row in range(len(vectors))]


def _sums4(
    builder: ir.IRBuilder,
    form: Form,
    codes: ir.Value,
    scales: ir.Value,
    minima: ir.Value,
    blocks: ir.Value,
    vectors: Sequence[_Vector],
) -> list[ir.Value]:
    """4 bits: bits 0…3, 4…7, 8…11 and 12…15 of words of 16 bits, each multiplied with its part of x."""

    def add(count: int):
        words, lanes = 8 * count, 4 * count
        groups = count if form.blocks == 1 else 1

        def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            place = builder.mul(index, constant(COLUMNS // 2, INT64))
            prefetch_ahead(builder, codes, place)
            packed = read(builder, BYTE, codes, place, 2 * words)
            word = builder.bitcast(packed, ir.VectorType(INT16, words))
            low = constant(15, INT16, words)
            shifted = [word, *(builder.lshr(word, constant(bits, INT16, words)) for bits in (4, 8, 12))]
            parts = [builder.and_(part, low) for part in shifted]
            group = index if form.blocks == 1 else builder.udiv(index, constant(form.blocks, INT64))

            def of_groups(address: ir.Value) -> ir.Value:
                found = read(builder, HALF, address, group, groups)
                return builder.fpext(found, FLOAT if groups == 1 else ir.VectorType(FLOAT, groups))

            scale = of_groups(scales)
            spread_scale = (
                spread(builder, scale, lanes)
                if groups == 1
                else pick(builder, scale, [lane // 4 for lane in range(lanes)])
            )
            offset = of_groups(minima) if form.minima else builder.fmul(scale, _eights(scale.type))
            if groups < count:
                offset = spread(builder, offset, count)
            for row, x in enumerate(vectors):
                start = builder.mul(index, constant(COLUMNS, INT64))
                products = [
                    _pairs(
                        builder,
                        part,
                        read(builder, INT16, x.integers, builder.add(start, constant(i * words, INT64)), words),
                    )
                    for i, part in enumerate(parts)
                ]
                total = builder.sitofp(_add_all(builder, products), ir.VectorType(FLOAT, lanes))
                steps = read(builder, FLOAT, x.steps, builder.mul(index, constant(4, INT64)), lanes)
                sums = read(builder, FLOAT, x.sums, index, count)
                main, rest = 2 * row, 2 * row + 1
                totals[main] = fma(builder, totals[main], total, builder.fmul(spread_scale, steps))
                totals[rest] = fma(builder, totals[rest], sums, offset)
            return totals

        return body

    whole = builder.and_(blocks, constant(-PANEL, INT64))
    zeros = [constant(0.0, FLOAT, 4 * PANEL), constant(0.0, FLOAT, PANEL)] * len(vectors)
    panels = loop(builder, constant(0, INT64), whole, PANEL, zeros, add(PANEL))
    totals = [fold(builder, total, builder.fadd) for total in panels]
    rest = [value for _ in vectors for value in (constant(0.0, FLOAT, 4), constant(0.0, FLOAT))]
    rest = loop(builder, whole, blocks, 1, rest, add(1))
    results = []
    for row in range(len(vectors)):
        main, other = rest[2 * row : 2 * row + 2]
        last = builder.fadd(fold(builder, main, builder.fadd), other)
        results.append(builder.fadd(builder.fadd(*totals[2 * row : 2 * row + 2]), last))
    return results


def _eights(kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, -8.0 if kind == FLOAT else [-8.0] * kind.count)


@intrinsic
def neighbours(context, form, rows):
    """Rows of a matrix that ``write_sums`` multiplies with so many vectors, a literal."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    count = _neighbours(form, rows.literal_value)
    return types.int64(form, rows), lambda context, builder, signature, arguments: constant(count, INT64)


def _neighbours(form: types.Type, rows: int) -> int:
    few = 1 if form in FORMS else NEIGHBOURS_OF_FEW
    return NEIGHBOURS if rows == MANY and form not in FORMS else few


@intrinsic
def write_sums(context, form, rows, weights, scales, minima, output, last, width, x, target, stride, ahead, pace):
    """Write ``Σ w[k]·x[k]`` of some rows of a matrix with each of some vectors, float32.

    Args:
        form: the token of the weights' dtype, or of their form where they are narrow.
        rows: vectors, a literal: 1, 2 or ``MANY``.
        weights, scales, minima: addresses of the matrix; those that a form does not have are not read.
        output, last: the first row of ``neighbours``, and the last that there is: it stands in for those behind it.
        width: columns, whole blocks where the weights are narrow.
        x: the address of the vectors, ``bytes_of_vector`` apart: float32, or what ``round_vector`` wrote.
        target, stride: the address of the first vector's sums, and the bytes to those of the next.
        ahead, pace: what is brought to the cache meanwhile, see ``float_sums``; nothing for narrow weights.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    count = rows.literal_value

    def generate(context, builder, signature, arguments):
        _, _, *matrix, output, last, width, x, target, stride, ahead, pace = arguments
        step = _bytes_of_vector(builder, form, width)
        vectors = [builder.add(x, builder.mul(step, constant(i, INT64))) for i in range(count)]
        if form in FORMS:
            sums = _narrow_sums(builder, FORMS[form], matrix, output, width, vectors)
        else:
            size = constant(stored(form).get_abi_size(context.target_data), INT64)
            outputs = [builder.add(output, constant(i, INT64)) for i in range(_neighbours(form, count))]
            outputs = [builder.select(builder.icmp_signed("<", o, last), o, last) for o in outputs]
            rows = [builder.add(matrix[0], builder.mul(builder.mul(o, width), size)) for o in outputs]
            together = float_sums(builder, form, rows, width, vectors, ahead, pace)
            sums = [portion(builder, together, i, count) for i in range(count)]
        for i, value in enumerate(sums):
            place = builder.add(target, builder.mul(stride, constant(i, INT64)))
            builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=4)
        return context.get_dummy_value()

    integers = [types.int64] * 11
    return types.void(form, rows, *integers), generate


def _narrow_sums(
    builder: ir.IRBuilder,
    form: Form,
    matrix: Sequence[ir.Value],
    output: ir.Value,
    width: ir.Value,
    vectors: Sequence[ir.Value],
) -> list[ir.Value]:
    weights, scales, minima = matrix
    columns = width if form.bits == 8 else builder.udiv(width, constant(2, INT64))
    codes = builder.inttoptr(builder.add(weights, builder.mul(output, columns)), BYTE.as_pointer())
    blocks = builder.udiv(width, constant(COLUMNS, INT64))
    rounded = [_Vector.at(builder, vector, width) for vector in vectors]
    if not form.blocks:
        values = _sums8(builder, form, codes, codes, blocks, rounded)
        scale = read(builder, FLOAT, builder.inttoptr(scales, FLOAT.as_pointer()), output, 1)
        return [builder.fmul(value, scale) for value in values]
    groups = builder.udiv(blocks, constant(form.blocks, INT64))
    first = builder.mul(builder.mul(output, groups), constant(2, INT64))
    of_row = [builder.inttoptr(builder.add(a, first), HALF.as_pointer()) for a in (scales, minima)]
    if form.bits == 8:
        return _sums8(builder, form, codes, of_row[0], blocks, rounded)
    return _sums4(builder, form, codes, *of_row, blocks, rounded)
