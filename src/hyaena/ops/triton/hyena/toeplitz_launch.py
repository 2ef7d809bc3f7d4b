"""Launcher of the kernel of many taps in registers: which problems go to it, its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.hyena.explicit_operands import (
    Gradients,
    Operands,
    add_window_gradient,
    of_short_filter,
    rows_of,
)
from hyaena.ops.triton.hyena.launch import as_words, cdiv, power_of_two, window
from hyaena.ops.triton.hyena.toeplitz import MOST_SHORT_TAPS, toeplitz_forward_kernel
from hyaena.ops.triton.hyena.toeplitz_backward import (
    toeplitz_diagonals_kernel,
    toeplitz_gradients_kernel,
    toeplitz_taps_kernel,
)


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts time and channels.

    Attributes:
        warps: of a program at most; each has 16 channels, and together they divide the channels.
        blocks: of 16 steps, in a round.
        run: steps of a program, a multiple of a round; None for as many as fill the device evenly.
        resident: programs that a processor has room for, by their registers.
    """

    warps: int = 4
    blocks: int = 2
    run: int | None = None
    resident: int = 3


FORWARD = Tiling()
BACKWARD = Tiling(blocks=1, resident=2)
TAPS = Tiling(blocks=1)


def choose_run(length: int, blocks: int, past: int, slots: int) -> int:
    """Steps of a run, where ``blocks`` programs side by side share ``slots`` places with those of other runs.

    All places are taken for as many rounds as there are, and every run begins with ``past`` steps of the one before.
    """
    runs = min(range(1, min(64, cdiv(length, 128)) + 1), key=lambda n: cdiv(blocks * n, slots) * (length / n + past))
    return cdiv(cdiv(length, runs), 64) * 64


def takes_registers(operands: Operands) -> bool:
    """Whether the kernel takes the problem: bfloat16, groups of whole warps, no packed documents, a few short taps."""
    z, weight, taps = operands.z, operands.weight, operands.taps
    return (
        z.dtype == torch.bfloat16
        and taps.dtype == torch.bfloat16
        and z.shape[2] // 3 // taps.shape[0] % 16 == 0
        and 2 <= weight.shape[1] <= MOST_SHORT_TAPS
        and z.shape[1] >= taps.shape[1]
        and operands.reset is None
    )


