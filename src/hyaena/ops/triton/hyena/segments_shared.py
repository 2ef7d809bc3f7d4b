"""Shared memory of the kernels of ``segments``: tiles of words on their way, tables that stay.

Written in Gluon, Triton's language with explicit layouts. Triton's interpreter does not run it, so every function has a
second form (EMULATED), which reads and writes global memory in its place.

A row of a tile is a step, in the order of ``tile_rows``, so that the 32 rows that a warp reads together lie together.
Words are copied 16 bytes at a time, and rows are swizzled by 16 bytes: of a row of 8 or 16 words a warp reads one, in
four wavefronts, which is as few as copies of 16 bytes allow. In the forward kernel a warp owns a word, two channels; in
the backward kernels a channel.
"""

# Gluon's decorators and ranges have no types:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.hyena.toeplitz import half, pack
from hyaena.ops.triton.hyena.words import stack

kernel = triton.jit if interpreted() else gluon.jit
"""The decorator of kernels that use this file."""


@gluon.constexpr_function
def tile_copies(words, warps):
    """The layout in which a tile [TILE,words] is copied and stored: 16 bytes a lane, whole rows."""
    return gl.BlockedLayout([1, 4], [128 // words, words // 4], [warps, 1], [1, 0])


@gluon.constexpr_function
def tile_shared(words):
    """The layout of a tile [TILE,words] in shared memory."""
    return gl.SwizzledSharedLayout(4, 32 // words, words // 4, [1, 0])


@gluon.constexpr_function
def out_shared(words):
    """The layout of a tile [TILE,words] of results in shared memory: no two of 32 rows share a bank in a column."""
    return gl.SwizzledSharedLayout(1, 32 // words, words, [1, 0])


@gluon.constexpr_function
def channels_shared(channels):
    """``out_shared`` of bfloat16 [TILE,channels]."""
    return gl.SwizzledSharedLayout(2, 64 // channels, channels // 2, [1, 0])


@gluon.constexpr_function
def plain_shared(rank):
    """The layout of anything else in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(reversed(range(rank))))


@gluon.constexpr_function
def entry_lanes(warps):
    """The layout of a table's entry [32·warps,4]: a lane has its four words."""
    return gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0])


@gluon.constexpr_function
def quad_lanes(warps):
    """The layout of what the lanes of a column c = lane % 4 share, [warps,4,4]: four words."""
    return gl.SliceLayout(1, gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [warps, 1, 1, 1], [3, 2, 1, 0]))


@triton.jit
def every_lane(WARPS: tl.constexpr, EMULATED: tl.constexpr):
    """The numbers of a program's lanes."""
    if EMULATED:
        out = tl.arange(0, 32 * WARPS)
    else:
        out = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    return out


@triton.jit
def owned(warp, WORDS: tl.constexpr, WARPS: tl.constexpr):
    """What a warp owns of a program's WORDS: a word, or with twice as many warps a channel, even ones first."""
    return warp if WARPS == WORDS else warp % WORDS * 2 + warp // WORDS


@triton.jit
def tile_rows(row):
    """The steps of a tile's rows: neighbours are those of neighbouring lanes, not of time."""
    return row % 32 // 4 * 32 + row % 4 * 4 + row // 128 * 16 + row // 32 % 4


@triton.jit
def make_room(SHAPE: tl.constexpr, LAYOUT: tl.constexpr, EMULATED: tl.constexpr):
    """Shared memory for int32 words."""
    out = 0 if EMULATED else gl.allocate_shared_memory(gl.int32, SHAPE, LAYOUT)
    return out


@triton.jit
def make_rooms(COUNT: tl.constexpr, SHAPE: tl.constexpr, LAYOUT: tl.constexpr, EMULATED: tl.constexpr):
    """``make_room`` for several pieces: between copies to one room are barriers."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (make_room(SHAPE, LAYOUT, EMULATED),)
    return out


@triton.jit
def make_numbers(SHAPE: tl.constexpr, LAYOUT: tl.constexpr, EMULATED: tl.constexpr):
    """Shared memory for bfloat16 numbers."""
    out = 0 if EMULATED else gl.allocate_shared_memory(gl.bfloat16, SHAPE, LAYOUT)
    return out


@triton.jit
def rounded(x, EMULATED: tl.constexpr):
    """Float32 numbers as bfloat16."""
    out = x.to(tl.bfloat16)
    if EMULATED:  # the interpreter's own conversion cuts off
        out = (pack(x, x, True) & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return out


@gluon.constexpr_function
def line_shared():
    """The layout of lines [channels,128], of ``turn_tile``: neither its stores nor its reads meet in a bank."""
    return gl.SwizzledSharedLayout(4, 1, 8, [1, 0])


@gluon.constexpr_function
def numbers_shared(words):
    """``tile_shared`` and ``line_shared`` of the same memory as bfloat16: [TILE,2·words] and [2·words,256]."""
    return gl.SwizzledSharedLayout(8, 32 // words, words // 4, [1, 0]), gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.constexpr_function
def turned_lanes():
    """How ``ldmatrix`` gives a tile [TILE,16] to lanes: each has eight steps of a channel."""
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [32, 0], [64, 0], [128, 0]],
        block_bases=[],
        shape=[256, 16],
    )


@gluon.constexpr_function
def line_lanes():
    """How warps read lines [16,128] of words."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]],
        warp_bases=[[2, 0], [1, 0], [8, 0], [4, 0]],
        block_bases=[],
        shape=[16, 128],
    )


@triton.jit
def channel_rows(row):
    """The steps of a tile's rows for ``turn_tile``: eight of them are two of each of a segment's four lanes."""
    return row // 16 * 16 + row % 8 // 2 * 4 + row // 8 % 2 * 2 + row % 2


@triton.jit
def turn_tile(lines, room, at, EMULATED: tl.constexpr):
    """Lay a tile of eight words down as lines of its channels, in which a lane's eight steps lie together.

    Eight rows of eight channels are transposed by ``ldmatrix``. Lanes find their numbers with one read of 16 bytes, in
    four wavefronts; in the tile they would take eight reads of four.
    """
    if not EMULATED:
        TILES: gl.constexpr = numbers_shared(8)[0]
        LINES: gl.constexpr = numbers_shared(8)[1]
        x = room.index(at)._reinterpret(gl.bfloat16, [256, 16], TILES).load(turned_lanes())
        x = gl.reshape(x, (8, 2, 2, 4, 2, 2, 2, 2, 2))  # g, h, j1, c, j0, and the channel's bits
        x = gl.permute(x, (5, 8, 7, 6, 0, 3, 1, 2, 4))
        lines._reinterpret(gl.bfloat16, [16, 256], LINES).store(gl.reshape(x, (16, 256)))


@triton.jit
def copy_tile(room, at, z, start, T, first, keep, ROW: tl.constexpr, WORDS: tl.constexpr, HAS_MASK: tl.constexpr,
              EMULATED: tl.constexpr, CHANNELS: tl.constexpr = False):  # fmt: skip
    """Begin to copy the words of a tile to a place of ``room``: zero before step 0, from T on, and at padding.

    CHANNELS: for ``turn_tile``.
    """
    if not EMULATED:
        COPIES: gl.constexpr = tile_copies(WORDS, gl.num_warps())
        row = gl.arange(0, 256, layout=gl.SliceLayout(1, COPIES))
        step = (channel_rows(row) if CHANNELS else tile_rows(row)) + start
        here = (step >= 0) & (step < T)
        if HAS_MASK:
            here = here & (gl.load(keep + step, mask=here, other=0) != 0)
        column = first + gl.arange(0, WORDS, layout=gl.SliceLayout(0, COPIES))
        rows = z + step.to(gl.int64) * ROW
        async_copy.async_copy_global_to_shared(
            room.index(at), gl.expand_dims(rows, 1) + gl.expand_dims(column, 0), mask=gl.expand_dims(here, 1)
        )


@triton.jit
def end_group(EMULATED: tl.constexpr):
    """The copies begun since the last call are a group."""
    if not EMULATED:
        async_copy.commit_group()


@triton.jit
def wait_groups(LEFT: tl.constexpr, EMULATED: tl.constexpr):
    """Wait for all groups but the last ones."""
    if not EMULATED:
        async_copy.wait_group(LEFT)


@triton.jit
def read_tile(room, at, z, start, T, word, lane, keep, ROW: tl.constexpr, WORDS: tl.constexpr, HAS_MASK: tl.constexpr,
              EMULATED: tl.constexpr):  # fmt: skip
    """A lane's words of a tile, eight: four steps of each of its two segments."""
    out = ()
    for i in tl.static_range(8):
        if EMULATED:
            step = start + tile_rows(32 * i + lane)
            here = (step >= 0) & (step < T)
            if HAS_MASK:
                here = here & (tl.load(keep + step, mask=here, other=0) != 0)
            x = tl.load(z + step.to(tl.int64) * ROW + word, mask=here, other=0)
        else:
            x = room.index(at).slice(32 * i, 32).load(gl.BlockedLayout([1, 1], [32, 1], [1, WORDS], [0, 1]))
            x = turn(x, WORDS)
        out = out + (x,)
    return out


@triton.jit
def read_channel(lines, z, start, T, channel, lane, ROW: tl.constexpr, EMULATED: tl.constexpr):
    """A lane's numbers of a tile where a warp owns a channel, from the lines of ``turn_tile``: eight, float32."""
    out = ()
    if EMULATED:
        for i in tl.static_range(8):
            step = start + tile_rows(32 * i + lane)
            here = (step >= 0) & (step < T)
            x = tl.load(z + step.to(tl.int64) * ROW + channel // 2, mask=here, other=0)
            out = out + (half_of(x, channel % 2, EMULATED),)
    else:
        x = gl.reshape(lines.load(line_lanes()), (2, 2, 2, 2, 32, 4))  # the channel's bits 3, 0, 1, 2
        words = columns(gl.reshape(gl.permute(x, (1, 0, 3, 2, 4, 5)), (512, 4)), 16)  # as ``owned`` has warps
        for i in tl.static_range(8):
            out = out + (half(words[i // 2], i % 2 == 1),)
    return out


@gluon.constexpr_function
def word_lanes(words):
    """The layout of rows of words [32,words,2] where two warps own a word."""
    return gl.BlockedLayout([1, 1, 1], [32, 1, 1], [1, words, 2], [0, 1, 2])


@triton.jit
def of_channels(x, WORDS: tl.constexpr):
    """Rows of words [32,WORDS], as numbers of lanes, in both warps of a word."""
    x = tl.broadcast_to(gl.expand_dims(x, 2), (32, WORDS, 2))
    x = gl.reshape(gl.permute(x, (2, 1, 0)), (64 * WORDS,))
    return gl.convert_layout(x, gl.BlockedLayout([1], [32], [2 * WORDS], [0]), assert_trivial=True)


@triton.jit
def half_of(word, odd, EMULATED: tl.constexpr):
    """The low or the high bfloat16 number of int32 words, float32."""
    if EMULATED:
        out = tl.where(odd == 1, word & -65536, word << 16).to(tl.float32, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=f,r,r", [word, 0x1044 + odd * 0x2200], dtype=tl.float32, is_pure=True, pack=1
        )
    return out


@triton.jit
def turn(x, WORDS: tl.constexpr):
    """Rows of lanes [32,WORDS], a warp for every column, as numbers of lanes."""
    x = gl.reshape(gl.permute(x, (1, 0)), (32 * WORDS,))
    return gl.convert_layout(x, gl.BlockedLayout([1], [32], [WORDS], [0]), assert_trivial=True)


@triton.jit
def write_tile(room, at, words, to, start, T, word, lane, ROW: tl.constexpr, WORDS: tl.constexpr,
               EMULATED: tl.constexpr):  # fmt: skip
    """Lay a lane's eight words of a tile down, for ``store_tile``."""
    if EMULATED:
        for i in tl.static_range(8):
            step = start + tile_rows(32 * i + lane)
            tl.store(to + step.to(tl.int64) * ROW + word, words[i], mask=step < T)
    else:  # together: between two stores to one room Triton puts a barrier
        x = gl.permute(gl.reshape(stack(words, 8), (WORDS, 32, 2, 2, 2)), (2, 3, 4, 1, 0))
        room.index(at).store(gl.reshape(x, (256, WORDS)))


@triton.jit
def store_tile(room, at, to, start, T, first, ROW: tl.constexpr, WORDS: tl.constexpr, EMULATED: tl.constexpr):
    """Store a tile of ``write_tile``."""
    if not EMULATED:
        COPIES: gl.constexpr = tile_copies(WORDS, gl.num_warps())
        step = tile_rows(gl.arange(0, 256, layout=gl.SliceLayout(1, COPIES))) + start
        column = first + gl.arange(0, WORDS, layout=gl.SliceLayout(0, COPIES))
        rows = gl.expand_dims(to + step.to(gl.int64) * ROW, 1) + gl.expand_dims(column, 0)
        gl.store(rows, room.index(at).load(COPIES), mask=gl.expand_dims(step < T, 1))


@triton.jit
def write_channel(room, x, to, start, T, channel, lane, ROW: tl.constexpr, WORDS: tl.constexpr,
                  EMULATED: tl.constexpr):  # fmt: skip
    """Lay a lane's eight numbers of a tile of a channel down as bfloat16, for ``store_channels``."""
    if EMULATED:
        for i in tl.static_range(8):
            step = start + tile_rows(32 * i + lane)
            tl.store(to + step.to(tl.int64) * ROW + channel, rounded(x[i], True), mask=step < T)
    else:
        y = gl.reshape(stack(x, 8).to(gl.bfloat16), (2, WORDS, 32, 2, 2, 2))
        room.store(gl.reshape(gl.permute(y, (3, 4, 5, 2, 1, 0)), (256, 2 * WORDS)))


@triton.jit
def store_channels(room, to, start, T, first, ROW: tl.constexpr, WORDS: tl.constexpr, EMULATED: tl.constexpr):
    """Store a tile of ``write_channel``, nothing before step 0; ``first`` is its first channel."""
    if not EMULATED:
        COPIES: gl.constexpr = gl.BlockedLayout([1, 8], [128 // WORDS, WORDS // 4], [2 * WORDS, 1], [1, 0])
        step = tile_rows(gl.arange(0, 256, layout=gl.SliceLayout(1, COPIES))) + start
        column = first + gl.arange(0, 2 * WORDS, layout=gl.SliceLayout(0, COPIES))
        rows = gl.expand_dims(to + step.to(gl.int64) * ROW, 1) + gl.expand_dims(column, 0)
        gl.store(rows, room.load(COPIES), mask=gl.expand_dims((step >= 0) & (step < T), 1))


@triton.jit
def copy_entries(rooms, tables, first, FROM: tl.constexpr, COUNT: tl.constexpr, EACH: tl.constexpr,
                 WORDS: tl.constexpr, WARPS: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """Begin to copy COUNT of a channel's EACH entries, those from FROM on, of all channels of a warp in turn.

    ``first`` is the first word or channel of the program, whichever a warp owns.
    """
    if not EMULATED:
        CHANNELS: gl.constexpr = 2 * WORDS // WARPS
        LANES: gl.constexpr = entry_lanes(WARPS)
        index = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, LANES))
        part = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, LANES)), 0)
        owner = first + owned(index // 32, WORDS, WARPS)
        at = gl.expand_dims(owner * (CHANNELS * EACH * 128) + index % 32 * 4, 1) + part
        for k in tl.static_range(CHANNELS * COUNT):
            entry = k // COUNT * EACH + FROM + k % COUNT
            async_copy.async_copy_global_to_shared(rooms[k], tables + at + entry * 128)


@triton.jit
def read_entry(rooms, place: tl.constexpr, tables, channel, FROM: tl.constexpr, COUNT: tl.constexpr,
               EACH: tl.constexpr, lane, WARPS: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The four words of a lane of entry ``place`` (constant): of the second channel from COUNT on."""
    out = ()
    if EMULATED:
        at = tables + ((channel * EACH + FROM + place % COUNT) * 32 + lane) * 4
        for i in tl.static_range(4):
            out = out + (tl.load(at + i),)
    else:
        out = columns(rooms[place].load(entry_lanes(WARPS)), WARPS)
    return out


@triton.jit
def columns(x, WARPS: tl.constexpr):
    """The four columns of [32·WARPS,4], each a lane's."""
    even, odd = gl.split(gl.reshape(x, (32 * WARPS, 2, 2)))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return (
        gl.convert_layout(a, LANES, assert_trivial=True),
        gl.convert_layout(b, LANES, assert_trivial=True),
        gl.convert_layout(c, LANES, assert_trivial=True),
        gl.convert_layout(d, LANES, assert_trivial=True),
    )


@triton.jit
def copy_quads(rooms, source, STRIDE: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr,
               EMULATED: tl.constexpr):  # fmt: skip
    """Begin to copy COUNT pieces of 16 words of what a warp owns, STRIDE apart: four words for each column."""
    if not EMULATED:
        QUADS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 4, 1], [WARPS, 1, 1], [2, 1, 0])
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, QUADS)))
        column = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, QUADS)))
        part = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, QUADS)))
        place = gl.expand_dims(gl.expand_dims(owned(warp, WORDS, WARPS) * STRIDE, 1), 2)
        place = place + gl.expand_dims(gl.expand_dims(column * 4, 0), 2)
        place = place + gl.expand_dims(gl.expand_dims(part, 0), 1)
        for k in tl.static_range(COUNT):
            async_copy.async_copy_global_to_shared(rooms[k], source + k * 16 + place)


