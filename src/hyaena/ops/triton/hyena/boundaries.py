"""The kernel that packs where documents begin into words, one bit a step, as the forward kernel reads them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def boundaries_kernel(reset, segments, tiles, tails, T, W: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
                      BITS: tl.constexpr):  # fmt: skip
    """Fill the fields of ``launch.Boundaries`` from reset, a byte a step. Grid: (tiles, rows); BITS is a power of two.

    The length of the last document counts up to W: the window of the short filter is no longer.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    reset += row.to(tl.int64) * T
    segment = tile * S + tl.arange(0, S)
    i = tl.arange(0, BITS)[None, :]
    t = segment[:, None] * L + i - W
    begins = tl.load(reset + t, mask=(i < W + L) & (t >= 0) & (t < T), other=0) != 0
    words = tl.sum(tl.where(begins, 1 << i, 0), axis=1)
    tl.store(segments + row * (T // L + 1) + segment, words, mask=segment <= T // L)
    holds = (words >> W) != 0
    tl.store(tiles + row * tl.num_programs(0) + tile, tl.sum(holds.to(tl.int64) << tl.arange(0, S), axis=0))
    if tile == 0:
        back = tl.arange(0, BITS)
        last = tl.load(reset + T - 1 - back, mask=(back < W) & (back < T), other=0)
        tl.store(tails + row, tl.min(tl.where(last != 0, back, W), axis=0))