def forward_in_registers(operands: Operands, tiling: Tiling | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``explicit_launch.forward`` of problems that the kernel takes; ``tiling`` None to choose."""
    operands = operands.contiguous()
    z, skip = operands.z, operands.skip
    batch, length, width = z.shape
    before = rows_of(operands.short, z)
    y = z.new_empty(batch, length, width // 3)
    long_out = z.new_empty(batch, width // 3, operands.taps.shape[1] - 1, dtype=torch.float32)
    tiling = _fit(operands, tiling or FORWARD)
    start: Any = toeplitz_forward_kernel[_grid(operands, tiling)]
    start(
        *_arguments(operands, before, (z if skip is None else skip,)),
        as_words(y, 2),
        long_out,
        length,
        tiling.run,
        U=tiling.blocks,
        HAS_SKIP=skip is not None,
        **_keywords(operands, tiling),
    )
    return y, window(z, before, operands.mask, None, operands.weight.shape[1] - 1), long_out


def _fit(operands: Operands, tiling: Tiling) -> Tiling:
    """The tiling with warps that divide the channels, and a run."""
    z = operands.z
    warps = math.gcd(z.shape[2] // 48, tiling.warps)
    run = tiling.run
    if run is None:
        processors = torch.cuda.get_device_properties(z.device).multi_processor_count if z.is_cuda else 1
        blocks = z.shape[0] * (z.shape[2] // 48 // warps)
        slots = processors * tiling.resident * tiling.warps // warps
        run = choose_run(z.shape[1], blocks, operands.taps.shape[1], slots)
    return replace(tiling, warps=warps, run=run)


def _grid(operands: Operands, tiling: Tiling) -> tuple[int, int, int]:
    batch, length, width = operands.z.shape
    assert tiling.run is not None
    return width // 48 // tiling.warps, cdiv(length, tiling.run), batch


def _arguments(operands: Operands, before: Tensor | None, between: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What both kernels take first; ``between`` comes after the taps."""
    z, weight, bias, taps, _, _, long, mask, _ = operands
    words = as_words(z, 2)
    return (
        words,
        weight,
        z if bias is None else bias,
        taps,
        *between,
        words if before is None else as_words(before, 2),
        z if long is None else long,
        z if mask is None else mask.view(torch.uint8),
    )


def _keywords(operands: Operands, tiling: Tiling) -> dict[str, Any]:
    """What both kernels are told."""
    channels, (groups, count) = operands.z.shape[2] // 3, operands.taps.shape
    return {
        "D": channels,
        "K": operands.weight.shape[1],
        "W": count,
        "WIDTH": channels // groups,
        "WARPS": tiling.warps,
        "HAS_BIAS": operands.bias is not None,
        "HAS_SHORT": operands.short is not None,
        "HAS_LONG": operands.long is not None,
        "HAS_MASK": operands.mask is not None,
        "EMULATED": interpreted(),
        "num_warps": tiling.warps,
        "num_stages": 1,
    }


def backward_in_registers(
    dy: Tensor,
    dshort: Tensor | None,
    operands: Operands,
    tiling: Tiling | None = None,
    taps_tiling: Tiling | None = None,
    *,
    parameters: bool = True,
) -> Gradients:
    """``explicit_launch.backward`` of problems that the kernels take, without a gradient of the last window of w."""
    operands, dy = operands.contiguous(), dy.contiguous()
    z, weight, _, taps, skip, _, _, mask, _ = operands
    batch, _, width = z.shape
    groups, count = taps.shape
    channels, steps = width // 3, weight.shape[1] - 1
    before = rows_of(operands.short, z)

    def empty(*size: int) -> Tensor:
        return z.new_empty(*size, dtype=torch.float32)

    tiling = _fit(operands, tiling or BACKWARD)
    grid = _grid(operands, tiling)
    dz = torch.empty_like(z)
    sums = empty(batch, 4 * grid[1], 3 * steps + 7, channels) if parameters else empty(0)
    dshort_in, dlong_in = empty(batch, width, steps), empty(batch, channels, count - 1)
    first, *rest = _arguments(operands, before, (z if skip is None else skip,))
    start: Any = toeplitz_gradients_kernel[grid]
    start(
        first,
        as_words(dy, 2),
        *rest,
        as_words(dz, 2),
        sums,
        dshort_in,
        dlong_in,
        z.shape[1],
        tiling.run,
        HAS_SKIP=skip is not None,
        PARAMETERS=parameters,
        **_keywords(operands, tiling),
    )
    if dshort is not None:
        add_window_gradient(dz, dshort_in, dshort, mask, None)
    if not parameters:
        return dz, *(empty(0) for _ in range(4)), dshort_in, dlong_in  # type: ignore[return-value]

    tiling = _fit(operands, taps_tiling or TAPS)
    grid = _grid(operands, tiling)
    size = ((count + 14) // 16 + 1) * 256
    outers = empty(batch, grid[1], channels // 16, size)
    words, weights, biases, _, *rest = _arguments(operands, before, ())
    start = toeplitz_taps_kernel[grid]
    start(words, as_words(dy, 2), weights, biases, *rest, outers, z.shape[1], tiling.run, **_keywords(operands, tiling))
    total = outers.view(-1, groups, channels // groups // 16, size).sum(dim=(0, 2))
    dtaps = empty(groups, count)
    start = toeplitz_diagonals_kernel[(groups,)]
    start(total, dtaps, W=count, WP=power_of_two(count))
    dweight, dbias, of_skip = of_short_filter(sums, weight)
    return dz, dweight, dbias, dtaps, of_skip[0].clone(), dshort_in, dlong_in
