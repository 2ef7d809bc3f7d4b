"""Pieces of the kernels of ``segments``: lanes, products of factors of two terms, tiles on their way to lanes."""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.hyena.forward import move
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, multiply, pack

TILE = tl.constexpr(256)
"""Steps of a tile."""


@triton.jit
def split(a, b, EMULATED: tl.constexpr):
    """Two float32 numbers as words of two bfloat16 terms."""
    high = pack(a, b, EMULATED)
    return high, pack(a - half(high, False), b - half(high, True), EMULATED)


@triton.jit
def multiply_short(a, b, c, EMULATED: tl.constexpr):
    """``c + a·b`` by mma.m16n8k8: tuples of 2 and 1 words of bfloat16, and of 4 float32."""
    if EMULATED:
        none = tl.zeros_like(a[0])
        c = multiply((a[0], a[1], none, none), (b[0], none), c, EMULATED)
    else:
        c = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
            "=f,=f,=f,=f,r,r,r,f,f,f,f",
            [a[0], a[1], b[0], c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return c


@triton.jit
def multiply_terms(a, b, c, EMULATED: tl.constexpr):
    """``c + a·b`` of factors of two terms, the product of the low ones left out."""
    if len(a[0]) == 2:
        c = multiply_short(a[1], b[0], c, EMULATED)
        c = multiply_short(a[0], b[1], c, EMULATED)
        c = multiply_short(a[0], b[0], c, EMULATED)
    else:
        c = multiply(a[1], b[0], c, EMULATED)
        c = multiply(a[0], b[1], c, EMULATED)
        c = multiply(a[0], b[0], c, EMULATED)
    return c


@triton.constexpr_function
def shuffle(later):
    """The instruction that reads another lane, and its last lane: of one after, or of one before."""
    return ("shfl.sync.down.b32", 31) if later else ("shfl.sync.up.b32", 0)


@triton.constexpr_function
def add_instructions(later, real):
    """``q·s' + s`` of ``add_lane``."""
    read, last = shuffle(later)
    out = "{.reg .pred p; .reg .f32 a, b;" if real else "{.reg .pred p; .reg .f32 a, b, m;"
    out += f"{read} a|p, $2, $6, {last}, 0xffffffff; {read} b|p, $3, $6, {last}, 0xffffffff;"
    if real:
        return out + "mov.f32 $0, $2; mov.f32 $1, $3;@p fma.rn.f32 $0, $4, a, $0; @p fma.rn.f32 $1, $5, b, $1;}"
    out += "mov.f32 $0, $2; mov.f32 $1, $3; neg.f32 m, $5;@p fma.rn.f32 $0, $4, a, $0; @p fma.rn.f32 $1, $4, b, $1;"
    return out + "@p fma.rn.f32 $0, m, b, $0; @p fma.rn.f32 $1, $5, a, $1;}"


@triton.constexpr_function
def move_instructions(distance, later):
    """``move_lanes``: the other lane's number, or that behind it where there is none."""
    read, last = shuffle(later)
    out = f"{{.reg .pred p; .reg .b32 a; {read} a|p, $1, {distance}, {last}, 0xffffffff; "
    return out + "selp.b32 $0, a, $2, p;}"


@triton.jit
def of_lane(x, other, distance, lane, LATER: tl.constexpr):
    """x of the lane so many after, or before; ``other`` where there is none. For the interpreter."""
    at = tl.arange(0, x.shape[0])
    if LATER:
        return tl.where(lane + distance < 32, tl.gather(x, tl.minimum(at + distance, x.shape[0] - 1), 0), other)
    else:
        return tl.where(lane >= distance, tl.gather(x, tl.maximum(at - distance, 0), 0), other)


@triton.jit
def add_lane(q, re, im, distance, lane, LATER: tl.constexpr, REAL: tl.constexpr, EMULATED: tl.constexpr):
    """``q·s' + s``, s' that of the lane so many after, or before; zero where there is none."""
    if EMULATED:
        a = of_lane(re, 0.0, distance, lane, LATER)
        b = of_lane(im, 0.0, distance, lane, LATER)
        re, im = move(q, a, b, re, im, REAL)
    else:
        re, im = tl.inline_asm_elementwise(
            add_instructions(LATER, REAL),
            "=&f,=&f,f,f,f,f,r",
            [re, im, q[0], q[1], distance],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return re, im


@triton.jit
def move_lanes(x, other, lane, DISTANCE: tl.constexpr, LATER: tl.constexpr, EMULATED: tl.constexpr):
    """x of the lane DISTANCE after, or before; ``other`` where there is none."""
    if EMULATED:
        out = of_lane(x, other, DISTANCE, lane, LATER)
    else:
        out = tl.inline_asm_elementwise(
            move_instructions(DISTANCE, LATER), "=f,f,f", [x, other], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def sum_columns(x, lane, EMULATED: tl.constexpr):
    """The sum of x over the lanes with the same lane % 4, in all of them."""
    for k in tl.static_range(3):
        other = from_lane(x.to(tl.int32, bitcast=True), lane ^ (4 << k), EMULATED)
        x += other.to(tl.float32, bitcast=True)
    return x


@triton.jit
def load_before_tile(z, short, keep, begin, REACH: tl.constexpr, ROW: tl.constexpr, HAS_SHORT: tl.constexpr,
                     HAS_MASK: tl.constexpr):  # fmt: skip
    """The words of the steps before ``begin``, from the state where it is 0; zero at padding."""
    words = ()
    for k in tl.static_range(REACH):
        t = begin - REACH + k
        here = t >= 0
        if HAS_MASK:
            here = here & (tl.load(keep + t, mask=t >= 0, other=0) != 0)
        word = tl.load(z + tl.cast(t, tl.int64) * ROW, mask=here, other=0)
        if HAS_SHORT:
            word = tl.where(t < 0, tl.load(short + tl.minimum(begin + k, REACH - 1) * ROW), word)
        words = words + (word,)
    return words


@triton.jit
def as_factors(x, EMULATED: tl.constexpr):
    """A lane's eight numbers as a left factor of two terms, four words each."""
    a = split(x[0], x[1], EMULATED)
    b = split(x[4], x[5], EMULATED)
    c = split(x[2], x[3], EMULATED)
    d = split(x[6], x[7], EMULATED)
    return (a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1])


@triton.jit
def multiply_local(x, local, EMULATED: tl.constexpr):
    """What a segment's steps, a left factor, add within the segment: to its first and its last eight steps."""
    none = (x[0][0] * 0).to(tl.float32)
    low = multiply(x[0], local[0:2], (none, none, none, none), EMULATED)
    return low, multiply(x[0], local[2:4], (none, none, none, none), EMULATED)


@triton.jit
def add_states(low, high, terms, leave, EMULATED: tl.constexpr):
    """Add what states add to those steps; terms: two words of each state, in turns."""
    s = (terms[0::2], terms[1::2])
    return multiply_terms(s, leave[0], low, EMULATED), multiply_terms(s, leave[1], high, EMULATED)


@triton.jit
def in_steps(low, high):
    """A lane's eight numbers, in the order of its steps."""
    return (low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3])


@triton.jit
def products(us, vs):
    """The products of two tuples."""
    out = ()
    for i in tl.static_range(len(us)):
        out = out + (us[i] * vs[i],)
    return out


@triton.jit
def pack_steps(even, odd, EMULATED: tl.constexpr):
    """A lane's eight numbers of both channels as words."""
    out = ()
    for i in tl.static_range(8):
        out = out + (pack(even[i], odd[i], EMULATED),)
    return out


@triton.jit
def zeros(lane):
    """A zero for every lane."""
    return (lane * 0).to(tl.float32)


@triton.jit
def load_filters(weight, bias, word, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Taps and bias of the short filters of a word's two channels."""
    out = ()
    for e in tl.static_range(2):
        taps = ()
        for k in tl.static_range(K):
            taps = taps + (tl.load(weight + (word * 2 + e) * K + k).to(tl.float32),)
        offset = zeros(word)
        if HAS_BIAS:
            offset = tl.load(bias + word * 2 + e).to(tl.float32)
        out = out + ((taps, offset),)
    return out


@triton.jit
def decays_of(a, b, c):
    """The ``decays`` of ``segments.find_states``, of three pieces of four words."""
    out = ()
    for k in tl.static_range(5):
        x = (a + b + c)[2 * k : 2 * k + 2]
        out = out + ((x[0].to(tl.float32, bitcast=True), x[1].to(tl.float32, bitcast=True)),)
    return out


@triton.jit
def leaves_of(first, second, QUADS: tl.constexpr):
    """R of a block of modes as right factors of two terms, one for each half of its columns, from its entries."""
    if QUADS == 1:
        out = (((first[0],), (first[1],)), ((first[2],), (first[3],)))
    else:
        out = ((first[0:2], first[2:4]), (second[0:2], second[2:4]))
    return out
