"""Products of few rows with a narrow matrix (``ops.Narrow``): its numbers are widened in registers.

    Σ_d w[d]·x[d] = Σ_g scale[g]·Σ_{d in g} (q[d] - zero)·x[d] + Σ_g minimum[g]·Σ_{d in g} x[d]

The sums of x over groups are formed once for all outputs. Threads take blocks of outputs as in ``products``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hyaena.ops.cpu.memory import FLOAT16, FLOAT32, STAMP, function, hold, kernel, load, store, take, word
from hyaena.ops.cpu.products import (
    BIAS,
    BLOCK,
    OUTPUTS,
    RESIDUAL,
    ROWS,
    WEIGHT,
    WIDTH,
    Y,
    activate,
    finish,
    widen,
)
from hyaena.ops.cpu.vectors import LANES, SUMS, _loop, dot

ROW8, BLOCK8, BLOCK4, AFFINE4 = range(4)
"""Kinds: int8 with a scale per row, 8 bits in groups, 4 bits without and with minima."""

# Places of further arguments, behind those of a product. A gate has another matrix, and no bias and no residual.
KIND, GROUP, SCALE, MINIMUM, UP_SCALE, UP_MINIMUM = range(13, 19)
UP, ACT = BIAS, RESIDUAL

_COLUMNS = 32
_FLOAT, _HALF, _BYTE = ir.FloatType(), ir.HalfType(), ir.IntType(8)
_INT8, _INT32, _INT64 = np.int8(0), ir.IntType(32), ir.IntType(64)


@intrinsic
def _block_sum(context, kind, codes, scales, blocks, per_scale, x):
    """``Σ_b scale·Σ_32 (q - zero)·x`` over blocks of 32 columns; ``per_scale`` neighbouring ones share a scale.

    Args:
        kind: a literal ``BLOCK8``, ``BLOCK4`` or ``AFFINE4``.
        codes, scales: addresses of the row's numbers and of its float16 scales.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None
    form = kind.literal_value

    def generate(_, builder, signature, arguments):
        _, codes, scales, blocks, per_scale, x = arguments
        codes = builder.inttoptr(codes, _BYTE.as_pointer())
        scales = builder.inttoptr(scales, _HALF.as_pointer())
        x = builder.inttoptr(x, _FLOAT.as_pointer())
        bytes_, floats = ir.VectorType(_BYTE, LANES), ir.VectorType(_FLOAT, LANES)
        wide = ir.VectorType(_INT32, LANES)

        def read(base, index, kind):
            place = builder.gep(base, [index], inbounds=True)
            return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)

        def numbers(block):
            """The 32 numbers of a block as two registers of float32."""
            if form == BLOCK8:
                start = builder.mul(block, ir.Constant(_INT64, _COLUMNS))
                both = [read(codes, builder.add(start, ir.Constant(_INT64, LANES * i)), bytes_) for i in range(2)]
                return [builder.sitofp(part, floats) for part in both]
            packed = read(codes, builder.mul(block, ir.Constant(_INT64, LANES)), bytes_)
            low = builder.and_(packed, ir.Constant(bytes_, [15] * LANES))
            high = builder.lshr(packed, ir.Constant(bytes_, [4] * LANES))
            both = [builder.zext(part, wide) for part in (low, high)]
            if form == BLOCK4:
                both = [builder.sub(part, ir.Constant(wide, [8] * LANES)) for part in both]
            return [builder.sitofp(part, floats) for part in both]

        def term(block, value):
            first, second = numbers(block)
            start = builder.mul(block, ir.Constant(_INT64, _COLUMNS))
            x0 = read(x, start, floats)
            x1 = read(x, builder.add(start, ir.Constant(_INT64, LANES)), floats)
            part = builder.fmul(second, x1, flags=("contract",))
            part = builder.fadd(builder.fmul(first, x0, flags=("contract",)), part, flags=("contract",))
            place = builder.gep(scales, [builder.udiv(block, per_scale)], inbounds=True)
            scale = builder.fpext(builder.load(place, align=2), _FLOAT)
            scale = builder.insert_element(ir.Constant(floats, ir.Undefined), scale, ir.Constant(_INT32, 0))
            zeros = ir.Constant(wide, [0] * LANES)
            scale = builder.shuffle_vector(scale, scale, zeros)
            return builder.fadd(value, builder.fmul(part, scale, flags=("contract",)), flags=("contract",))

        zero = ir.Constant(floats, [0.0] * LANES)
        whole = builder.and_(blocks, ir.Constant(_INT64, -SUMS))
        a, b, c, d = _loop(builder, ir.Constant(_INT64, 0), whole, SUMS, [zero] * SUMS, 1, term)
        total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        (total,) = _loop(builder, whole, builder.sub(blocks, whole), 1, [total], 1, term)
        half = LANES
        while half > 1:  # fold the register in halves
            half //= 2
            low, high = (ir.Constant(ir.VectorType(_INT32, half), list(range(s, s + half))) for s in (0, half))
            total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
        return builder.extract_element(total, ir.Constant(_INT32, 0))

    return types.float32(kind, types.int64, types.int64, types.int64, types.int64, types.int64), generate


