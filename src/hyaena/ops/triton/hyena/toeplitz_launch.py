"""Launcher of the kernel of many taps in registers: which problems go to it, its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.hyena.explicit_operands import Operands, rows_of
from hyaena.ops.triton.hyena.launch import as_words, cdiv, window
from hyaena.ops.triton.hyena.toeplitz import MOST_SHORT_TAPS, toeplitz_forward_kernel


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts time and channels.

    Attributes:
        warps: of a program; each has 16 channels.
        blocks: of 16 steps, in a round.
        run: steps of a program, a multiple of 16.
    """

    warps: int = 4
    blocks: int = 4
    run: int = 4096


RESIDENT = 2
"""Programs of four warps that a processor has room for, by their registers."""


def choose_run(length: int, blocks: int, past: int, slots: int) -> int:
    """Steps of a run, where ``blocks`` programs side by side share ``slots`` places with those of other runs.

    All places are taken for as many rounds as there are, and every run begins with ``past`` steps of the one before.
    """
    runs = min(range(1, min(64, cdiv(length, 128)) + 1), key=lambda n: cdiv(blocks * n, slots) * (length / n + past))
    return cdiv(cdiv(length, runs), 64) * 64


def choose_tiling(operands: Operands) -> Tiling:
    """Runs that fill the device evenly."""
    batch, length, width = operands.z.shape
    device = operands.z.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    blocks = batch * cdiv(width // 3, 16 * Tiling.warps)
    return Tiling(run=choose_run(length, blocks, operands.taps.shape[1], processors * RESIDENT))


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
    z, weight, bias, taps, skip, short, long, mask, _ = operands
    batch, length, width = z.shape
    channels, count = width // 3, taps.shape[1]
    tiling = tiling or choose_tiling(operands)
    y = z.new_empty(batch, length, channels)
    long_out = z.new_empty(batch, channels, count - 1, dtype=torch.float32)
    before, words = rows_of(short, z), as_words(z, 2)
    start: Any = toeplitz_forward_kernel[(cdiv(channels, 16 * tiling.warps), cdiv(length, tiling.run), batch)]
    start(
        words,
        weight,
        z if bias is None else bias,
        taps,
        z if skip is None else skip,
        words if before is None else as_words(before, 2),
        z if long is None else long,
        z if mask is None else mask.view(torch.uint8),
        as_words(y, 2),
        long_out,
        length,
        tiling.run,
        D=channels,
        K=weight.shape[1],
        W=count,
        WIDTH=channels // taps.shape[0],
        WARPS=tiling.warps,
        U=tiling.blocks,
        HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not None,
        HAS_SHORT=short is not None,
        HAS_LONG=long is not None,
        HAS_MASK=mask is not None,
        EMULATED=interpreted(),
        num_warps=tiling.warps,
        num_stages=1,
    )
    return y, window(z, before, mask, None, weight.shape[1] - 1), long_out
