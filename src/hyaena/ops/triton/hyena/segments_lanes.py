"""Pieces of the kernels of ``segments``: lanes, products of factors of two terms, tiles on their way to lanes."""

from __future__ import annotations

import triton
import triton.language as tl

from hyaena.ops.triton.hyena.forward import move
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, multiply, pack
from hyaena.ops.triton.hyena.words import stack, unstack

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
def tile_steps():
    """The steps of a tile's rows, int32 [TILE]: neighbours are those of neighbouring lanes, not of time."""
    row = tl.arange(0, TILE)
    lane = row % 32
    return lane // 4 * 32 + lane % 4 * 4 + row // 128 * 16 + row // 32 % 4


@triton.jit
def load_tile(z, start, T, first, kept, ROW: tl.constexpr, WORDS: tl.constexpr, HAS_MASK: tl.constexpr,
              EARLY: tl.constexpr = False):  # fmt: skip
    """The words [TILE,WORDS] of a tile, rows as in ``tile_steps``, zero at T and later, and at padding."""
    step = tile_steps()[:, None]
    here = start + step < T
    if HAS_MASK:
        here = here & (tl.load(kept + start + step, mask=here, other=0) != 0)
    at = z + tl.cast(start, tl.int64) * ROW + step * ROW
    return tl.load(at + (first + tl.arange(0, WORDS)[None, :]), mask=here, other=0, volatile=EARLY)


@triton.jit
def first_of(a, b):
    """The first of two."""
    return a


@triton.jit
def in_rows(tile):
    """A tile itself, a scan over nothing, which Triton does not move.

    A tile that was copied ahead would be read from shared memory in the layout of lanes, which all meet in four banks;
    so it is read as rows, and then exchanged.
    """
    WORDS: tl.constexpr = tile.shape[1]
    return tl.reshape(tl.associative_scan(tl.reshape(tile, (TILE, WORDS, 1)), 2, first_of), (TILE, WORDS))


@triton.jit
def to_lanes(tile):
    """A tile [TILE,WORDS] as eight tensors, a lane's steps: four of each of its two segments."""
    WORDS: tl.constexpr = tile.shape[1]
    x = tl.permute(tl.reshape(tile, (8, 32, WORDS)), (2, 1, 0))
    return unstack(tl.reshape(x, (WORDS * 32, 8)))


@triton.jit
def from_lanes(xs):
    """The inverse of ``to_lanes``."""
    WORDS: tl.constexpr = xs[0].shape[0] // 32
    x = tl.permute(tl.reshape(stack(xs, 8), (WORDS, 32, 2, 2, 2)), (2, 3, 4, 1, 0))
    return tl.reshape(x, (TILE, WORDS))


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
    none = tl.zeros(x[0][0].shape, tl.float32)
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
def store_tile(to, start, T, first, even, odd, ROW: tl.constexpr, WORDS: tl.constexpr, EMULATED: tl.constexpr):
    """A lane's eight numbers of both channels to a tile of words."""
    out = ()
    for i in tl.static_range(8):
        out = out + (pack(even[i], odd[i], EMULATED),)
    step = tile_steps()[:, None]
    at = to + tl.cast(start, tl.int64) * ROW + step * ROW + (first + tl.arange(0, WORDS)[None, :])
    tl.store(at, from_lanes(out), mask=start + step < T)