@triton.jit
def read_quads(rooms, source, owner, STRIDE: tl.constexpr, place: tl.constexpr, lane, WARPS: tl.constexpr,
               EMULATED: tl.constexpr):  # fmt: skip
    """The four words of a lane's column, of a piece of ``copy_quads``; ``owner`` is the warp's word or channel."""
    out = ()
    if EMULATED:
        for i in tl.static_range(4):
            out = out + (tl.load(source + owner * STRIDE + place * 16 + lane % 4 * 4 + i),)
    else:
        x = gl.expand_dims(rooms[place].load(quad_lanes(WARPS)), 1)
        shared = tl.broadcast_to(x, (WARPS, 8, 4, 4))
        x = gl.convert_layout(gl.reshape(shared, (32 * WARPS, 4)), entry_lanes(WARPS), assert_trivial=True)
        out = columns(x, WARPS)
    return out


@triton.jit
def copy_before(room, at, z, start, first, ROW: tl.constexpr, WORDS: tl.constexpr, EMULATED: tl.constexpr):
    """Begin to copy the four steps before a tile of all three blocks of a row: zero before step 0."""
    if not EMULATED:
        COPIES: gl.constexpr = tile_copies(WORDS, gl.num_warps())
        line = gl.arange(0, 16, layout=gl.SliceLayout(1, COPIES))
        step = start - 4 + line % 4
        column = first + gl.arange(0, WORDS, layout=gl.SliceLayout(0, COPIES))
        rows = z + step.to(gl.int64) * ROW + line // 4 * (ROW // 3)
        here = gl.expand_dims((step >= 0) & (line < 12), 1)
        async_copy.async_copy_global_to_shared(
            room.index(at), gl.expand_dims(rows, 1) + gl.expand_dims(column, 0), mask=here
        )


@triton.jit
def read_before(room, at, block: tl.constexpr, z, start, channel, REACH: tl.constexpr, ROW: tl.constexpr,
                WORDS: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The numbers of the REACH steps before a tile, of a block of the row, in all lanes of a channel's warp."""
    out = ()
    for k in tl.static_range(REACH):
        if EMULATED:
            step = start - REACH + k
            at_z = z + tl.cast(step, tl.int64) * ROW + block * (ROW // 3) + channel // 2
            x = tl.load(at_z, mask=step >= 0, other=0)
        else:
            line = room.index(at).slice(4 * block + 4 - REACH + k, 1)
            x = line.load(gl.SliceLayout(2, word_lanes(WORDS)))
            x = of_channels(tl.broadcast_to(x, (32, WORDS)), WORDS)
        out = out + (half_of(x, channel % 2, EMULATED),)
    return out
