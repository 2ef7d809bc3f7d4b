"""``rounding`` compiled for the processor by numba: the same candidates, a group at a time in the processor's cache.

The plain operators pass over a tile of memory for every term of every candidate. Sums are formed in another order here,
so that of two candidates whose errors differ by rounding alone, either may be chosen.
"""

from __future__ import annotations

import functools
from array import array

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from hyaena.ops.cpu import team
from hyaena.ops.cpu.memory import FLOAT16, FLOAT32, STAMP, TOKENS, function, hold, kernel, load, store, take, word

BLOCK = 1 << 16
"""Numbers that a thread rounds before it looks for more, about."""

# Places of the arguments; 0 counts blocks of rows.
W, ROWS, WIDTH, GROUP, STEP, H, SHARES, SHARE, FITS, LOW, HIGH, ZERO, MINIMA, HALF, CODES, SCALES, MINIMUMS = range(
    1, 18
)


@intrinsic
def put(context, address, index, value):
    """Write the lowest byte of an int64 to ``address[index]``."""

    def generate(generator, builder, signature, arguments):
        address, index, value = arguments
        byte = ir.IntType(8)
        place = builder.gep(builder.inttoptr(address, byte.as_pointer()), [index], inbounds=True)
        builder.store(builder.trunc(value, byte), place)
        return generator.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@function
def nearest(w, scale, minimum, low, high, zero, q):
    """q of a group w for a scale and a minimum; that of 0 where the scale is 0."""
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    shift = zero - minimum * inverse
    for k in range(len(w)):
        q[k] = min(max(np.rint(w[k] * inverse + shift), low), high)


@function
def squared_error(w, h, scale, minimum, low, high, zero):
    """``Σ h·(scale·(q - zero) + minimum - w)²`` for the nearest q."""
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    shift, back = zero - minimum * inverse, minimum - zero * scale
    total = np.float32(0)
    for k in range(len(w)):
        difference = min(max(np.rint(w[k] * inverse + shift), low), high) * scale + back - w[k]
        total += h[k] * difference * difference
    return total


@function
def fit(w, h, q, zero, minima):
    """The scale and the minimum with the least squared error for numbers q; 0 where they are not determined."""
    none = np.float32(0)
    count = sum_q = sum_qq = sum_w = sum_qw = none
    for k in range(len(w)):
        number = q[k] - zero
        weighed = h[k] * number
        count += h[k]
        sum_q += weighed
        sum_qq += weighed * number
        sum_w += h[k] * w[k]
        sum_qw += weighed * w[k]
    if not minima:
        return (sum_qw / sum_qq if sum_qq > 0 else none), none
    determinant = count * sum_qq - sum_q * sum_q
    scale = (count * sum_qw - sum_q * sum_w) / determinant if determinant > 0 else none
    return scale, (sum_w - scale * sum_q) / count


@function
def begin(least, most, share, high, zero, minima, end):
    """The scale and the minimum of a share of a group's range; numbers around ``zero`` begin at either end of it."""
    none = np.float32(0)
    if minima:
        scale = (most - least) * (share / high)
        return scale, (most + least) / np.float32(2) - scale * (high / np.float32(2))
    if zero == 0:
        return max(most, -least) * (share / high), none
    far = most if most > -least else least
    return far * (share / -zero if end == 0 else share / (high - zero)), none


@function
def stored(value, half, room):
    """A number as it is stored: rounded to float16 by way of two bytes at ``room``, or as it is."""
    if half:
        store(FLOAT16, room, 0, value)
        return load(FLOAT16, room, 0)
    return value


