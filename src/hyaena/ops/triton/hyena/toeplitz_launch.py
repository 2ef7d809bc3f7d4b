"""Launcher of the kernel of many taps in registers: which problems go to it, its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.hyena.explicit_operands import Operands, rows_of
from hyaena.ops.triton.hyena.launch import as_words, cdiv, window
from hyaena.ops.triton.hyena.toeplitz import MOST_SHORT_TAPS, toeplitz_forward_kernel
from hyaena.ops.triton.hyena.toeplitz_backward import toeplitz_backward_kernel


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
    z, before = operands.z, rows_of(operands.short, operands.z)
    long_out = z.new_empty(z.shape[0], z.shape[2] // 3, operands.taps.shape[1] - 1, dtype=torch.float32)
    y = _filter(operands, before, long_out, tiling or FORWARD, gated=True)
    return y, window(z, before, operands.mask, None, operands.weight.shape[1] - 1), long_out


def _filter(operands: Operands, before: Tensor | None, long_out: Tensor, tiling: Tiling, *, gated: bool) -> Tensor:
    """Launch the forward kernel."""
    z, _, _, _, skip, *_ = operands
    batch, length, width = z.shape
    y = z.new_empty(batch, length, width // 3)
    tiling = _fit(operands, tiling)
    start: Any = toeplitz_forward_kernel[_grid(operands, tiling)]
    start(
        *_arguments(operands, before, (z if skip is None else skip,)),
        as_words(y, 2),
        long_out,
        length,
        tiling.run,
        U=tiling.blocks,
        HAS_SKIP=skip is not None,
        GATED=gated,
        **_keywords(operands, tiling),
    )
    return y


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
    operands: Operands,
    tiling: Tiling | None = None,
    filter_tiling: Tiling | None = None,
    *,
    parameters: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The long filter's share of ``explicit_launch.backward``.

    Returns:
        The filter's output without the skip, the gradient of its input without the skip [B,T,D], both in the dtype of
        z, the gradients of the taps [F,W] and of the state before z [B,D,W-1], float32. That of the taps is empty
        without ``parameters``.
    """
    operands = operands.contiguous()
    tiling = _fit(operands, tiling or BACKWARD)
    z, before = operands.z, rows_of(operands.short, operands.z)
    batch, length, width = z.shape
    groups, count = operands.taps.shape
    channels = width // 3
    grid = _grid(operands, tiling)

    def empty(*size: int) -> Tensor:
        return z.new_empty(*size, dtype=torch.float32)

    dlong_in = empty(batch, channels, count - 1)
    g = _filter(operands, before, dlong_in, filter_tiling or FORWARD, gated=False)
    dw = torch.empty_like(g)
    size = ((count + 14) // 16 + 1) * 256
    outers = empty(batch, grid[1], channels // 16, size if parameters else 0)
    start: Any = toeplitz_backward_kernel[grid]
    first, *rest = _arguments(operands, before, ())
    start(
        first,
        as_words(dy, 2),
        *rest,
        as_words(dw, 2),
        outers,
        dlong_in,
        length,
        tiling.run,
        PARAMETERS=parameters,
        **_keywords(operands, tiling),
    )
    if not parameters:
        return g, dw, empty(0), dlong_in
    sums = outers.sum(dim=(0, 1)).view(groups, -1, size).sum(1)
    one_hot = (places(count, z.device)[:, None] == torch.arange(count, device=z.device)).double()
    return g, dw, (sums.double() @ one_hot).float(), dlong_in


def places(count: int, device: torch.device) -> Tensor:
    """The lag of every sum that a warp of the backward kernel has, [blocks·8·32], for so many taps."""
    lane = torch.arange(32, device=device)
    value = torch.arange(8, device=device)[:, None]

    def step(slot: Tensor) -> Tensor:
        return slot % 8 // 2 * 4 + slot % 2 + slot // 8 * 2

    later = step(lane // 4 + value % 4 // 2 * 8)
    earlier = step(value // 4 * 8 + lane % 4 * 2 + value % 2)
    block = torch.arange((count + 14) // 16 + 1, device=device)[:, None, None]
    return (block * 16 + later - earlier).flatten()
