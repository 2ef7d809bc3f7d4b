"""Products of a bfloat16 matrix and 2 to 8 vectors, from global memory through registers to the tensor cores.

A program has a few *strips* of 8 rows of the matrix, its warps share the columns, and a warp takes *blocks* of 128
columns. Lane (g, t) = (lane / 4, lane % 4) reads 16 bytes of row g at a time, 8 columns of each *piece* of 32. They are
the right operands of two instructions ``mma.m16n8k16`` as they are: the order of columns inside an instruction is free,
as long as the vectors keep to it. The left operand has the same columns of the vectors, vector g in lane (g, t):

    first:   rows 0-7:  columns 0-3 of a lane,   rows 8-15: what happens to lie there
    second:  rows 0-7:  what happens to lie there,   rows 8-15: columns 4-7 of a lane

so that both have the same four registers, nothing is moved, and a sum is row g of the first plus row g + 8 of the
second. No number of the matrix passes through shared memory, and the first blocks are on their way before a program
waits for its predecessor. The norm before a product costs no pass of its own: ``W·(x·g/rms(x)) = (W·(x·g))/rms(x)``;
x·g is rounded to bfloat16, sums are float32.

Fewer than 8 vectors lie in all lanes: where there are R, a lane reads and scales 8 columns of one vector of every 8/R
pieces, and lanes exchange them.

Tensors have one element for every lane, [L] for L threads, as in ``ops.triton.hyena.toeplitz``. What ``takes`` refuses
``few_rows`` computes; the references are ``DecodeOperators.linear`` and ``.gate``.

Source: PTX ISA, ``mma.m16n8k16``: which lane has which numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.linear import Dense, Linear
from hyaena.ops.step import RMSNormWeight
from hyaena.ops.triton.common import activate
from hyaena.ops.triton.decode.gemv import SHRINK
from hyaena.ops.triton.decode.narrow import split_four
from hyaena.ops.triton.hyena.toeplitz import from_lane, half, multiply, pack
from hyaena.ops.triton.pdl import gdc_launch_dependents, gdc_wait

MOST_ROWS = 8
"""Vectors: columns of the left operand that are used."""
MOST_COLUMNS = 16384
"""Of a matrix: code is made for every block of a warp."""


@dataclass(frozen=True)
class Tile:
    """What a program reads.

    Attributes:
        warps: that share the columns of a row; a power of two.
        depth: blocks of each warp that are in flight.
        strips: of 8 rows of each matrix.
        programs: on a processor, as many as registers are given for.
        early: the next kernel is launched when the load of the last block is issued, not when it has arrived.
    """

    warps: int
    depth: int
    strips: int = 1
    programs: int = 2
    early: bool = False

    @property
    def registers(self) -> int:
        """Of a thread, so that the programs fit a processor."""
        return min(255, 2048 // (self.warps * self.programs) // 8 * 8)


TILES = {
    (2, 1): Tile(4, 4, programs=4),
    (2, 2): Tile(8, 2, early=True),
    (4, 1): Tile(4, 2, programs=4),
    (4, 2): Tile(8, 2, early=True),
    (8, 1): Tile(4, 1, strips=2, programs=3),
    (8, 2): Tile(8, 1, early=True),
}
"""By vectors, 2, 4 or 8, and matrices: the fastest of whole steps on one H100.

