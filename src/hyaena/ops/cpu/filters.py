"""The filters of a Hyena step, as instructions of wide registers: neighbouring channels together.

Every channel has numbers of its own, which lie side by side: the taps of its short filter and the window that they are
multiplied with, the modes of its long filter and their state. A register holds those of several channels, or several
of one, and what a channel sums up is folded within it. The order of a sum depends on the filter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hyaena.ops.cpu.vectors import (
    FLOAT,
    INT32,
    INT64,
    LANES,
    Body,
    bring_line,
    constant,
    fma,
    fold,
    fold_each,
    gathered,
    lanes_of,
    loop,
    pick,
    read,
    read_wide,
    rounded,
    some_of,
    spread,
    stored,
    vector,
    write,
)

CHANNELS = 4
"""Of a long filter that are computed together: their sums are folded in one."""


def _every(builder: ir.IRBuilder, value: ir.Value, first: int, step: int) -> ir.Value:
    return some_of(builder, value, range(first, lanes_of(value), step))


def _beside(builder: ir.IRBuilder, before: ir.Value, last: ir.Value, channels: int) -> ir.Value:
    """For each channel its share of ``before``, and then its one number of ``last``."""
    held = lanes_of(before) // channels
    total = channels * (held + 1)
    first = some_of(builder, before, [min(i, channels * held - 1) for i in range(total)])
    second = some_of(builder, last, [min(i, channels - 1) for i in range(total)])
    places = [total + c if k == held else c * held + k for c in range(channels) for k in range(held + 1)]
    return builder.shuffle_vector(first, second, ir.Constant(vector(INT32, total), places))


def _without_first(builder: ir.IRBuilder, line: ir.Value, length: int) -> ir.Value:
    """What ``_beside`` returned, without the first number of each channel."""
    return some_of(builder, line, [i for i in range(lanes_of(line)) if i % length])


AHEAD = 1024
"""Numbers of a state that lie between what is read and what is brought to the cache meanwhile."""


@intrinsic
def short_filters(context, token, short_token, taps, inputs, weights, bias, windows, count, out):
    """Short filters of ``count`` neighbouring channels, ``Σ w[k]·x[t-T+1+k] + bias``, whose windows move on; float32.

    Args:
        token, short_token: of inputs, weights and bias, and of the windows.
        taps: T, a literal; a window holds the T-1 inputs before, oldest first.
        inputs, weights, bias, windows: addresses [C], [C,T], [C] or 0, [C,T-1].
        out: the address of float32 [C].
    """
    if not isinstance(taps, types.IntegerLiteral):
        return None
    length = taps.literal_value
    held = length - 1

    def generate(context, builder, signature, arguments):
        _, _, _, inputs, weights, bias, windows, count, out = arguments
        x, w, b = (builder.inttoptr(a, stored(token).as_pointer()) for a in (inputs, weights, bias))
        window = builder.inttoptr(windows, stored(short_token).as_pointer())
        result = builder.inttoptr(out, FLOAT.as_pointer())

        def some(channels: int, biased: bool) -> Body:
            lanes = channels * length

            def body(channel: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                place = builder.mul(channel, constant(held, INT64))
                line = numbers = read_wide(builder, token, x, channel, channels)
                if held:
                    bring_line(builder, builder.gep(window, [builder.add(place, constant(AHEAD, INT64))]))
                    before = read_wide(builder, short_token, window, place, channels * held)
                    line = _beside(builder, before, numbers, channels)
                first = builder.mul(channel, constant(length, INT64))
                products = builder.fmul(line, read_wide(builder, token, w, first, lanes))
                terms = [_every(builder, products, k, length) for k in range(length)]
                if biased:
                    terms.append(read_wide(builder, token, b, channel, channels))
                write(builder, reduce(builder.fadd, terms), result, channel)
                if held:
                    later = _without_first(builder, line, length)
                    write(builder, rounded(builder, short_token, later), window, place)
                return carried

            return body

        def all_channels(biased: bool) -> None:
            together = max(1, LANES // length)
            whole = builder.mul(builder.udiv(count, constant(together, INT64)), constant(together, INT64))
            loop(builder, constant(0, INT64), whole, together, [], some(together, biased))
            loop(builder, whole, count, 1, [], some(1, biased))

        with builder.if_else(builder.icmp_signed("!=", bias, constant(0, INT64))) as (given, missing):
            with given:
                all_channels(True)
            with missing:
                all_channels(False)
        return context.get_dummy_value()

    return types.void(token, short_token, taps, *[types.int64] * 6), generate


@intrinsic
def complex_filters(context, poles, residues, state, modes, shared, first, count, inputs, out):
    """``s = p·s + x`` and ``Re Σ R·s`` over the complex modes of ``count`` neighbouring channels, float32.

    Args:
        poles, residues: addresses of complex64 [F,modes]; ``shared`` neighbouring channels have the same.
        state: the address of complex64 [C,modes], from the channel ``first`` on.
        inputs, out: addresses of float32 [C], from that channel on.
    """

    def generate(context, builder, signature, arguments):
        poles, residues, state, modes, shared, first, count, inputs, out = (
            arguments[i] if i in (3, 4, 5, 6) else builder.inttoptr(arguments[i], FLOAT.as_pointer()) for i in range(9)
        )
        width = builder.mul(modes, constant(2, INT64))

        def some(channels: int) -> Body:
            def body(channel: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                here = [builder.add(channel, constant(i, INT64)) for i in range(channels)]
                filters = [builder.udiv(builder.add(first, c), shared) for c in here]
                numbers = [builder.mul(f, width) for f in filters]
                places = [builder.mul(c, width) for c in here]
                given = [read(builder, FLOAT, inputs, c, 1) for c in here]

                def terms(lanes: int) -> Body:
                    even = [i - i % 2 for i in range(lanes)]
                    signs = ir.Constant(vector(FLOAT, lanes), [1.0, -1.0] * (lanes // 2))
                    nothing = constant(0.0, FLOAT, lanes)
                    real = ir.Constant(vector(INT32, lanes), [lanes * (i % 2) + i for i in range(lanes)])

                    def add(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                        results = []
                        for total, number, place, x in zip(totals, numbers, places, given, strict=True):
                            bring_line(builder, builder.gep(state, [builder.add(place, constant(AHEAD, INT64))]))
                            pole = read(builder, FLOAT, poles, builder.add(number, index), lanes)
                            residue = read(builder, FLOAT, residues, builder.add(number, index), lanes)
                            at = builder.add(place, index)
                            s = read(builder, FLOAT, state, at, lanes)
                            x = builder.shuffle_vector(spread(builder, x, lanes), nothing, real)
                            turned = builder.fmul(
                                pick(builder, pole, [i + 1 for i in even]),
                                pick(builder, s, [i ^ 1 for i in range(lanes)]),
                            )
                            new = fma(builder, x, pick(builder, pole, even), s)
                            new = builder.fsub(new, builder.fmul(turned, signs))
                            write(builder, new, state, at)
                            results.append(fma(builder, total, new, builder.fmul(residue, signs)))
                        return results

                    return add

                start, whole = constant(0, INT64), builder.and_(width, constant(-LANES, INT64))
                wide = loop(builder, start, whole, LANES, [constant(0.0, FLOAT, LANES)] * channels, terms(LANES))
                rest = loop(builder, whole, width, 2, [constant(0.0, FLOAT, 2)] * channels, terms(2))
                others = gathered(builder, [fold(builder, total, builder.fadd) for total in rest])
                total = builder.fadd(fold_each(builder, wide), others)
                write(builder, total, out, channel)
                return carried

            return body

        whole = builder.and_(count, constant(-CHANNELS, INT64))
        loop(builder, constant(0, INT64), whole, CHANNELS, [], some(CHANNELS))
        loop(builder, whole, count, 1, [], some(1))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate
