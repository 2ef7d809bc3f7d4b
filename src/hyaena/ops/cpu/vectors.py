"""The sum of products of a row of weights with a vector, as instructions of wide registers.

A compiler turns the plain loop into one sum of one register's width, whose additions wait for one another: it reads at
half the bandwidth of memory. Four sums hide that, and the weights are still read in the order in which they lie, which
is what processors read ahead.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
"""Numbers of a register: those of AVX-512; LLVM splits what a processor has no registers for."""
SUMS = 4

_FLOAT, _HALF, _BYTE = ir.FloatType(), ir.HalfType(), ir.IntType(8)
_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _stored(token: types.Type) -> ir.Type:
    return {types.float32: _FLOAT, types.uint16: _INT16, types.int16: _HALF, types.int8: _BYTE}[token]


def _read(builder: ir.IRBuilder, token: types.Type, base: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
    """``lanes`` numbers from ``base[index]`` on, as float32; a scalar for one."""
    kind = _stored(token)
    many = (lambda t: ir.VectorType(t, lanes)) if lanes > 1 else (lambda t: t)
    place = builder.gep(base, [index], inbounds=True)
    stored = builder.load(builder.bitcast(place, many(kind).as_pointer()), align=1)
    if token == types.float32:
        return stored
    if token == types.uint16:  # the upper half of a float32
        shift = ir.Constant(many(_INT32), 16 if lanes == 1 else [16] * lanes)
        return builder.bitcast(builder.shl(builder.zext(stored, many(_INT32)), shift), many(_FLOAT))
    if token == types.int8:
        return builder.sitofp(stored, many(_FLOAT))
    return builder.fpext(stored, many(_FLOAT))


def _loop(builder: ir.IRBuilder, start: ir.Value, count: ir.Value, step: int, sums: list, lanes: int, term) -> list:
    """Add ``term(index)`` to the sums while ``index < start + count``, in steps that divide count."""
    before, stop = builder.block, builder.add(start, count)
    body, after = builder.append_basic_block("terms"), builder.append_basic_block("sum")
    builder.cbranch(builder.icmp_signed("<", start, stop), body, after)
    builder.position_at_end(body)
    index = builder.phi(_INT64)
    index.add_incoming(start, before)
    running = []
    for value in sums:
        running.append(builder.phi(value.type))
        running[-1].add_incoming(value, before)
    new = [term(builder.add(index, ir.Constant(_INT64, lanes * i)), value) for i, value in enumerate(running)]
    following = builder.add(index, ir.Constant(_INT64, step))
    index.add_incoming(following, body)
    for phi, value in zip(running, new, strict=True):
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, stop), body, after)
    builder.position_at_end(after)
    results = []
    for value, last in zip(sums, new, strict=True):
        results.append(builder.phi(value.type))
        results[-1].add_incoming(value, before)
        results[-1].add_incoming(last, body)
    return results


@intrinsic
def dot(context, token, weights, width, x):
    """``Σ weights[k]·x[k]`` for ``width`` numbers of the token's dtype and as many float32 numbers, float32.

    The order of summation depends on the width alone.
    """

    def generate(_, builder, signature, arguments):
        _, weights, width, x = arguments
        weights = builder.inttoptr(weights, _stored(token).as_pointer())
        x = builder.inttoptr(x, _FLOAT.as_pointer())

        def term(lanes):
            def add(index, value):
                a, b = _read(builder, token, weights, index, lanes), _read(builder, types.float32, x, index, lanes)
                product = builder.fmul(a, b, flags=("contract",))  # one instruction with the addition
                return builder.fadd(value, product, flags=("contract",))

            return add

        def whole(step):
            return builder.and_(width, ir.Constant(_INT64, -step))

        vector = ir.VectorType(_FLOAT, LANES)
        zero = ir.Constant(vector, [0.0] * LANES)
        start, first = ir.Constant(_INT64, 0), whole(LANES * SUMS)
        a, b, c, d = _loop(builder, start, first, LANES * SUMS, [zero] * SUMS, LANES, term(LANES))
        total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        second = whole(LANES)
        (total,) = _loop(builder, first, builder.sub(second, first), LANES, [total], LANES, term(LANES))
        half = LANES
        while half > 1:  # fold the register in halves
            half //= 2
            low, high = (ir.Constant(ir.VectorType(_INT32, half), list(range(s, s + half))) for s in (0, half))
            total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
        total = builder.extract_element(total, ir.Constant(_INT32, 0))
        (total,) = _loop(builder, second, builder.sub(width, second), 1, [total], 1, term(1))
        return total

    return types.float32(token, types.int64, types.int64, types.int64), generate
