"""Launcher of the forward kernel of many modes: which problems go to it, its tables, its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.hyena import launch, segments_launch
from hyaena.ops.triton.hyena.launch import Operands, as_words, cdiv, power_of_two, segment_bits, window
from hyaena.ops.triton.hyena.modal import modal_forward_kernel, modal_tables_kernel

FEWEST_MODES = 8
"""Complex modes, or pairs of real ones, from which products are faster than the recurrence."""

SHORTEST = 1024
"""Steps below which the tables are not worth their making."""


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts time and channels.

    Attributes:
        segments: of a tile, a power of two, at least 8.
        chunk: steps of a segment, a power of two, at least 16.
        steps: of a thread, a power of two, at most 16.
        words: of a program, a power of two.
        warps: of a program.
        stages: tiles in flight, the one that is computed among them.
        registers: of a thread at most; None to leave it to the compiler.
    """

    segments: int = 16
    chunk: int = 16
    steps: int = 16
    words: int = 8
    warps: int = 4
    stages: int = 3
    registers: int | None = None


def choose_tiling(modes: int) -> Tiling:
    """The matrices of more modes leave registers for half a tile."""
    return Tiling() if modes <= 8 else Tiling(segments=8, steps=8, stages=2, registers=168)


def takes_products(operands: Operands) -> bool:
    """Whether products are faster than the recurrence: bfloat16, many modes, no packed documents, a full device."""
    z, modes = operands.z, operands.poles.shape[1]
    if z.dtype != torch.bfloat16 or modes < FEWEST_MODES or operands.reset is not None or z.shape[1] < SHORTEST:
        return False
    if z.device.type != "cuda":
        return False
    programs = z.shape[0] * cdiv(operands.poles.shape[0], 2 * choose_tiling(modes).words)
    return programs >= torch.cuda.get_device_properties(z.device).multi_processor_count


def forward(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """``launch.forward`` by the kernel that suits the problem."""
    if segments_launch.takes_registers(operands):
        return segments_launch.forward_in_registers(operands)
    return forward_products(operands) if takes_products(operands) else launch.forward(operands)


def forward_products(operands: Operands, tiling: Tiling | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``launch.forward`` by matrix products, for any number of modes; ``reset`` is not looked at."""
    operands = operands.contiguous()
    z, weight, bias, poles, residues, skip, short, long, mask, _, real = operands
    batch, length, _ = z.shape
    channels, modes = poles.shape[:2]
    taps = weight.shape[1]
    tiling = tiling or choose_tiling(modes)
    numbers = 2 if z.dtype.itemsize == 2 and channels % 2 == 0 else 1
    narrow = z.dtype == torch.bfloat16 and not interpreted()  # the interpreter has no products of bfloat16
    factor = torch.bfloat16 if narrow else torch.float32
    rows = 2 * max(8, power_of_two(modes))
    shape: dict[str, Any] = {
        "FACTOR": TYPES[factor],
        "REAL": real,
        "D": channels,
        "N": modes,
        "NP": rows // 2,
        "C": tiling.chunk,
        "TERMS": 2 if narrow else 1,
    }

    def table(*size: int) -> Tensor:
        return z.new_empty(*size, dtype=factor)

    toeplitz = table(channels, tiling.chunk, tiling.chunk)
    into = table(shape["TERMS"], channels, rows, tiling.chunk)
    out_of = table(shape["TERMS"], channels, tiling.chunk, rows)
    start: Any = modal_tables_kernel[(cdiv(channels, 8),)]
    start(
        poles,
        residues,
        poles if skip is None else skip,
        poles.new_empty(channels, tiling.chunk),
        toeplitz,
        into,
        out_of,
        CH=8,
        HAS_SKIP=skip is not None,
        num_warps=4,
        **shape,
    )
    y = z.new_empty(batch, length, channels)
    long_out = poles.new_empty(batch, channels, modes, 2)
    before = None if short is None else short.to(z.dtype).transpose(1, 2)  # [B,K-1,3D]
    words = as_words(z, numbers)
    start = modal_forward_kernel[(cdiv(channels, tiling.words * numbers), batch)]
    start(
        words,
        weight,
        z if bias is None else bias,
        poles,
        toeplitz,
        into,
        out_of,
        words if before is None else as_words(before, numbers),
        poles if long is None else long,
        words if mask is None else segment_bits(mask, tiling.steps, taps - 1),
        as_words(y, numbers),
        long_out,
        length,
        TYPE=TYPES[z.dtype],
        K=taps,
        P=numbers,
        BW=tiling.words,
        M=tiling.segments,
        L=tiling.steps,
        STAGES=tiling.stages,
        HAS_BIAS=bias is not None,
        HAS_SHORT=short is not None and taps > 1,
        HAS_LONG=long is not None,
        HAS_MASK=mask is not None,
        num_warps=tiling.warps,
        maxnreg=tiling.registers,
        **shape,
    )
    return y, window(z, before, mask, None, taps - 1), long_out