@function
def round_group(p, w, h, q, room):
    """The best scale and minimum of a group, as they are stored; its numbers in ``q``."""
    low, high, zero = np.float32(word(p, LOW)), np.float32(word(p, HIGH)), np.float32(word(p, ZERO))
    minima, half = word(p, MINIMA) != 0, word(p, HALF) != 0
    least = most = w[0]
    for k in range(1, len(w)):
        least, most = min(least, w[k]), max(most, w[k])
    smallest, scale, minimum = np.float32(np.inf), np.float32(0), np.float32(0)
    for i in range(word(p, SHARES)):
        for end in range(2 if zero != 0 else 1):
            a, b = begin(least, most, load(FLOAT32, word(p, SHARE), i), high, zero, minima, end)
            a, b = stored(a, half, room), stored(b, half, room)
            error = squared_error(w, h, a, b, low, high, zero)
            if i + end == 0 or error < smallest:
                smallest, scale, minimum = error, a, b
    nearest(w, scale, minimum, low, high, zero, q)
    for _ in range(word(p, FITS)):
        a, b = fit(w, h, q, zero, minima)
        a, b = stored(a, half, room), stored(b, half, room)
        error = squared_error(w, h, a, b, low, high, zero)
        if not error < smallest:
            break
        smallest, scale, minimum = error, a, b
        nearest(w, scale, minimum, low, high, zero, q)
    return scale, minimum


@function
def round_blocks(p, token):
    """The rows of the blocks that this thread takes."""
    width, group, step, rows = word(p, WIDTH), word(p, GROUP), word(p, STEP), word(p, ROWS)
    half, codes, h = word(p, HALF) != 0, word(p, CODES), word(p, H)
    weights, weigh = np.empty(group, np.float32), np.ones(group, np.float32)
    q, room = np.empty(group, np.float32), np.empty(1, np.float32)
    first = take(p, 0) * step
    while first < rows:
        for row in range(first, min(first + step, rows)):
            for i in range(width // group):
                column, place = i * group, row * (width // group) + i
                for k in range(group):
                    weights[k] = load(token, word(p, W), row * width + column + k)
                    if h:
                        weigh[k] = load(FLOAT32, h, column + k)
                scale, minimum = round_group(p, weights, weigh, q, room.ctypes.data)
                if half:
                    store(FLOAT16, word(p, SCALES), place, scale)
                    store(FLOAT16, word(p, MINIMUMS), place, minimum)
                else:
                    store(FLOAT32, word(p, SCALES), place, scale)
                    store(FLOAT32, word(p, MINIMUMS), place, minimum)
                for k in range(group):
                    put(codes, row * width + column + k, np.int64(q[k]))
        first = take(p, 0) * step
    hold(room)


@functools.lru_cache(maxsize=None, typed=True)  # tokens are told apart by their types
def rounding(token):
    """The kernel for weights of a dtype."""
    stamp = STAMP

    @kernel
    def entry(p):
        _ = stamp
        round_blocks(p, token)

    return entry


def round_all(
    weight: Tensor,
    h: Tensor | None,
    groups: int,
    dtype: torch.dtype,
    limits: tuple[int, int, int],
    search: tuple[tuple[float, ...], int],
    *,
    minima: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (a byte each) [E,D], scales and minima [E,G] of a weight [E,D] on a CPU; see ``rounding.round_weight``.

    Args:
        weight: float32, bfloat16 or float16.
        h: float32 [D], or None.
        groups: of a row.
        dtype: of scales and minima, float32 or float16.
        limits: the least and the largest q, and the q of 0.
        search: shares of a group's range that are tried, and how often the best is fitted.
        minima: whether there are minima; otherwise they are 0.
    """
    weight = weight.contiguous()
    (rows, width), (low, high, zero), (shares, fits) = weight.shape, limits, search
    codes = torch.empty(rows, width, dtype=torch.uint8 if low >= 0 else torch.int8, device="cpu")
    scales, minimums = (torch.empty(rows, groups, dtype=dtype, device="cpu") for _ in range(2))
    tried = torch.tensor(shares, dtype=torch.float32, device="cpu")
    step = max(1, BLOCK // width)
    words = (weight.data_ptr(), rows, width, width // groups, step, 0 if h is None else h.data_ptr())
    words += (len(shares), tried.data_ptr(), fits, low, high, zero, int(minima), int(dtype == torch.float16))
    words += (codes.data_ptr(), scales.data_ptr(), minimums.data_ptr())
    threads = min(torch.get_num_threads(), -(-rows // step))
    team.run(rounding(TOKENS[weight.dtype]).address, array("q", (0, *words)), threads)
    return codes, scales, minimums
