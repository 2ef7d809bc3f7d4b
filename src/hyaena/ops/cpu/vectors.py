"""Sums of products of a row of weights with vectors, as instructions of wide registers, and what they are built of.

A compiler turns the plain loop into one sum of one register's width, whose additions wait for one another: it reads at
half the bandwidth of memory. Sums of two neighbouring rows hide that. Several vectors share one reading and widening of
the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

LANES = 16
"""Numbers of a register: those of AVX-512; LLVM splits what a processor has no registers for."""
EIGHT = 8
"""Numbers that are finished together."""
MANY = 4
"""Vectors that share one reading of the weights, where there are so many."""
NEIGHBOURS = 4 if dict(binding.get_host_cpu_features()).get("avx512f") else 1
"""Rows of weights that then share one reading of the vectors: as many as the registers have room for sums."""
NEIGHBOURS_OF_FEW = 2
"""Rows of weights for fewer vectors, so that the additions of a sum, which wait for one another, do not hold it up."""

AHEAD = 1 << 12
"""Bytes between the weights that are multiplied and those that are prefetched meanwhile, for one or two
vectors and for narrow weights. A processor may read ahead to the end of a page of 4 KiB only, and less the more
instructions lie between two reads."""

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


def write(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, index: ir.Value) -> None:
    """Numbers to the pointer ``address[index]``."""
    place = builder.gep(address, [index], inbounds=True)
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=1)


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


def rounded(builder: ir.IRBuilder, token: types.Type, value: ir.Value, *, ordinary: bool = False) -> ir.Value:
    """float32 numbers as they are stored for a token: rounded to the nearest number, to the even one of two.

    ``ordinary`` says that no NaN is among them but those that arithmetic makes, which need no care.
    """
    lanes = lanes_of(value)
    if token == types.float32:
        return value
    if token == types.int16:
        return builder.fptrunc(value, vector(HALF, lanes))
    bits = builder.bitcast(value, vector(INT32, lanes))
    upper = builder.lshr(bits, constant(16, INT32, lanes))
    odd = builder.and_(upper, constant(1, INT32, lanes))
    nearest = builder.add(bits, builder.add(odd, constant(0x7FFF, INT32, lanes)))
    if not ordinary:  # a NaN keeps its sign and becomes quiet: adding could carry it to infinity
        nan = builder.or_(bits, constant(0x400000, INT32, lanes))
        nearest = builder.select(builder.fcmp_unordered("uno", value, value), nan, nearest)
    if lanes == 1:
        return builder.trunc(builder.lshr(nearest, constant(16, INT32)), INT16)
    return pick(builder, builder.bitcast(nearest, vector(INT16, 2 * lanes)), range(1, 2 * lanes, 2))


def spread(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every place of a register."""
    one = builder.insert_element(ir.Constant(vector(value.type, lanes), ir.Undefined), value, constant(0, INT32))
    return builder.shuffle_vector(one, one, constant(0, INT32, lanes))


