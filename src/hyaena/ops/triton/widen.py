"""Narrow weights (``ops.Narrow``) made wide in one read and one write, for products with many vectors.

The reference is ``ops.widen``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyaena.ops.narrow import Narrow

BYTES = 1024
"""Of a program: 8 for each of 128 threads."""


@triton.jit
def numbers(codes, BITS: tl.constexpr, FLOATING: tl.constexpr, MINIMA: tl.constexpr):
    """What stands in bytes, q - zero in float32: a tuple of the numbers, or of low and high halves."""
    if FLOATING:  # a float16 of these bits is 256 times smaller
        bits = codes.to(tl.int8, bitcast=True).to(tl.int16)
        bits = (bits & -0x8000) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0,)
    elif BITS == 8:
        return (codes.to(tl.float32),)
    else:
        ZERO: tl.constexpr = 0.0 if MINIMA else 8.0
        return (codes & 15).to(tl.float32) - ZERO, (codes >> 4).to(tl.float32) - ZERO


@triton.jit
def columns(j, i: tl.constexpr, BITS: tl.constexpr):
    """The columns of the numbers i of bytes j of a row."""
    return j if BITS == 8 else j // 16 * 32 + j % 16 + 16 * i


@triton.jit
def _widen_kernel(w, s, m, y, LINE, GROUPS, BW: tl.constexpr, BITS: tl.constexpr, FLOATING: tl.constexpr,
                  MINIMA: tl.constexpr):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BW + tl.arange(0, BW)
    inside = j < LINE
    found = numbers(tl.load(w + row * LINE + j, mask=inside, other=0), BITS, FLOATING, MINIMA)
    group = row * GROUPS + j // (LINE // GROUPS)
    scale = tl.load(s + group, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(m + group, mask=inside, other=0.0).to(tl.float32) if MINIMA else 0.0
    for i in tl.static_range(len(found)):
        place = row * (LINE * 8 // BITS) + columns(j, i, BITS)
        tl.store(y + place, (found[i] * scale + least).to(y.dtype.element_ty), mask=inside)


def widen(layer: Narrow, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """``ops.widen``, on the device of the weight."""
    codes, scale = layer.codes[rows], layer.scale[rows]
    minimum = scale if layer.minimum is None else layer.minimum[rows]
    count, line = codes.shape
    y = torch.empty(count, layer.shape[1], dtype=dtype, device=codes.device)
    with torch.cuda.device_of(codes):  # Triton launches on the current device
        _widen_kernel[(triton.cdiv(line, BYTES), count)](
            codes.view(torch.uint8) if layer.floating else codes, scale, minimum, y, line, scale.shape[1], BW=BYTES,
            BITS=layer.bits, FLOATING=layer.floating, MINIMA=layer.minimum is not None, num_warps=4,
        )  # fmt: skip
    return y