@function
def row_product(p, codes, scale, minimum, output, x, sums):
    """One output: row ``output`` of the matrix at these addresses, times x at an address."""
    kind, width, group = word(p, KIND), word(p, WIDTH), word(p, GROUP)
    if kind == ROW8:
        return load(FLOAT32, scale, output) * dot(_INT8, codes + output * width, width, x)
    groups, blocks, per_scale = width // group, width // 32, group // 32
    scale += output * groups * 2
    if kind == BLOCK8:
        return _block_sum(1, codes + output * width, scale, blocks, per_scale, x)
    if kind == BLOCK4:
        return _block_sum(2, codes + output * (width // 2), scale, blocks, per_scale, x)
    value = _block_sum(3, codes + output * (width // 2), scale, blocks, per_scale, x)
    return value + dot(FLOAT16, minimum + output * groups * 2, groups, sums)


@function
def sum_groups(p, wide, sums):
    """Sums of x over groups, of all rows."""
    group = word(p, GROUP)
    for i in range(len(sums)):
        total = np.float32(0)
        for k in range(i * group, (i + 1) * group):
            total += wide[k]
        sums[i] = total


@function
def linear_blocks(p, token):
    """``residual + weight·norm(x) + bias`` for the blocks that this thread takes."""
    rows, width, outputs, block = word(p, ROWS), word(p, WIDTH), word(p, OUTPUTS), word(p, BLOCK)
    codes, scale, minimum = word(p, WEIGHT), word(p, SCALE), word(p, MINIMUM)
    first = take(p, 0) * block
    if first >= outputs:
        return
    wide = np.empty(rows * width, np.float32)
    widen(p, token, wide)
    groups = width // word(p, GROUP)
    sums = np.empty(rows * groups, np.float32)
    sum_groups(p, wide, sums)
    x, s = wide.ctypes.data, sums.ctypes.data
    while first < outputs:
        for output in range(first, min(first + block, outputs)):
            for row in range(rows):
                value = row_product(p, codes, scale, minimum, output, x + row * width * 4, s + row * groups * 4)
                finish(p, token, row, output, value)
        first = take(p, 0) * block
    hold(wide)
    hold(sums)


@function
def gate_blocks(p, token):
    """``act(gate·norm(x)) · (up·norm(x))`` for the blocks that this thread takes."""
    rows, width, outputs, block = word(p, ROWS), word(p, WIDTH), word(p, OUTPUTS), word(p, BLOCK)
    gates, scale, minimum = word(p, WEIGHT), word(p, SCALE), word(p, MINIMUM)
    ups, up_scale, up_minimum = word(p, UP), word(p, UP_SCALE), word(p, UP_MINIMUM)
    activation, y = word(p, ACT), word(p, Y)
    first = take(p, 0) * block
    if first >= outputs:
        return
    wide = np.empty(rows * width, np.float32)
    widen(p, token, wide)
    groups = width // word(p, GROUP)
    sums = np.empty(rows * groups, np.float32)
    sum_groups(p, wide, sums)
    x, s = wide.ctypes.data, sums.ctypes.data
    while first < outputs:
        for output in range(first, min(first + block, outputs)):
            for row in range(rows):
                here, there = x + row * width * 4, s + row * groups * 4
                a = row_product(p, gates, scale, minimum, output, here, there)
                b = row_product(p, ups, up_scale, up_minimum, output, here, there)
                store(token, y, row * outputs + output, np.float32(activate(a, activation) * b))
        first = take(p, 0) * block
    hold(wide)
    hold(sums)


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def linear(token):
    """The kernel of a narrow linear layer whose activations are of a dtype."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        linear_blocks(p, token)

    return entry


@lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def gate(token):
    """The kernel of a narrow gate whose activations are of a dtype."""

    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        gate_blocks(p, token)

    return entry
