"""Reading and writing memory in compiled kernels: numbers of every dtype become float32, and are rounded once.

A kernel is given addresses. The dtype of the numbers there is a token, a number whose type names it, so that one
function serves all dtypes and is compiled for those in use: ``FLOAT32``, ``BFLOAT16``, ``FLOAT16``, and ``INT8`` for
slots of keys and values with a scale behind them (``ops.slots``).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from hyaena.ops.cpu.vectors import rounded
from hyaena.ops.slots import SCALE_BYTES

FLOAT32, BFLOAT16, FLOAT16, INT8 = np.float32(0), np.uint16(0), np.int16(0), np.int8(0)
TOKENS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
SLOT_TOKENS = {**TOKENS, torch.int8: INT8}
"""Of keys and values."""

STAMP = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
"""Of the source of all kernels. numba looks at the file of a kernel, not at those of the functions that it calls."""

# Sums may be formed in any order and products contracted; which order is fixed when a kernel is compiled, so that a row
# has the same bits on any number of threads and beside any number of other rows. NaN and infinity keep their meaning.
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}

function = njit(**_OPTIONS)
"""Compiled where a kernel calls it."""


def kernel(body: Callable[[int], None]) -> Any:
    """Compile ``body(arguments)``, and keep the result on disk where a user can write; ``address`` is that of the code.

    A body is a closure over tokens and ``STAMP``. What it calls it finds among the globals of its module: functions in
    a closure would count as new ones in every process, and nothing would be found on disk.
    """
    signature = types.void(types.int64)
    try:
        return cfunc(signature, cache=True, **_OPTIONS)(body)
    except Exception:  # no folder that can be written, a full disk, or files that a power failure cut off
        with suppress(Exception):
            FunctionCache(body).flush()  # else what was cut off would be found again by every process
        return cfunc(signature, **_OPTIONS)(body)


_INT8, _INT16, _INT32, _INT64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()


def _place(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index], inbounds=True)


@intrinsic
def load(context, token, address, index):
    """The number at ``address[index]``, as float32."""

    def generate(_, builder, signature, arguments):
        _, address, index = arguments
        if token == types.float32:
            return builder.load(_place(builder, address, index, _FLOAT), align=4)
        if token == types.uint16:  # the upper half of a float32
            bits = builder.zext(builder.load(_place(builder, address, index, _INT16), align=2), _INT32)
            return builder.bitcast(builder.shl(bits, ir.Constant(_INT32, 16)), _FLOAT)
        return builder.fpext(builder.load(_place(builder, address, index, _HALF), align=2), _FLOAT)

    return types.float32(token, types.int64, types.int64), generate


@intrinsic
def store(context, token, address, index, value):
    """Write a float32 to ``address[index]``, rounded to the nearest number, to the even one of two.

    As int8 it must be a whole number that fits.
    """

    def generate(generator, builder, signature, arguments):
        _, address, index, value = arguments
        if token == types.int8:
            builder.store(builder.fptosi(value, _INT8), _place(builder, address, index, _INT8), align=1)
        else:
            number = rounded(builder, token, value)
            builder.store(number, _place(builder, address, index, number.type), align=2)
        return generator.get_dummy_value()

    return types.void(token, types.int64, types.int64, types.float32), generate


@intrinsic
def size(context, token):
    """Bytes of a number."""

    def generate(_, builder, signature, arguments):
        return ir.Constant(_INT64, token.bitwidth // 8)

    return types.int64(token), generate


@intrinsic
def scale_size(context, token):
    """Bytes of the scale behind the numbers of a slot; 0 where they have none."""

    def generate(_, builder, signature, arguments):
        return ir.Constant(_INT64, SCALE_BYTES if token == types.int8 else 0)

    return types.int64(token), generate


@intrinsic
def nearest(context, value):
    """The whole number nearest to a float32, the even one of two."""

    def generate(_, builder, signature, arguments):
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [_FLOAT]), arguments)

    return types.float32(types.float32), generate


@intrinsic
def word(context, address, index):
    """The int64 at ``address[index]``."""

    def generate(_, builder, signature, arguments):
        return builder.load(_place(builder, *arguments, _INT64), align=8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def short_word(context, address, index):
    """The int32 at ``address[index]``, as int64."""

    def generate(_, builder, signature, arguments):
        return builder.sext(builder.load(_place(builder, *arguments, _INT32), align=4), _INT64)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store_word(context, address, index, value):
    """Write an int64 to ``address[index]``."""

    def generate(generator, builder, signature, arguments):
        address, index, value = arguments
        builder.store(value, _place(builder, address, index, _INT64), align=8)
        return generator.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def store_short_word(context, address, index, value):
    """Write an int64 to ``address[index]`` as int32."""

    def generate(generator, builder, signature, arguments):
        address, index, value = arguments
        builder.store(builder.trunc(value, _INT32), _place(builder, address, index, _INT32), align=4)
        return generator.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def store_real(context, address, index, value):
    """Write a float64 to ``address[index]``."""

    def generate(generator, builder, signature, arguments):
        address, index, value = arguments
        builder.store(value, _place(builder, address, index, ir.DoubleType()), align=8)
        return generator.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), generate


@intrinsic
def real(context, address, index):
    """The float64 at ``address[index]``."""

    def generate(_, builder, signature, arguments):
        return builder.load(_place(builder, *arguments, ir.DoubleType()), align=8)

    return types.float64(types.int64, types.int64), generate


@intrinsic
def take(context, address, index):
    """Add 1 to the int64 at ``address[index]`` and return what it was: to each thread another number."""

    def generate(_, builder, signature, arguments):
        return builder.atomic_rmw("add", _place(builder, *arguments, _INT64), ir.Constant(_INT64, 1), "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def rank(context, value):
    """An int32 that orders float32 numbers as they are ordered; NaN without sign is above infinity."""

    def generate(_, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _INT32)
        negative = builder.ashr(bits, ir.Constant(_INT32, 31))
        return builder.xor(bits, builder.and_(negative, ir.Constant(_INT32, 0x7FFFFFFF)))

    return types.int32(types.float32), generate


@intrinsic
def unrank(context, number):
    """The float32 whose rank a number is."""

    def generate(_, builder, signature, arguments):
        negative = builder.ashr(arguments[0], ir.Constant(_INT32, 31))
        return builder.bitcast(
            builder.xor(arguments[0], builder.and_(negative, ir.Constant(_INT32, 0x7FFFFFFF))), _FLOAT
        )

    return types.float32(types.int32), generate


@intrinsic
def inverse(context, value):
    """1/value as float64, for a loop that multiplies by it: a compiler that may reorder would divide each time."""

    def generate(_, builder, signature, arguments):
        fence = builder.module.declare_intrinsic("llvm.arithmetic.fence", [ir.DoubleType()])
        return builder.call(fence, [builder.fdiv(ir.Constant(ir.DoubleType(), 1.0), arguments[0])])

    return types.float64(types.float64), generate


@intrinsic
def power_of_two(context, exponent):
    """2^exponent as float32, for exponents of normal numbers."""

    def generate(_, builder, signature, arguments):
        biased = builder.add(arguments[0], ir.Constant(_INT32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_INT32, 23)), _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def publish(context, address, index, value):
    """Write an int64 to ``address[index]``; who waits for it sees all that was written before."""

    def generate(generator, builder, signature, arguments):
        address, index, value = arguments
        builder.store_atomic(value, _place(builder, address, index, _INT64), "release", 8)
        return generator.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def published(context, address, index):
    """The int64 that another thread may publish at ``address[index]``."""

    def generate(_, builder, signature, arguments):
        return builder.load_atomic(_place(builder, *arguments, _INT64), "acquire", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def call(context, code, argument):
    """Call the compiled ``void(int64)`` at an address."""

    def generate(generator, builder, signature, arguments):
        code, argument = arguments
        kind = ir.FunctionType(ir.VoidType(), [_INT64])
        builder.call(builder.inttoptr(code, kind.as_pointer()), [argument])
        return generator.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def ask(context, code):
    """Call the compiled ``int()`` at an address."""

    def generate(_, builder, signature, arguments):
        kind = ir.FunctionType(_INT32, [])
        return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), []), _INT64)

    return types.int64(types.int64), generate


@function
def hold(array):
    """Keep an array that was used by its address until here: numba frees it after its last mention."""


@function
def _reduced(x):
    """``n`` and ``e^r - 1`` with ``x = n·ln(2) + r``, ``|r| <= ln(2)/2``."""
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return np.int32(n), (p * r) * r + r


@function
def exp(x):
    """e^x for x <= 0, to 2 units in the last place, and 0 below -87; loops over it become vectors.

    ``e^x = 2^n·e^r`` with ``|r| <= ln(2)/2``, and a polynomial for ``e^r``.

    Source: Cephes mathematical library (Moshier 1989), coefficients of expf.
    """
    low = np.float32(-87)
    n, above = _reduced(low if x < low else x)  # NaN stays
    value = (above + np.float32(1)) * power_of_two(n)
    return np.float32(0) if x < low else value


@function
def expm1(x):
    """e^x - 1 for x <= 0, without loss of digits near 0; -1 below -87."""
    low = np.float32(-87)
    n, above = _reduced(low if x < low else x)
    scale = power_of_two(n)
    return above * scale + (scale - np.float32(1))