What is in flight in a processor, numbers of the matrix and vectors, fills half of its registers: two programs of 8
warps, or three or four of 4, so that some read while others end. Two strips read 8 vectors half as often.
"""
MANY = 8192
"""Columns from which a program has so much to read that its beginning and end do not count: few large ones."""
LONG_TILES = {2: Tile(8, 3), 4: Tile(8, 3), 8: Tile(8, 2)}
"""For matrices of more columns than ``MANY``."""


def choose_tile(vectors: int, matrices: int, columns: int) -> Tile:
    """For so many vectors (2, 4 or 8) and some matrices of ``columns`` columns each."""
    tile = TILES[vectors, matrices]
    if matrices == 1 and columns > MANY:
        tile = LONG_TILES.get(vectors, tile)
    return replace(tile, warps=min(tile.warps, triton.next_power_of_2(triton.cdiv(columns, 128))))


@triton.jit
def lanes(L: tl.constexpr):
    """g and t of every lane [L]."""
    lane = tl.arange(0, L) % 32
    return lane // 4, lane % 4


@triton.jit
def read_words(at, k, inside, away, K: tl.constexpr, WHOLE: tl.constexpr):
    """Words [L,4] that lie ``away`` behind the pointers, where the lane's column of words k is one of a row."""
    place = at[:, None] + (away + tl.arange(0, 4))[None, :]
    if WHOLE:
        return tl.load(place, eviction_policy="evict_first")
    else:
        return tl.load(place, mask=(inside & (k < K // 2))[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def read_block(at, first, start, j: tl.constexpr, N, K: tl.constexpr, STRIPS: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    """A lane's part of block ``start + j`` of every strip of every matrix: a tuple of 4 pieces for each."""
    g, t = lanes(start.shape[0])
    words = ()
    for i in tl.static_range(len(at)):
        for strip in tl.static_range(STRIPS):
            for piece in tl.static_range(4):
                k = (start + j) * 64 + 16 * piece + 4 * t
                here = first + 8 * strip + g < N
                words = words + (read_words(at[i], k, here, 4 * strip * K + 64 * j + 16 * piece, K, WHOLE),)
    return words


@triton.jit
def read_vectors(at, start, j: tl.constexpr, K: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr):
    """A lane's part of block ``start + j`` of R vectors: of each 8/R pieces vector g % R of piece g // R."""
    g, t = lanes(start.shape[0])
    words = ()
    for i in tl.static_range(R // 2):
        k = (start + j) * 64 + (8 // R * i + g // R) * 16 + 4 * t
        place = at[:, None] + (64 * j + 8 // R * 16 * i + tl.arange(0, 4))[None, :]
        words = words + (tl.load(place, mask=None if EVEN else (k < K // 2)[:, None], other=None if EVEN else 0),)
    return words


@triton.jit
def scale_words(words, gains, squares, HAS_NORM: tl.constexpr, EMULATED: tl.constexpr):
    """Words [L,4] times the norm's weights as four [L], and the lane's sum of squares with theirs."""
    v = split_four(words)
    out = v
    if HAS_NORM:
        u = split_four(gains)
        out = ()
        for i in tl.static_range(4):
            low, high = half(v[i], False), half(v[i], True)
            squares += low * low + high * high
            out = out + (pack(low * half(u[i], False), high * half(u[i], True), EMULATED),)
    return out, squares


@triton.jit
def left_operand(words, piece: tl.constexpr, R: tl.constexpr, EMULATED: tl.constexpr):
    """A piece of the vectors, of what ``scale_words`` made of ``read_vectors``, in the order of both instructions."""
    mine = words[piece // (8 // R)]
    if R < 8:
        g, t = lanes(mine[0].shape[0])
        lane = 4 * (piece % (8 // R) * R + g % R) + t
        return (from_lane(mine[0], lane, EMULATED), from_lane(mine[2], lane, EMULATED),
                from_lane(mine[1], lane, EMULATED), from_lane(mine[3], lane, EMULATED))  # fmt: skip
    else:
        return mine[0], mine[2], mine[1], mine[3]


@triton.jit
def add_piece(sums, x, words, EMULATED: tl.constexpr):
    """Add a piece [L,4] of a strip times that of the vectors to the results of both instructions, 8 [L]."""
    if EMULATED:  # what the results are added up to
        W: tl.constexpr = x[0].shape[0] // 32
        left = tl.reshape(tl.join(tl.join(x[0], x[1]), tl.join(x[2], x[3])), (W, 8, 1, 16))
        right = tl.reshape(words, (W, 1, 8, 16))
        y = tl.sum(half(left, False) * half(right, False) + half(left, True) * half(right, True), axis=3)
        even, odd = tl.split(tl.reshape(y, (32 * W, 2)))
        return (sums[0] + even, sums[1] + odd) + sums[2:]
    else:
        w = split_four(words)
        first = multiply(x, (w[0], w[1]), sums[:4], EMULATED)
        return first + multiply(x, (w[2], w[3]), sums[4:], EMULATED)


@triton.jit
def add_block(sums, block, vectors, R: tl.constexpr, EMULATED: tl.constexpr):
    """Add a block times the vectors to the sums: for every strip the results of both instructions, 8 [L]."""
    for piece in tl.static_range(4):
        x = left_operand(vectors, piece, R, EMULATED)
        added = ()
        for i in tl.static_range(len(block) // 4):
            added = added + add_piece(sums[8 * i : 8 * i + 8], x, block[4 * i + piece], EMULATED)
        sums = added
    return sums


@triton.jit
def total_of(sums, i: tl.constexpr):
    """The sums of strip i over the warps: float32 [32,2], lane (g, t): vector g, rows 2t and 2t + 1."""
    L: tl.constexpr = sums[0].shape[0]
    pair = tl.join(sums[8 * i] + sums[8 * i + 6], sums[8 * i + 1] + sums[8 * i + 7])
    return tl.sum(tl.reshape(pair, (L // 32, 32, 2)), axis=0)


@triton.jit
def sum_lanes(x, FIRST: tl.constexpr, LAST: tl.constexpr, EMULATED: tl.constexpr):
    """Sums of float32 [L] over the lanes whose numbers differ in some bits, in all of them."""
    lane = tl.arange(0, x.shape[0]) % 32
    for bit in tl.static_range(FIRST, LAST):
        x += from_lane(x.to(tl.int32, bitcast=True), lane ^ (1 << bit), EMULATED).to(tl.float32, bitcast=True)
    return x


@triton.jit
def inverse_root(squares, eps, K: tl.constexpr, EPS_INSIDE: tl.constexpr):
    """1 / rms of vectors of K numbers, from their squares."""
    if EPS_INSIDE:
        return 1.0 / tl.sqrt(squares / K + eps)
    return 1.0 / (tl.sqrt(squares / K) + eps)


@triton.jit
def norm_scales(squares, x, M, eps, K: tl.constexpr, R: tl.constexpr, EPS_INSIDE: tl.constexpr,
                EMULATED: tl.constexpr):  # fmt: skip
    """1 / rms of vector g in lane (g, t) [32]; x is read again, and scaled down, only where squares overflowed."""
    L: tl.constexpr = squares.shape[0]
    OTHERS: tl.constexpr = 3 if R == 2 else 4 if R == 4 else 5
    # lanes of one vector differ in t, bits 0 and 1, and in the bits of g behind those of R
    squares = sum_lanes(sum_lanes(squares, 0, 2, EMULATED), OTHERS, 5, EMULATED)
    scale = inverse_root(tl.sum(tl.reshape(squares, (L // 32, 32)), axis=0), eps, K, EPS_INSIDE)
    if tl.min(scale, axis=0) == 0.0:
        g, _ = lanes(32)
        row = tl.minimum(g % R, M - 1) * K
        small = tl.zeros((32,), tl.float32)
        for k in tl.range(0, K, loop_unroll_factor=1):
            v = tl.load(x + row + k, volatile=True).to(tl.float32) * SHRINK
            small += v * v
        scale = tl.where(scale == 0.0, inverse_root(small, 0.0, K, True) * SHRINK, scale)  # eps is nothing beside them
    return scale


@triton.jit
def _row_tiles_kernel(x, g, w, bias, residual, out, M, N, eps, K: tl.constexpr, R: tl.constexpr,
                      W: tl.constexpr, DEPTH: tl.constexpr, STRIPS: tl.constexpr, EARLY: tl.constexpr,
                      WHOLE: tl.constexpr, HAS_NORM: tl.constexpr, EPS_INSIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
                      HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, EMULATED: tl.constexpr,
                      OVERLAP: tl.constexpr):  # fmt: skip
    """``residual + w[0]·norm(x) + bias``, or ``act(w[0]·norm(x)) · (w[1]·norm(x))``. Grid: (rows / 8·STRIPS,).

    Args:
        w: a tuple of one or two matrices.
        WHOLE: no read lies outside of a matrix.
    """
    PER: tl.constexpr = ((K + 127) // 128 + W - 1) // W
    EVEN: tl.constexpr = K % (128 * W) == 0
    first = tl.program_id(0) * (8 * STRIPS)
    group, turn = lanes(32 * W)
    start = tl.arange(0, 32 * W) // 32 * PER
    words = g.to(tl.pointer_type(tl.int32))
    mine = start * 64 + group // R * 16 + 4 * turn
    at = ()
    for i in tl.static_range(len(w)):
        rows = w[i].to(tl.pointer_type(tl.int32)) + first.to(tl.int64) * (K // 2)
        at = at + (rows + (group * (K // 2) + start * 64 + 4 * turn),)
    blocks = ()
    gains = ()
    for j in tl.static_range(DEPTH):
        blocks = blocks + (read_block(at, first, start, j, N, K, STRIPS, WHOLE),)
    for j in tl.static_range(DEPTH if HAS_NORM else 0):
        gains = gains + (read_vectors(words + mine, start, j, K, R, EVEN),)
    gdc_wait(OVERLAP)
    row = x.to(tl.pointer_type(tl.int32)) + (tl.minimum(group % R, M - 1) * (K // 2) + mine)
    vectors = ()
    for j in tl.static_range(DEPTH):
        vectors = vectors + (read_vectors(row, start, j, K, R, EVEN),)
    lane_group, lane_turn = lanes(32)
    n = (first + 2 * lane_turn)[:, None] + tl.arange(0, 2)[None, :]
    place = lane_group.to(tl.int64)[:, None] * N + n
    more = ()
    for strip in tl.static_range(STRIPS):
        y = tl.zeros((32, 2), tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + (n + 8 * strip), mask=n + 8 * strip < N, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            inside = (n + 8 * strip < N) & (lane_group < M)[:, None]
            y += tl.load(residual + (place + 8 * strip), mask=inside, other=0.0).to(tl.float32)
        more = more + (y,)
    squares = tl.zeros((32 * W,), tl.float32)
    sums = ()
    for _ in tl.static_range(8 * STRIPS * len(w)):
        sums = sums + (tl.zeros((32 * W,), tl.float32),)
    for j in tl.static_range(PER):
        if EARLY and j == PER - DEPTH:
            gdc_launch_dependents(OVERLAP)
        scaled = ()
        for i in tl.static_range(R // 2):
            found, squares = scale_words(vectors[j][i], gains[j][i] if HAS_NORM else vectors[j][i], squares, HAS_NORM,
                                         EMULATED)  # fmt: skip
            scaled = scaled + (found,)
        sums = add_block(sums, blocks[j], scaled, R, EMULATED)
        if j + DEPTH < PER:
            blocks = blocks + (read_block(at, first, start, j + DEPTH, N, K, STRIPS, WHOLE),)
            vectors = vectors + (read_vectors(row, start, j + DEPTH, K, R, EVEN),)
            if HAS_NORM:
                gains = gains + (read_vectors(words + mine, start, j + DEPTH, K, R, EVEN),)
    if not EARLY:
        gdc_launch_dependents(OVERLAP)
    rms = 1.0
    if HAS_NORM:
        rms = norm_scales(squares, x, M, eps, K, R, EPS_INSIDE, EMULATED)[:, None]
    for strip in tl.static_range(STRIPS):
        y = total_of(sums, strip) * rms
        if len(w) == 2:
            y = activate(y, ACTIVATION) * (total_of(sums, STRIPS + strip) * rms)
        y = (y + more[strip]).to(out.dtype.element_ty)
        tl.store(out + (place + 8 * strip), y, mask=(n + 8 * strip < N) & (lane_group < M)[:, None])


def takes(x: Tensor, *layers: Linear) -> bool:
    """Whether the kernel multiplies these vectors [M,K] and matrices [N,K]: rows are units of 16 bytes."""

    def known(tensor: Tensor) -> bool:
        return tensor.dtype == torch.bfloat16 and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0

    if not (2 <= len(x) <= MOST_ROWS and x.shape[1] % 8 == 0 and x.shape[1] <= MOST_COLUMNS and known(x)):
        return False
    return all(isinstance(layer, Dense) and known(layer.weight) for layer in layers)


def linear(
    x: Tensor,
    layer: Dense,
    *,
    norm: RMSNormWeight | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """``residual + weight·norm(x) + bias``: x [M,K], weight [N,K] -> [M,N]."""
    return _launch(x, (layer,), norm, residual, "", tile, overlap)


def gate(
    x: Tensor,
    gate: Dense,
    up: Dense,
    *,
    norm: RMSNormWeight | None = None,
    activation: str,
    tile: Tile | None = None,
    overlap: bool = False,
) -> Tensor:
    """``act(gate·norm(x)) · (up·norm(x))``: x [M,K], weights [N,K], without biases -> [M,N]."""
    return _launch(x, (gate, up), norm, None, activation, tile, overlap)


def _launch(
    x: Tensor,
    layers: tuple[Dense, ...],
    norm: RMSNormWeight | None,
    residual: Tensor | None,
    activation: str,
    tile: Tile | None,
    overlap: bool,
) -> Tensor:
    rows, width = layers[0].weight.shape
    padded = triton.next_power_of_2(len(x))
    tile = tile or choose_tile(padded, len(layers), width)
    bias = layers[0].bias
    out = x.new_empty(len(x), rows)
    _row_tiles_kernel[(triton.cdiv(rows, 8 * tile.strips),)](
        x, x if norm is None else norm.weight, tuple(layer.weight for layer in layers), x if bias is None else bias,
        x if residual is None else residual, out, len(x), rows, 0.0 if norm is None else norm.eps, K=width, R=padded,
        W=tile.warps, DEPTH=min(tile.depth, triton.cdiv(width, 128 * tile.warps)), STRIPS=tile.strips, EARLY=tile.early,
        WHOLE=rows % (8 * tile.strips) == 0 and width % (128 * tile.warps) == 0,
        HAS_NORM=norm is not None, EPS_INSIDE=norm is None or norm.eps_inside_root, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, EMULATED=triton.knobs.runtime.interpret,
        OVERLAP=overlap, launch_pdl=overlap, num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip
    return out
