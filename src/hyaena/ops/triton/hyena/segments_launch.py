"""Launcher of the kernels of many modes in registers: which problems go to them, their tables, their grids."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.ops.triton import can_overlap, interpreted
from hyaena.ops.triton.hyena.explicit_operands import add_window_gradient, rows_of
from hyaena.ops.triton.hyena.launch import Gradients, Operands, as_words, cdiv, power_of_two
from hyaena.ops.triton.hyena.segments import segments_forward_kernel
from hyaena.ops.triton.hyena.segments_gate import segments_gate_kernel
from hyaena.ops.triton.hyena.segments_gradients import segments_gradients_kernel
from hyaena.ops.triton.hyena.segments_inputs import segments_inputs_kernel
from hyaena.ops.triton.hyena.segments_tables import segments_tables_kernel
from hyaena.ops.triton.hyena.toeplitz import MOST_SHORT_TAPS

TILE = 256
"""Steps of a tile."""

SHORTEST = 1024
"""Steps below which the tables are not worth their making."""

FEWEST_MODES = 3
"""Complex modes, or pairs of real ones, from which the forward kernel is faster than the recurrence."""

FEWEST_BACK, MOST_BACK = 2, 8
"""Between which the backward kernels are; the tables of 16 modes do not fit shared memory."""

ROOM = 227 * 1024
"""Bytes of shared memory of a program, at most: those of a processor of compute capability 9.0."""


class Plan(NamedTuple):
    """How a kernel is launched: words of a program, warps, and tiles on their way to shared memory."""

    words: int
    warps: int
    stages: int

    @property
    def registers(self) -> int:
        """Of a lane, at most."""
        return 128 if self.warps == 16 else 255


def forward_bytes(modes: int, stages: int) -> int:
    """Bytes of shared memory that a word takes in the forward kernel."""
    quads = quads_of(modes)
    return 1024 * (1 + 2 * quads) + 384 * quads + 3072 * stages + 1024


def forward_plan(operands: Operands) -> Plan:
    """A warp for every word; rows of 64 bytes where they fit and fill the device."""
    channels, modes = operands.poles.shape[:2]
    fits = 16 * forward_bytes(modes, 1) <= ROOM and channels % 32 == 0
    if fits and _fills(operands.z.shape[0] * channels // 32, operands.z.device):
        return Plan(16, 16, 1)
    return Plan(8, 8, 2)


def quads_of(modes: int) -> int:
    """Groups of four modes, a power of two."""
    return max(1, power_of_two(modes) // 4)


BACK = Plan(8, 16, 2)
"""Of the backward kernels: two warps for every word."""


def takes_registers(operands: Operands) -> bool:
    """Whether the forward kernel is the fastest: bfloat16, many modes, no packed documents, an evenly filled device."""
    return operands.poles.shape[1] >= FEWEST_MODES and _suits(operands)


def takes_registers_back(operands: Operands, dlong: Tensor | None) -> bool:
    """Whether the backward kernels are the fastest: as above, without padding and states."""
    given = (operands.short, operands.long, operands.mask, dlong)
    return all(t is None for t in given) and FEWEST_BACK <= operands.poles.shape[1] <= MOST_BACK and _suits(operands)


def _suits(operands: Operands) -> bool:
    z, taps = operands.z, operands.weight.shape[1]
    channels = z.shape[2] // 3
    if z.dtype != torch.bfloat16 or z.device.type != "cuda" or operands.reset is not None:
        return False
    if taps > MOST_SHORT_TAPS or z.shape[1] < SHORTEST or channels % 16:
        return False
    if torch.cuda.get_device_properties(z.device).shared_memory_per_block_optin < ROOM:
        return False
    return _fills(z.shape[0] * channels // 16, z.device)


def _fills(programs: int, device: torch.device) -> bool:
    """Whether programs, one on a processor, take at least three quarters of the places in their rounds."""
    if device.type != "cuda":
        return True
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return 4 * programs >= 3 * cdiv(programs, processors) * processors


def make_tables(operands: Operands, directions: int) -> tuple[Tensor, Tensor]:
    """The tables of ``segments_tables_kernel``, as words."""
    poles, residues, skip = operands.poles, operands.residues, operands.skip
    channels, modes = poles.shape[:2]
    quads = quads_of(modes)
    tables = poles.new_empty(channels, directions, 1 + 2 * quads, 32, 4, dtype=torch.int32)
    decays = poles.new_empty(channels, quads, 3, 4, 4)
    start: Any = segments_tables_kernel[(channels // 16, 2, (quads + 1) // 2 + 2)]
    start(
        *(poles, residues, poles if skip is None else skip, tables, decays),
        DIRECTIONS=directions,
        HAS_SKIP=skip is not None,
        WORDS=8,
        num_warps=8,
        **_keywords(operands, "D N REAL EMULATED OVERLAP"),
    )
    return tables, decays.view(torch.int32)


def forward_in_registers(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """``launch.forward`` of problems that the kernel takes."""
    operands = operands.contiguous()
    z, weight, bias, poles, _, _, short, long, mask = operands[:9]
    before = rows_of(short, z)
    batch, length = z.shape[:2]
    channels, modes = poles.shape[:2]
    y = z.new_empty(batch, length, channels)
    window = z.new_empty(batch, 3 * channels, weight.shape[1] - 1)
    long_out = poles.new_empty(batch, channels, modes, 2)
    _start(segments_forward_kernel, forward_plan(operands), operands)(
        *(as_words(z, 2), weight, z if bias is None else bias, poles, *make_tables(operands, 1)),
        z if before is None else as_words(before, 2),
        poles if long is None else long,
        z if mask is None else mask.view(torch.uint8),
        *(as_words(y, 2), window, long_out, length),
        HAS_SHORT=before is not None,
        HAS_LONG=long is not None,
        HAS_MASK=mask is not None,
    )
    return y, window, long_out


def backward_in_registers(
    dy: Tensor, dshort: Tensor | None, operands: Operands, *, parameters: bool = True
) -> Gradients:
    """``launch.backward`` of problems that the kernels take."""
    operands, dy = operands.contiguous(), dy.contiguous()
    z, weight, bias, poles, residues = operands[:5]
    batch, length, width = z.shape
    channels, modes = poles.shape[:2]
    taps, rows = weight.shape[1], batch if parameters else 0

    def empty(*size: int) -> Tensor:
        return poles.new_empty(*size)

    dz, of_filters = torch.empty_like(z), empty(rows, taps + 1, width)
    states = empty(batch, cdiv(length, TILE), channels, quads_of(modes), 4, 2)
    outers, of_states = empty(rows, channels, 16, 16), empty(rows, *poles.shape)
    of_g, of_w = empty(rows, channels, 16, modes, 2), empty(rows, channels, 16, modes, 2)
    given = (as_words(z, 2), as_words(dy, 2), weight, z if bias is None else bias, *make_tables(operands, 2))
    _start(segments_gate_kernel, BACK, operands)(
        *(*given, states, dz, of_filters, outers, of_g, length), PARAMETERS=parameters
    )
    _start(segments_inputs_kernel, BACK, operands)(
        *(*given, states, dz, of_filters, of_w, of_states, length), PARAMETERS=parameters
    )
    dshort_in, dlong_in = empty(batch, width, taps - 1), empty(batch, *poles.shape)
    if dshort is not None:
        add_window_gradient(dz, dshort_in, dshort, None, None)
    if not parameters:
        return (dz, empty(0), empty(0), empty(0), empty(0), empty(0), dshort_in, dlong_in)
    dpoles, dresidues, dskip = torch.empty_like(poles), torch.empty_like(poles), empty(channels)
    dweight, dbias = empty(*weight.shape), empty(width)
    start: Any = segments_gradients_kernel[(channels,)]
    start(
        *(poles, residues, outers, of_w, of_g, of_states, of_filters),
        *(dpoles, dresidues, dskip, dweight, dbias, batch),
        NP=power_of_two(modes),
        num_warps=1,
        launch_pdl=can_overlap(z.device),
        **_keywords(operands, "D N REAL OVERLAP K HAS_BIAS"),
    )
    return (dz, dweight, dbias, dpoles, dresidues, dskip, dshort_in, dlong_in)


def _start(kernel: Any, plan: Plan, operands: Operands) -> Callable[..., Any]:
    """A kernel at its grid, with what ``plan`` and ``operands`` say."""
    z = operands.z
    return functools.partial(
        kernel[(z.shape[2] // (6 * plan.words), z.shape[0])],
        WORDS=plan.words,
        STAGES=plan.stages,
        maxnreg=plan.registers,
        num_warps=plan.warps,
        launch_pdl=can_overlap(z.device),
        **_keywords(operands, "D N REAL EMULATED OVERLAP K HAS_BIAS"),
    )


def _keywords(operands: Operands, names: str) -> dict[str, Any]:
    """What the kernels are told, by names."""
    every: dict[str, Any] = {
        "D": operands.z.shape[2] // 3,
        "N": operands.poles.shape[1],
        "K": operands.weight.shape[1],
        "REAL": operands.real,
        "HAS_BIAS": operands.bias is not None,
        "EMULATED": interpreted(),
        "OVERLAP": can_overlap(operands.z.device),
    }
    return {name: every[name] for name in names.split()}
