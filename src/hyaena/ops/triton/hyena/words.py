"""Pieces of the forward kernel: words of P numbers, loads of whole tiles, tuples as tensors, layouts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(word, P: tl.constexpr, TYPE: tl.constexpr):
    """The numbers of words [.,.], float32 [.,.,P]."""
    if P == 1:
        numbers = tl.reshape(word, word.shape + (1,)).to(tl.float32)
    elif TYPE == tl.bfloat16:  # noqa: SIM300
        bits = word.to(tl.uint32, bitcast=True)
        low = (bits << 16).to(tl.float32, bitcast=True)  # the upper half of a float32
        high = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        numbers = tl.join(low, high)
    else:
        bits = word.to(tl.uint32, bitcast=True)
        low = bits.to(tl.uint16).to(TYPE, bitcast=True).to(tl.float32)
        high = (bits >> 16).to(tl.uint16).to(TYPE, bitcast=True).to(tl.float32)
        numbers = tl.join(low, high)
    return numbers


@triton.jit
def store_numbers(y, numbers, inside, P: tl.constexpr, TYPE: tl.constexpr):
    """Numbers [.,.,P] as words to y [.,.].

    Two numbers are packed before the store: the layout that Triton gives to a store of [.,.,2] has neighbouring words
    in different warps, and costs a conversion through shared memory.
    """
    if P == 1:
        tl.store(y, tl.reshape(numbers, numbers.shape[:-1]).to(TYPE), mask=inside)
    else:
        low, high = tl.split(numbers.to(TYPE))
        low = low.to(tl.uint16, bitcast=True).to(tl.uint32)
        high = high.to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.store(y, (low | (high << 16)).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def unpack_all(words, P: tl.constexpr, TYPE: tl.constexpr):
    """Unpack a tuple of words."""
    numbers = ()
    for k in tl.static_range(len(words)):
        numbers = numbers + (unpack(words[k], P, TYPE),)
    return numbers


@triton.jit
def stack(numbers, COUNT: tl.constexpr):
    """At most COUNT tensors, a power of two up to 64, as one with more axes of 2 at its end; zeros fill it up."""
    for _ in tl.static_range(COUNT - len(numbers)):
        numbers = numbers + (tl.zeros_like(numbers[0]),)
    for _ in tl.static_range(6):
        if len(numbers) > 1:
            pairs = ()
            for i in tl.static_range(len(numbers) // 2):
                pairs = pairs + (tl.join(numbers[i], numbers[i + len(numbers) // 2]),)
            numbers = pairs
    return numbers[0]


@triton.jit
def unstack(stacked):
    """The tensors along the last axis of another, a power of two of them, at most 64."""
    COUNT: tl.constexpr = stacked.shape[len(stacked.shape) - 1]
    numbers = (stacked,)
    for _ in tl.static_range(6):
        if len(numbers) < COUNT:
            first = ()
            second = ()
            for i in tl.static_range(len(numbers)):
                pairs = numbers[i]
                if COUNT // len(numbers) > 2:
                    pairs = tl.reshape(pairs, stacked.shape[:-1] + (COUNT // len(numbers) // 2, 2))
                x, y = tl.split(pairs)
                first = first + (x,)
                second = second + (y,)
            numbers = first + second
    if COUNT == 1:
        numbers = (tl.reshape(stacked, stacked.shape[:-1]),)
    return numbers


@triton.jit
def load_words(z, short, word, begin, most, bits, FIRST: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr,
               L: tl.constexpr, W: tl.constexpr, D: tl.constexpr, P: tl.constexpr, WHOLE: tl.constexpr,
               HAS_SHORT: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """COUNT words of every segment, from its step FIRST on: a tuple of [BD/P,S], zero at padding.

    Steps before 0 come from ``short``, W rows of words, or are zero where there is none.

    Args:
        z, short: where one of the three blocks of a row begins.
        word: [BD/P,1].
        begin, most: the first segment's first step; segments that would begin after ``most`` begin there.
        bits: [1,S], bit W+i of a segment: its step i is no padding.
    """
    words = ()
    if COUNT > 0:
        COLUMNS: tl.constexpr = triton.next_power_of_2(COUNT) * S
        column = tl.arange(0, COLUMNS)[None, :]  # (step, segment)
        t = tl.minimum(begin + column % S * L, most) + column // S + FIRST
        at = z + t.to(tl.int64) * (3 * D // P) + word
        inside = (word * P < D) & (column < COUNT * S)
        if FIRST >= 0 and WHOLE:
            block = tl.load(at)
        elif FIRST >= 0:
            block = tl.load(at, mask=inside, other=0)
        elif HAS_SHORT:
            block = tl.load(tl.where(t < 0, short + (t + W) * (3 * D // P) + word, at), mask=inside, other=0)
        else:
            block = tl.load(at, mask=inside & (t >= 0), other=0)
        BW: tl.constexpr = block.shape[0]
        block = unstack(tl.permute(tl.reshape(stay(block), (BW, COLUMNS // S, S)), (0, 2, 1)))
        for i in tl.static_range(COUNT):
            if HAS_MASK:  # noqa: SIM108, one branch is compiled
                words = words + (tl.where(has(bits, W + FIRST + i), block[i], 0),)
            else:
                words = words + (block[i],)
    return words


@triton.jit
def has(bits, i):
    """Whether bit i is set."""
    return (bits >> i) & 1 != 0


@triton.jit
def forget_before(words, bounds):
    """The words of the W steps before a segment, zero where a document begins after them and before the segment.

    Bit i of ``bounds``: a document begins at word i.
    """
    W: tl.constexpr = len(words)
    out = ()
    for i in tl.static_range(W):
        later = (bounds >> (i + 1)) & ((1 << (W - 1 - i)) - 1)
        out = out + (tl.where(later != 0, 0, words[i]),)
    return out


@triton.jit
def stay(x):
    """x [A,C] itself, laid out so that A, then C lies along the threads and warps, and the rest in registers."""
    return tl.gather(x, tl.broadcast_to(tl.arange(0, x.shape[0])[:, None], x.shape), 0)