def gathered(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    """Scalars side by side in a register; the scalar itself if it is one."""
    if len(values) == 1:
        return values[0]
    register = ir.Constant(vector(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        register = builder.insert_element(register, value, constant(i, INT32))
    return register


def pick(builder: ir.IRBuilder, value: ir.Value, places: Sequence[int]) -> ir.Value:
    """The numbers of a register at these places."""
    return builder.shuffle_vector(value, value, ir.Constant(vector(INT32, len(places)), list(places)))


def lanes_of(value: ir.Value) -> int:
    """Numbers of a register; 1 of a scalar."""
    return value.type.count if isinstance(value.type, ir.VectorType) else 1


def some_of(builder: ir.IRBuilder, value: ir.Value, places: Sequence[int]) -> ir.Value:
    """The numbers of a register, or of a scalar, at these places; a scalar for one place."""
    if lanes_of(value) == 1:
        return spread(builder, value, len(places)) if len(places) > 1 else value
    return (
        pick(builder, value, places) if len(places) > 1 else builder.extract_element(value, constant(places[0], INT32))
    )


def portion(builder: ir.IRBuilder, value: ir.Value, index: int, parts: int) -> ir.Value:
    """One of so many equal parts of a register; a scalar if a part is one number, or if the whole is one."""
    size = max(1, lanes_of(value) // parts)
    return some_of(builder, value, range(index * size, (index + 1) * size))


def fold(builder: ir.IRBuilder, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """All numbers of a register combined, in halves."""
    half = value.type.count
    while half > 2:
        half //= 2
        value = combine(pick(builder, value, range(half)), pick(builder, value, range(half, 2 * half)))
    return combine(*(builder.extract_element(value, constant(i, INT32)) for i in range(2)))


def fold_each(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    """The sums of 1, 2, 4, … registers, side by side: in halves as by ``fold``, with fewer shuffles for many."""
    if len(values) == 1:
        return fold(builder, values[0], builder.fadd)
    values, size = list(values), values[0].type.count
    while size > 1:
        size //= 2
        pairs = [*zip(values[::2], values[1::2], strict=True)] if len(values) > 1 else [(values[0], values[0])]
        count = values[0].type.count * min(2, len(values))  # in both of a pair
        low = [first + i for first in range(0, count, 2 * size) for i in range(size)]
        masks = [ir.Constant(vector(INT32, len(low)), [i + part for i in low]) for part in (0, size)]
        values = [builder.fadd(*(builder.shuffle_vector(*pair, mask) for mask in masks)) for pair in pairs]
    return values[0]


def fma(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """``total + a·b``."""
    return builder.fadd(total, builder.fmul(a, b, flags=FUSED), flags=FUSED)


def prefetch_line(builder: ir.IRBuilder, place: ir.Value) -> None:
    """Have the cache line at an address, a number or a pointer, brought to the first cache, without waiting for it."""
    cast = builder.bitcast if isinstance(place.type, ir.PointerType) else builder.inttoptr
    place = cast(place, BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, INT32, INT32, INT32])
    code = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
    builder.call(code, [place, *(constant(number, INT32) for number in (0, 3, 1))])  # to read, all caches, data


def prefetch_ahead(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> None:
    """Prefetch the line ``AHEAD`` bytes behind the pointer ``address[index]``; it may lie behind all memory."""
    place = builder.bitcast(builder.gep(address, [index]), BYTE.as_pointer())
    prefetch_line(builder, builder.gep(place, [constant(AHEAD, INT64)]))


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


def in_pieces(builder: ir.IRBuilder, count: ir.Value, some: Callable[[int], Body]) -> None:
    """Run ``some(lanes)`` for every number of ``count``: eight at a time, and the rest one by one."""
    whole = builder.and_(count, constant(-EIGHT, INT64))
    loop(builder, constant(0, INT64), whole, EIGHT, [], some(EIGHT))
    loop(builder, whole, count, 1, [], some(1))


def float_sums(
    builder: ir.IRBuilder,
    token: types.Type,
    weights: Sequence[ir.Value],
    width: ir.Value,
    vectors: Sequence[ir.Value],
    ahead: ir.Value,
    pace: ir.Value,
) -> ir.Value:
    """``Σ weights[k]·x[k]`` of rows of ``width`` numbers with float32 vectors, all at addresses; 1, 2, 4, … of each.

    The order of summation depends on the width alone: registers are added up one after another, and the rest one by
    one. With many vectors, one line of memory from ``ahead`` on is brought to the cache for each register of a row, and
    the next one is ``pace`` bytes further; with fewer, what lies ``AHEAD`` bytes behind what is read.

    Returns:
        The sums of the first vector with all rows, of the second, …, side by side.
    """
    rows = [builder.inttoptr(w, stored(token).as_pointer()) for w in weights]
    xs = [builder.inttoptr(x, FLOAT.as_pointer()) for x in vectors]
    zeros = [constant(0.0, FLOAT, LANES)] * (len(rows) * len(xs))

    def add(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        totals, lines = carried[: len(zeros)], carried[len(zeros) :]
        for line in lines:
            prefetch_line(builder, line)
        for row in rows if not lines else ():
            prefetch_ahead(builder, row, index)
        found = [read_wide(builder, token, w, index, LANES) for w in rows]
        for j, x in enumerate(xs):
            b = read(builder, FLOAT, x, index, LANES)
            for at, a in enumerate(found, j * len(rows)):
                totals[at] = fma(builder, totals[at], a, b)
        return [*totals, *(builder.add(line, pace) for line in lines)]

    def last(index: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
        a = [read_wide(builder, token, w, index, 1) for w in rows]
        b = [read(builder, FLOAT, x, index, 1) for x in xs]
        pairs = [(w, x) for x in b for w in a]
        return [fma(builder, totals[0], *(gathered(builder, side) for side in zip(*pairs, strict=True)))]

    whole, lines = builder.and_(width, constant(-LANES, INT64)), [ahead] if len(xs) == MANY else []
    totals = loop(builder, constant(0, INT64), whole, LANES, [*zeros, *lines], add)[: len(zeros)]
    return loop(builder, whole, width, 1, [fold_each(builder, totals)], last)[0]


@intrinsic
def prefetch(context, address):
    """Have the cache line at an address brought to the first cache, without waiting for it."""

    def generate(generator, builder, signature, arguments):
        prefetch_line(builder, *arguments)
        return generator.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def add_numbers(context, token, source, count, target):
    """Add ``count`` numbers of the token's dtype to float32 numbers, both at addresses."""

    def generate(context, builder, signature, arguments):
        _, source, count, target = arguments
        numbers, sums = (
            builder.inttoptr(source, stored(token).as_pointer()),
            builder.inttoptr(target, FLOAT.as_pointer()),
        )

        def some(lanes: int) -> Body:
            def body(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                total = builder.fadd(
                    read(builder, FLOAT, sums, index, lanes), read_wide(builder, token, numbers, index, lanes)
                )
                write(builder, total, sums, index)
                return carried

            return body

        in_pieces(builder, count, some)
        return context.get_dummy_value()

    return types.void(token, types.int64, types.int64, types.int64), generate


@intrinsic
def put_numbers(context, token, source, count, target):
    """Store ``count`` float32 numbers as numbers of the token's dtype, both at addresses."""

    def generate(context, builder, signature, arguments):
        _, source, count, target = arguments
        numbers, there = (
            builder.inttoptr(source, FLOAT.as_pointer()),
            builder.inttoptr(target, stored(token).as_pointer()),
        )

        def some(lanes: int) -> Body:
            def body(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                write(builder, rounded(builder, token, read(builder, FLOAT, numbers, index, lanes)), there, index)
                return carried

            return body

        in_pieces(builder, count, some)
        return context.get_dummy_value()

    return types.void(token, types.int64, types.int64, types.int64), generate
