"""Sums of products of a row of weights with vectors, as instructions of wide registers, and what they are built of.

A compiler turns the plain loop into one sum of one register's width, whose additions wait for one another: it reads at
half the bandwidth of memory. Several sums hide that, and the weights are still read in the order in which they lie,
which is what processors read ahead. Several vectors share one reading and widening of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
"""Numbers of a register: those of AVX-512; LLVM splits what a processor has no registers for."""
SUMS = 2

FLOAT, HALF, BYTE = ir.FloatType(), ir.HalfType(), ir.IntType(8)
INT16, INT32, INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
FUSED = ("contract",)  # a product and an addition become one instruction

Body = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]


def vector(kind: ir.Type, lanes: int) -> ir.Type:
    """The type of so many numbers; a scalar's for one."""
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def constant(value: float, kind: ir.Type, lanes: int = 1) -> ir.Constant:
    """A number in every place of a register."""
    return ir.Constant(vector(kind, lanes), value if lanes == 1 else [value] * lanes)


def read(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
    """``lanes`` numbers from the pointer ``address[index]`` on."""
    place = builder.gep(address, [index], inbounds=True)
    return builder.load(builder.bitcast(place, vector(kind, lanes).as_pointer()), align=1)


def stored(token: types.Type) -> ir.Type:
    """How numbers of a token lie in memory."""
    return {types.float32: FLOAT, types.uint16: INT16, types.int16: HALF, types.int8: BYTE}[token]


def read_wide(builder: ir.IRBuilder, token: types.Type, address: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
    """``lanes`` numbers of a token from ``address[index]`` on, as float32."""
    found, floats = read(builder, stored(token), address, index, lanes), vector(FLOAT, lanes)
    if token == types.float32:
        return found
    if token == types.uint16:  # the upper half of a float32
        wide = builder.zext(found, vector(INT32, lanes))
        return builder.bitcast(builder.shl(wide, constant(16, INT32, lanes)), floats)
    return builder.sitofp(found, floats) if token == types.int8 else builder.fpext(found, floats)


def spread(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every place of a register."""
    one = builder.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value, constant(0, INT32))
    return builder.shuffle_vector(one, one, constant(0, INT32, lanes))


def pick(builder: ir.IRBuilder, value: ir.Value, places: Sequence[int]) -> ir.Value:
    """The numbers of a register at these places."""
    return builder.shuffle_vector(value, value, ir.Constant(vector(INT32, len(places)), list(places)))


def fold(builder: ir.IRBuilder, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """All numbers of a register combined, in halves."""
    half = value.type.count
    while half > 2:
        half //= 2
        value = combine(pick(builder, value, range(half)), pick(builder, value, range(half, 2 * half)))
    return combine(*(builder.extract_element(value, constant(i, INT32)) for i in range(2)))


def fma(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """``total + a·b``."""
    return builder.fadd(total, builder.fmul(a, b, flags=FUSED), flags=FUSED)


def loop(
    builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, carried: Sequence[ir.Value], body: Body
) -> list[ir.Value]:
    """``carried = body(index, carried)`` for index = start, start + step, … while it is below stop."""
    before = builder.block
    inside, after = builder.append_basic_block("terms"), builder.append_basic_block("sum")
    builder.cbranch(builder.icmp_signed("<", start, stop), inside, after)
    builder.position_at_end(inside)
    index = builder.phi(INT64)
    index.add_incoming(start, before)
    running = [builder.phi(value.type) for value in carried]
    new = body(index, list(running))
    following = builder.add(index, constant(step, INT64))
    last = builder.block  # a body may hold loops of its own
    index.add_incoming(following, last)
    for phi, value, result in zip(running, carried, new, strict=True):
        phi.add_incoming(value, before)
        phi.add_incoming(result, last)
    builder.cbranch(builder.icmp_signed("<", following, stop), inside, after)
    builder.position_at_end(after)
    results = []
    for value, result in zip(carried, new, strict=True):
        results.append(builder.phi(value.type))
        results[-1].add_incoming(value, before)
        results[-1].add_incoming(result, last)
    return results


def float_sums(
    builder: ir.IRBuilder, token: types.Type, weights: ir.Value, width: ir.Value, vectors: Sequence[ir.Value]
) -> list[ir.Value]:
    """``Σ weights[k]·x[k]`` for ``width`` numbers at an address, with each of the float32 vectors at addresses.

    The order of summation depends on the width alone.
    """
    weights = builder.inttoptr(weights, stored(token).as_pointer())
    pointers = [builder.inttoptr(x, FLOAT.as_pointer()) for x in vectors]
    rows = len(pointers)

    def add(lanes: int, sums: int) -> Body:
        def body(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            for i in range(sums):
                here = builder.add(index, constant(lanes * i, INT64))
                a = read_wide(builder, token, weights, here, lanes)
                for row, x in enumerate(pointers):
                    b = read(builder, FLOAT, x, here, lanes)
                    totals[row * sums + i] = fma(builder, totals[row * sums + i], a, b)
            return totals

        return body

    def whole(step: int) -> ir.Value:
        return builder.and_(width, constant(-step, INT64))

    start, first, second = constant(0, INT64), whole(LANES * SUMS), whole(LANES)
    zeros = [constant(0.0, FLOAT, LANES)] * (SUMS * rows)
    totals = loop(builder, start, first, LANES * SUMS, zeros, add(LANES, SUMS))
    totals = [builder.fadd(totals[row * SUMS], totals[row * SUMS + 1]) for row in range(rows)]
    totals = loop(builder, first, second, LANES, totals, add(LANES, 1))
    totals = [fold(builder, total, builder.fadd) for total in totals]
    return loop(builder, second, width, 1, totals, add(1, 1))


@intrinsic
def dot(context, token, weights, width, x):
    """``Σ weights[k]·x[k]`` for ``width`` numbers of the token's dtype and as many float32 numbers, float32."""

    def generate(_, builder, signature, arguments):
        _, weights, width, x = arguments
        return float_sums(builder, token, weights, width, [x])[0]

    return types.float32(token, types.int64, types.int64, types.int64), generate
