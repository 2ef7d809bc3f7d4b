"""Launcher of the forward kernel of many modes in registers: which problems go to it, its grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.hyena.explicit_operands import rows_of
from hyaena.ops.triton.hyena.launch import Operands, as_words, window
from hyaena.ops.triton.hyena.segments import segments_forward_kernel


def forward_segments(operands: Operands, words: int = 8, registers: int | None = 128, stages: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """``launch.forward`` of problems that the kernel takes."""
    operands = operands.contiguous()
    z, weight, bias, poles, residues, skip, short, long, mask, _, real = operands
    batch, length, _ = z.shape
    channels, modes = poles.shape[:2]
    before = rows_of(short, z)
    y = z.new_empty(batch, length, channels)
    long_out = poles.new_empty(batch, channels, modes, 2)
    numbers = as_words(z, 2)
    start: Any = segments_forward_kernel[(channels // (2 * words), batch)]
    start(
        numbers,
        weight,
        z if bias is None else bias,
        poles,
        residues,
        poles if skip is None else skip,
        numbers if before is None else as_words(before, 2),
        poles if long is None else long,
        z if mask is None else mask.view(torch.uint8),
        as_words(y, 2),
        long_out,
        length,
        REAL=real,
        D=channels,
        N=modes,
        K=weight.shape[1],
        WORDS=words,
        STAGES=stages,
        HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not None,
        HAS_SHORT=before is not None,
        HAS_LONG=long is not None,
        HAS_MASK=mask is not None,
        EMULATED=interpreted(),
        num_warps=words,
        maxnreg=registers,
    )
    return y, window(z, before, mask, None, weight.shape[1] - 1), long_out
