"""The filters of a Hyena step, as instructions of wide registers: neighbouring channels together.

Every channel has numbers of its own, which lie side by side: the taps of its short filter and the window that they are
multiplied with, the modes of its long filter and their state. A register holds those of several channels, or several
of one, and what a channel sums up is folded within it. The order of a sum depends on the filter alone.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hyaena.ops.cpu.vectors import (
    FLOAT,
    INT32,
    INT64,
    LANES,
    Body,
    constant,
    fma,
    fold,
    fold_each,
    gathered,
    lanes_of,
    loop,
    pick,
    prefetch_line,
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
MOST_TAPS = 1024
"""Of a short filter: a channel's lie in one register, and twice as many take four times as long to compile."""
AHEAD = 1024
"""Numbers of a state that lie between what is read and what is brought to the cache meanwhile."""


def _beside(builder: ir.IRBuilder, before: ir.Value, last: ir.Value, channels: int) -> ir.Value:
    """For each channel its share of ``before``, and then its one number of ``last``."""
    held = lanes_of(before) // channels
    total = channels * (held + 1)
    first = some_of(builder, before, [min(i, channels * held - 1) for i in range(total)])
    second = some_of(builder, last, [min(i, channels - 1) for i in range(total)])
    places = [total + c if k == held else c * held + k for c in range(channels) for k in range(held + 1)]
    return builder.shuffle_vector(first, second, ir.Constant(vector(INT32, total), places))


@intrinsic
def short_filters(context, token, short_token, taps, inputs, weights, windows, count, out):
    """Short filters of ``count`` neighbouring channels, ``Σ w[k]·x[t-T+1+k]``, whose windows move on; float32.

    Args:
        token, short_token: of inputs and weights, and of the windows.
        taps: T, a literal; a window holds the T-1 inputs before, oldest first.
        inputs, weights, windows: addresses [C], [C,T], [C,T-1].
        out: the address of float32 [C].
    """
    if not isinstance(taps, types.IntegerLiteral):
        return None
    length = taps.literal_value
    held = length - 1

    def generate(context, builder, signature, arguments):
        _, _, _, inputs, weights, windows, count, out = arguments
        x, w = (builder.inttoptr(a, stored(token).as_pointer()) for a in (inputs, weights))
        window = builder.inttoptr(windows, stored(short_token).as_pointer())
        result = builder.inttoptr(out, FLOAT.as_pointer())

        def some(channels: int) -> Body:
            lanes = channels * length

            def body(channel: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                place = builder.mul(channel, constant(held, INT64))
                line = read_wide(builder, token, x, channel, channels)
                if held:
                    prefetch_line(builder, builder.gep(window, [builder.add(place, constant(AHEAD, INT64))]))
                    before = read_wide(builder, short_token, window, place, channels * held)
                    line = _beside(builder, before, line, channels)
                    later = some_of(builder, line, [i for i in range(lanes) if i % length])
                    write(builder, rounded(builder, short_token, later), window, place)
                first = builder.mul(channel, constant(length, INT64))
                products = builder.fmul(line, read_wide(builder, token, w, first, lanes))
                terms = [some_of(builder, products, range(k, lanes, length)) for k in range(length)]
                write(builder, reduce(builder.fadd, terms), result, channel)
                return carried

            return body

        together = constant(max(1, LANES // length), INT64)
        whole = builder.mul(builder.udiv(count, together), together)
        loop(builder, constant(0, INT64), whole, together.constant, [], some(together.constant))
        loop(builder, whole, count, 1, [], some(1))
        return context.get_dummy_value()

    return types.void(token, short_token, taps, *[types.int64] * 5), generate


class _Modes(NamedTuple):
    """Where a channel's modes lie: the pointers to its poles, residues and state, and its input."""

    poles: ir.Value
    residues: ir.Value
    state: ir.Value
    x: ir.Value

    def step(self, builder: Any, index: ir.Value, lanes: int, total: ir.Value) -> ir.Value:
        """Move ``lanes`` numbers of the state on, real and imaginary parts side by side, and add their ``Re R·s``."""
        own, other = [i - i % 2 for i in range(lanes)], [i ^ 1 for i in range(lanes)]
        signs = ir.Constant(vector(FLOAT, lanes), [1.0, -1.0] * (lanes // 2))
        real = ir.Constant(vector(INT32, lanes), [lanes * (i % 2) + i for i in range(lanes)])
        prefetch_line(builder, builder.gep(self.state, [builder.add(index, constant(AHEAD, INT64))]))
        pole, residue, s = (read(builder, FLOAT, a, index, lanes) for a in (self.poles, self.residues, self.state))
        x = builder.shuffle_vector(spread(builder, self.x, lanes), constant(0.0, FLOAT, lanes), real)
        turned = builder.fmul(pick(builder, pole, [i + 1 for i in own]), pick(builder, s, other))
        straight = fma(builder, x, pick(builder, pole, own), s)
        new = builder.fsub(straight, builder.fmul(turned, signs))
        write(builder, new, self.state, index)
        return fma(builder, total, new, builder.fmul(residue, signs))


@intrinsic
def complex_filters(context, poles, residues, state, modes, shared, first, count, inputs, out):
    """``s = p·s + x`` and ``Re Σ R·s`` over the complex modes of ``count`` neighbouring channels, float32.

    Args:
        poles, residues: addresses of complex64 [F,modes]; ``shared`` neighbouring channels have the same.
        state: the address of complex64 [C,modes], from the channel ``first`` on.
        inputs, out: addresses of float32 [C], from that channel on.
    """

    def generate(context, builder, signature, arguments):
        *addresses, modes, shared, first, count, inputs, out = arguments
        poles, residues, state, inputs, out = (
            builder.inttoptr(address, FLOAT.as_pointer()) for address in (*addresses, inputs, out)
        )
        width = builder.mul(modes, constant(2, INT64))

        def modes_of(channel: ir.Value) -> _Modes:
            number = builder.mul(builder.udiv(builder.add(first, channel), shared), width)
            place = builder.mul(channel, width)
            own = builder.gep(poles, [number]), builder.gep(residues, [number]), builder.gep(state, [place])
            return _Modes(*own, read(builder, FLOAT, inputs, channel, 1))

        def some(channels: int) -> Body:
            def body(channel: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                every = [modes_of(builder.add(channel, constant(i, INT64))) for i in range(channels)]

                def terms(lanes: int) -> Body:
                    def add(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                        return [m.step(builder, index, lanes, t) for m, t in zip(every, totals, strict=True)]

                    return add

                start, whole = constant(0, INT64), builder.and_(width, constant(-LANES, INT64))
                wide = loop(builder, start, whole, LANES, [constant(0.0, FLOAT, LANES)] * channels, terms(LANES))
                rest = loop(builder, whole, width, 2, [constant(0.0, FLOAT, 2)] * channels, terms(2))
                others = gathered(builder, [fold(builder, total, builder.fadd) for total in rest])
                write(builder, builder.fadd(fold_each(builder, wide), others), out, channel)
                return carried

            return body

        whole = builder.and_(count, constant(-CHANNELS, INT64))
        loop(builder, constant(0, INT64), whole, CHANNELS, [], some(CHANNELS))
        loop(builder, whole, count, 1, [], some(1))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate
