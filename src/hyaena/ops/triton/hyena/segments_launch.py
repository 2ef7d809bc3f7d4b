"""Launcher of the kernels of many modes in registers: which problems go to them, their tables, their grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.hyena.explicit_operands import add_window_gradient, rows_of
from hyaena.ops.triton.hyena.launch import Gradients, Operands, as_words, cdiv, power_of_two, window
from hyaena.ops.triton.hyena.segments import segments_forward_kernel, segments_states_kernel
from hyaena.ops.triton.hyena.segments_backward import segments_backward_kernel
from hyaena.ops.triton.hyena.segments_tables import segments_tables_kernel
from hyaena.ops.triton.hyena.toeplitz import MOST_SHORT_TAPS

WORDS = 8
"""Of a program, each a warp's: a processor has room for one program, or for two that find states."""

TILE = 256
"""Steps of a tile."""

SHORTEST = 1024
"""Steps below which the tables are not worth their making."""

FEWEST_MODES = 8
"""Complex modes, or pairs of real ones, from which the forward kernel is faster than the recurrence."""

FEWEST_BACK, MOST_BACK = 3, 8
"""Between which the backward kernel is; with 16 it keeps numbers in local memory."""

SHARED = 60 * 1024
"""Bytes of shared memory, about, that a tile under way takes in the backward kernel."""


def takes_registers(operands: Operands) -> bool:
    """Whether the forward kernel is the fastest: bfloat16, many modes, no packed documents, an evenly filled device."""
    return operands.poles.shape[1] >= FEWEST_MODES and _suits(operands)


def takes_registers_back(operands: Operands, dlong: Tensor | None, *, parameters: bool) -> bool:
    """Whether the backward kernel is the fastest: as above, for frozen filters, without padding and states of modes."""
    given = (operands.short, operands.long, operands.mask, dlong)
    if parameters or any(t is not None for t in given):
        return False
    return FEWEST_BACK <= operands.poles.shape[1] <= MOST_BACK and _suits(operands)


def _suits(operands: Operands) -> bool:
    z, taps = operands.z, operands.weight.shape[1]
    channels = z.shape[2] // 3
    if z.dtype != torch.bfloat16 or z.device.type != "cuda" or operands.reset is not None:
        return False
    if taps > MOST_SHORT_TAPS or z.shape[1] < SHORTEST or channels % (2 * WORDS):
        return False
    return _fills(z.shape[0] * channels // (2 * WORDS), z.device)


def _fills(programs: int, device: torch.device) -> bool:
    """Whether programs, one on a processor, take at least three quarters of the places in their rounds."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return 4 * programs >= 3 * cdiv(programs, processors) * processors


def make_tables(operands: Operands, directions: int) -> tuple[Tensor, Tensor]:
    """The tables of ``segments_tables_kernel``."""
    poles, residues, skip = operands.poles, operands.residues, operands.skip
    channels, modes = poles.shape[:2]
    quads = max(1, power_of_two(modes) // 4)
    tables = poles.new_empty(channels, directions, 1 + 2 * quads, 32, 4, dtype=torch.int32)
    decays = poles.new_empty(channels, quads, 4, 12)
    start: Any = segments_tables_kernel[(channels // (2 * WORDS), 2, quads + 1)]
    start(
        *(poles, residues, poles if skip is None else skip, tables, decays),
        DIRECTIONS=directions,
        HAS_SKIP=skip is not None,
        **_keywords(operands, "D N REAL WORDS EMULATED"),
    )
    return tables, decays


def forward_in_registers(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """``launch.forward`` of problems that the kernel takes."""
    operands = operands.contiguous()
    z, weight, bias, poles, _, _, short, long, mask, _, _ = operands
    batch, length, _ = z.shape
    channels, modes = poles.shape[:2]
    before = rows_of(short, z)
    y = z.new_empty(batch, length, channels)
    long_out = poles.new_empty(batch, channels, modes, 2)
    words = as_words(z, 2)
    start: Any = segments_forward_kernel[(channels // (2 * WORDS), batch)]
    start(
        *(words, weight, z if bias is None else bias, poles, *make_tables(operands, 1)),
        words if before is None else as_words(before, 2),
        poles if long is None else long,
        z if mask is None else mask.view(torch.uint8),
        *(as_words(y, 2), long_out, length),
        HAS_SHORT=before is not None,
        HAS_LONG=long is not None,
        HAS_MASK=mask is not None,
        maxnreg=255,
        **_keywords(operands, "D N REAL WORDS EMULATED K HAS_BIAS"),
    )
    return y, window(z, before, mask, None, weight.shape[1] - 1), long_out


def backward_in_registers(dy: Tensor, dshort: Tensor | None, operands: Operands) -> Gradients:
    """``launch.backward`` without gradients of the filters, of problems that the kernel takes."""
    operands, dy = operands.contiguous(), dy.contiguous()
    z, weight, bias, poles = operands[:4]
    batch, length, width = z.shape
    channels, modes = poles.shape[:2]
    words, offset, tables = as_words(z, 2), z if bias is None else bias, make_tables(operands, 2)
    states = poles.new_empty(batch, cdiv(length, TILE), channels, modes, 2)
    keywords = _keywords(operands, "D N REAL WORDS EMULATED K HAS_BIAS")
    grid = (channels // (2 * WORDS), batch)
    start: Any = segments_states_kernel[grid]
    start(words, weight, offset, *tables, states, length, STAGES=3, maxnreg=128, **keywords)
    dz = torch.empty_like(z)
    room = torch.cuda.get_device_properties(z.device).shared_memory_per_block_optin if z.is_cuda else 2 * SHARED
    start = segments_backward_kernel[grid]
    start(
        *(words, as_words(dy, 2), weight, offset, *tables, states, as_words(dz, 2), length),
        STAGES=3 if room >= 2 * SHARED else 2,
        maxnreg=255,
        **keywords,
    )
    dshort_in = poles.new_empty(batch, width, weight.shape[1] - 1)
    if dshort is not None:
        add_window_gradient(dz, dshort_in, dshort, None, None)
    nothing = (poles.new_empty(0) for _ in range(5))
    return (dz, *nothing, dshort_in, poles.new_empty(batch, *poles.shape))  # type: ignore[return-value]


def _keywords(operands: Operands, names: str) -> dict[str, Any]:
    """What the kernels are told, by names."""
    every: dict[str, Any] = {
        "D": operands.z.shape[2] // 3,
        "N": operands.poles.shape[1],
        "K": operands.weight.shape[1],
        "REAL": operands.real,
        "WORDS": WORDS,
        "HAS_BIAS": operands.bias is not None,
        "EMULATED": interpreted(),
    }
    return {name: every[name] for name in names.split()} | {"num_warps": WORDS}
