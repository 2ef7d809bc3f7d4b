"""Reading keys and values: products of keys with the queries that share them, and sums of values times weights.

Eight sums of a register each run side by side, whatever the number of queries, so that additions do not wait for one
another and a number that was read and widened serves all queries. A sum has one order, whatever the number of queries
and the place of a key among others.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from hyaena.ops.cpu.vectors import (
    FLOAT,
    INT32,
    INT64,
    Body,
    constant,
    fma,
    loop,
    portion,
    read,
    read_wide,
    spread,
    stored,
    vector,
)

LANES = 16 if dict(binding.get_host_cpu_features()).get("avx512f") else 8
"""Numbers of a register."""
SIDE_BY_SIDE = 8
"""Sums."""

_EIGHT = 8
_FOLDS = (([0, 8, 1, 9, 4, 12, 5, 13], 2), ([0, 1, 8, 9, 4, 5, 12, 13], 2), ([0, 1, 2, 3, 8, 9, 10, 11], 4))
"""Places of one half of the lanes of two registers of eight, and how far behind them the other half's are."""


def _fold_eight(builder: ir.IRBuilder, sums: Sequence[ir.Value]) -> list[ir.Value]:
    """The sum of the lanes of each of at most eight registers."""
    count = len(sums)
    if LANES > _EIGHT:
        sums = [builder.fadd(*(portion(builder, total, half, 2) for half in range(2))) for total in sums]
    sums = [*sums, *[constant(0.0, FLOAT, _EIGHT)] * (SIDE_BY_SIDE - count)]
    for places, distance in _FOLDS:
        low, high = (ir.Constant(vector(INT32, _EIGHT), [place + shift for place in places]) for shift in (0, distance))
        sums = [
            builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high))
            for a, b in zip(sums[::2], sums[1::2], strict=True)
        ]
    return [builder.extract_element(sums[0], constant(i, INT32)) for i in range(count)]


def _float_place(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
    """The pointer to ``lanes`` float32 numbers from ``address[index]`` on."""
    place = builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [index], inbounds=True)
    return builder.bitcast(place, vector(FLOAT, lanes).as_pointer())


def _rows(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
    return [builder.add(address, builder.mul(stride, constant(i, INT64))) for i in range(count)]


def _whole(builder: ir.IRBuilder, count: ir.Value, step: int) -> ir.Value:
    return builder.and_(count, constant(-step, INT64))


@intrinsic
def scores(context, token, heads, keys, stride, head_dim, queries, count, out, out_stride):
    """Products of neighbouring keys with the queries of some heads, float32.

    Args:
        token: of the keys.
        heads: a literal, a power of two, at most eight.
        keys: the address of the first of ``count`` keys, ``stride`` bytes apart.
        queries: the address of float32 [heads,head_dim].
        out: the address of the scores of the first head; those of the next are ``out_stride`` bytes further.
    """
    if not isinstance(heads, types.IntegerLiteral):
        return None
    rows = heads.literal_value

    def generate(context, builder, signature, arguments):
        _, _, keys, stride, head_dim, queries, count, out, out_stride = arguments
        size = builder.mul(head_dim, constant(4, INT64))
        of_heads = [builder.inttoptr(q, FLOAT.as_pointer()) for q in _rows(builder, queries, size, rows)]
        outs = _rows(builder, out, out_stride, rows)

        def some(together: int) -> Body:
            def body(t: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                first = builder.add(keys, builder.mul(t, stride))
                pointers = [
                    builder.inttoptr(key, stored(token).as_pointer()) for key in _rows(builder, first, stride, together)
                ]

                def add(lanes: int) -> Body:
                    def term(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                        wide = [read_wide(builder, token, key, index, lanes) for key in pointers]
                        for head, q in enumerate(of_heads):
                            x = read(builder, FLOAT, q, index, lanes)
                            for i, key in enumerate(wide):
                                place = head * together + i
                                totals[place] = fma(builder, totals[place], key, x)
                        return totals

                    return term

                start, whole = constant(0, INT64), _whole(builder, head_dim, LANES)
                zeros = [constant(0.0, FLOAT, LANES)] * (rows * together)
                totals = _fold_eight(builder, loop(builder, start, whole, LANES, zeros, add(LANES)))
                totals = loop(builder, whole, head_dim, 1, totals, add(1))
                for place, total in enumerate(totals):
                    head, i = divmod(place, together)
                    here = builder.add(t, constant(i, INT64))
                    builder.store(total, _float_place(builder, outs[head], here, 1), align=4)
                return carried

            return body

        together = SIDE_BY_SIDE // rows
        whole = _whole(builder, count, together)
        loop(builder, constant(0, INT64), whole, together, [], some(together))
        loop(builder, whole, count, 1, [], some(1))
        return context.get_dummy_value()

    return types.void(token, heads, *[types.int64] * 7), generate


@intrinsic
def mix(context, token, heads, values, stride, head_dim, weights, weights_stride, count, out, out_stride):
    """Add neighbouring values times their weights to the results of some heads, float32.

    Args:
        token: of the values.
        heads: a literal, a power of two, at most eight.
        values: the address of the first of ``count`` values, ``stride`` bytes apart.
        weights: the address of the weights of the first head; those of the next are ``weights_stride`` bytes further.
        out: the address of the result of the first head; that of the next is ``out_stride`` bytes further.
    """
    if not isinstance(heads, types.IntegerLiteral):
        return None
    rows = heads.literal_value

    def generate(context, builder, signature, arguments):
        _, _, values, stride, head_dim, weights, weights_stride, count, out, out_stride = arguments
        of_heads, outs = _rows(builder, weights, weights_stride, rows), _rows(builder, out, out_stride, rows)

        def channels(lanes: int, registers: int) -> Body:
            """So many channels at a time, for all tokens."""

            def body(channel: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                here = [builder.add(channel, constant(lanes * i, INT64)) for i in range(registers)]
                places = [_float_place(builder, o, place, lanes) for o in outs for place in here]

                def term(t: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                    value = builder.add(values, builder.mul(t, stride))
                    value = builder.inttoptr(value, stored(token).as_pointer())
                    wide = [read_wide(builder, token, value, place, lanes) for place in here]
                    for head, address in enumerate(of_heads):
                        weight = builder.load(_float_place(builder, address, t, 1), align=4)
                        weight = weight if lanes == 1 else spread(builder, weight, lanes)
                        for i, v in enumerate(wide):
                            place = head * registers + i
                            totals[place] = fma(builder, totals[place], v, weight)
                    return totals

                before = [builder.load(place, align=4) for place in places]
                after = loop(builder, constant(0, INT64), count, 1, before, term)
                for place, total in zip(places, after, strict=True):
                    builder.store(total, place, align=4)
                return carried

            return body

        registers = SIDE_BY_SIDE // rows
        many, whole = _whole(builder, head_dim, LANES * registers), _whole(builder, head_dim, LANES)
        loop(builder, constant(0, INT64), many, LANES * registers, [], channels(LANES, registers))
        loop(builder, many, whole, LANES, [], channels(LANES, 1))
        loop(builder, whole, head_dim, 1, [], channels(1, 1))
        return context.get_dummy_value()

    return types.void(token, heads, *[types.int64] * 8), generate
