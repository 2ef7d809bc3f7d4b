"""Reading keys and values: products of keys with the queries that share them, and sums of values times weights.

Several sums of a register each run side by side, so that additions do not wait for one another, and a number that was
read and widened serves all queries. A sum has one order, whatever the number of queries and the place of a key among
others. What is read next is brought to the cache meanwhile.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from hyaena.ops.cpu.vectors import (
    FLOAT,
    INT64,
    Body,
    constant,
    fma,
    fold_each,
    gathered,
    loop,
    prefetch_line,
    read,
    read_wide,
    some_of,
    spread,
    stored,
    vector,
)

LANES = 16 if dict(binding.get_host_cpu_features()).get("avx512f") else 8
"""Numbers of a register."""
SIDE_BY_SIDE = 8
"""Sums, and of scores as many as a register has numbers, if those are more: they are folded into one."""


def _float_place(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
    """The pointer to ``lanes`` float32 numbers from ``address[index]`` on."""
    place = builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [index], inbounds=True)
    return builder.bitcast(place, vector(FLOAT, lanes).as_pointer())


def _rows(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
    return [builder.add(address, builder.mul(stride, constant(i, INT64))) for i in range(count)]


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def _whole(builder: ir.IRBuilder, count: ir.Value, step: int) -> ir.Value:
    return builder.and_(count, constant(-step, INT64))


@intrinsic
def scores(context, token, heads, keys, stride, head_dim, queries, count, out, out_stride, beside):
    """Products of neighbouring keys with the queries of some heads, float32.

    Args:
        token: of the keys.
        heads: a literal, ``SIDE_BY_SIDE`` at most.
        keys: the address of the first of ``count`` keys, ``stride`` bytes apart.
        queries: the address of float32 [heads,head_dim].
        out: the address of the scores of the first head; those of the next are ``out_stride`` bytes further.
        beside: what is as far behind this address as a key is behind the first is brought to the cache meanwhile.
    """
    if not isinstance(heads, types.IntegerLiteral):
        return None
    rows = heads.literal_value

    def generate(context, builder, signature, arguments):
        _, _, keys, stride, head_dim, queries, count, out, out_stride, beside = arguments
        size = builder.mul(head_dim, constant(4, INT64))
        of_heads = [builder.inttoptr(q, FLOAT.as_pointer()) for q in _rows(builder, queries, size, rows)]
        outs = _rows(builder, out, out_stride, rows)

        def some(together: int) -> Body:
            places = [(head, i) for head in range(rows) for i in range(together)]
            unused = [None] * (_power(len(places)) - len(places))  # what is folded together is 1, 2, 4, … sums

            def body(t: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                first = builder.add(keys, builder.mul(t, stride))
                pointers = [
                    builder.inttoptr(key, stored(token).as_pointer()) for key in _rows(builder, first, stride, together)
                ]

                there = builder.add(beside, builder.mul(t, stride))
                others = [
                    builder.inttoptr(place, stored(token).as_pointer())
                    for place in _rows(builder, there, stride, together)
                ]

                def add(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                    for other in others:
                        prefetch_line(builder, builder.gep(other, [index]))
                    wide = [read_wide(builder, token, key, index, LANES) for key in pointers]
                    xs = [read(builder, FLOAT, q, index, LANES) for q in of_heads]
                    return [
                        fma(builder, total, wide[i], xs[head]) for total, (head, i) in zip(totals, places, strict=True)
                    ]

                def last(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                    wide = [read_wide(builder, token, key, index, 1) for key in pointers]
                    xs = [read(builder, FLOAT, q, index, 1) for q in of_heads]
                    a = [wide[i] for _, i in places] + [wide[0] for _ in unused]
                    b = [xs[head] for head, _ in places] + [xs[0] for _ in unused]
                    return [fma(builder, totals[0], gathered(builder, a), gathered(builder, b))]

                start, whole, zero = constant(0, INT64), _whole(builder, head_dim, LANES), constant(0.0, FLOAT, LANES)
                totals = loop(builder, start, whole, LANES, [zero for _ in places], add)
                totals = fold_each(builder, [*totals, *(zero for _ in unused)])
                totals = loop(builder, whole, head_dim, 1, [totals], last)[0]
                for head, there in enumerate(outs):
                    value = some_of(builder, totals, range(head * together, (head + 1) * together))
                    builder.store(value, _float_place(builder, there, t, together), align=4)
                return carried

            return body

        together = min(SIDE_BY_SIDE, max(SIDE_BY_SIDE, LANES) // _power(rows))
        whole = _whole(builder, count, together)
        loop(builder, constant(0, INT64), whole, together, [], some(together))
        loop(builder, whole, count, 1, [], some(1))
        return context.get_dummy_value()

    return types.void(token, heads, *[types.int64] * 8), generate


@intrinsic
def mix(context, token, heads, values, stride, head_dim, weights, weights_stride, count, out, out_stride, beside):
    """Add neighbouring values times their weights to the results of some heads, float32.

    Args:
        token: of the values.
        heads: a literal, ``SIDE_BY_SIDE`` at most.
        values: the address of the first of ``count`` values, ``stride`` bytes apart.
        weights: the address of the weights of the first head; those of the next are ``weights_stride`` bytes further.
        out: the address of the result of the first head; that of the next is ``out_stride`` bytes further.
        beside: what is as far behind this address as a value is behind the first is brought to the cache meanwhile.
    """
    if not isinstance(heads, types.IntegerLiteral):
        return None
    rows = heads.literal_value

    def generate(context, builder, signature, arguments):
        _, _, values, stride, head_dim, weights, weights_stride, count, out, out_stride, beside = arguments
        of_heads, outs = _rows(builder, weights, weights_stride, rows), _rows(builder, out, out_stride, rows)

        def channels(lanes: int, registers: int) -> Body:
            """So many channels at a time, for all tokens."""

            def body(channel: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                here = [builder.add(channel, constant(lanes * i, INT64)) for i in range(registers)]
                places = [_float_place(builder, o, place, lanes) for o in outs for place in here]

                def term(t: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                    value = builder.add(values, builder.mul(t, stride))
                    value = builder.inttoptr(value, stored(token).as_pointer())
                    other = builder.add(beside, builder.mul(t, stride))
                    other = builder.inttoptr(other, stored(token).as_pointer())
                    for place in here if lanes > 1 else ():
                        prefetch_line(builder, builder.gep(other, [place]))
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

    return types.void(token, heads, *[types.int64] * 9), generate
