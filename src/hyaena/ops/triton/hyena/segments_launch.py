"""Launcher of the forward kernel of many modes in registers: which problems go to it, its grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.hyena.explicit_operands import add_window_gradient, rows_of
from hyaena.ops.triton.hyena.launch import Gradients, Operands, as_words, cdiv, power_of_two, window
from hyaena.ops.triton.hyena.segments import segments_forward_kernel
from hyaena.ops.triton.hyena.segments_backward import segments_backward_kernel, segments_gradients_kernel
from hyaena.ops.triton.hyena.segments_tables import segments_tables_kernel


def make_tables(operands: Operands, directions: int) -> tuple[Tensor, Tensor]:
    """The tables of ``segments_tables_kernel``."""
    poles, residues, skip = operands.poles, operands.residues, operands.skip
    channels, modes = poles.shape[:2]
    quads = max(1, power_of_two(modes) // 4)
    entries = 2 * quads + 1 if quads > 1 else 3
    tables = poles.new_empty(channels, directions, entries, 32, 4, dtype=torch.int32)
    decays = poles.new_empty(channels, quads, 4, 12)
    start: Any = segments_tables_kernel[(channels // 16, 2, quads + 1)]
    start(
        *(poles, residues, poles if skip is None else skip, tables, decays),
        D=channels,
        N=modes,
        REAL=operands.real,
        WORDS=8,
        DIRECTIONS=directions,
        HAS_SKIP=skip is not None,
        EMULATED=interpreted(),
        num_warps=8,
    )
    return tables, decays


def forward_segments(
    operands: Operands, words: int = 8, registers: int | None = 128, stages: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """``launch.forward`` of problems that the kernel takes."""
    operands = operands.contiguous()
    z, weight, bias, poles, _, _, short, long, mask, _, real = operands
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
        *make_tables(operands, 1),
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
        DIRECTIONS=1,
        HAS_SHORT=before is not None,
        HAS_LONG=long is not None,
        HAS_MASK=mask is not None,
        STATES_ONLY=False,
        EMULATED=interpreted(),
        num_warps=words,
        maxnreg=registers,
    )
    return y, window(z, before, mask, None, weight.shape[1] - 1), long_out


def backward_segments(
    dy: Tensor,
    dshort: Tensor | None,
    operands: Operands,
    words: int = 8,
    registers: int | None = 255,
    stages: int = 1,
    passes: tuple[int, int] = (3, 128),
    *,
    parameters: bool = True,
) -> Gradients:
    """``launch.backward`` of problems that the kernels take: no state, mask, gradient of the modes' last state."""
    operands, dy = operands.contiguous(), dy.contiguous()
    z, weight, bias, poles, residues, _, _, _, _, _, real = operands
    batch, length, width = z.shape
    channels, modes = poles.shape[:2]
    taps = weight.shape[1]
    tiles = cdiv(length, 256)

    def empty(*size: int) -> Tensor:
        return poles.new_empty(*size)

    states = empty(batch, tiles, channels, modes, 2)
    numbers, grid = as_words(z, 2), (channels // (2 * words), batch)
    shape: dict[str, Any] = {"REAL": real, "D": channels, "N": modes, "K": taps, "WORDS": words}
    shape |= {"HAS_BIAS": bias is not None, "EMULATED": interpreted()}
    tables = make_tables(operands, 2)
    offset = z if bias is None else bias
    start: Any = segments_forward_kernel[grid]
    start(
        *(numbers, weight, offset, poles, *tables, numbers, poles, z, numbers, states, length),
        DIRECTIONS=2,
        STAGES=passes[0],
        HAS_SHORT=False,
        HAS_LONG=False,
        HAS_MASK=False,
        STATES_ONLY=True,
        num_warps=words,
        maxnreg=passes[1],
        **shape,
    )
    dz = torch.empty_like(z)
    some = batch if parameters else 0
    of_filters = empty(some, taps + 1, width)
    outers, of_states = empty(some, channels, 16, 16), empty(some, channels, modes, 2)
    of_w, of_g = empty(some, channels, 16, modes, 2), empty(some, channels, 16, modes, 2)
    start = segments_backward_kernel[grid]
    start(
        *(numbers, as_words(dy, 2), weight, offset, *tables, states, as_words(dz, 2)),
        *(of_filters, outers, of_w, of_g, of_states, length),
        STAGES=stages,
        PARAMETERS=parameters,
        num_warps=words,
        maxnreg=registers,
        **shape,
    )
    dshort_in, dlong_in = empty(batch, width, taps - 1), empty(batch, channels, modes, 2)
    if dshort is not None:
        add_window_gradient(dz, dshort_in, dshort, None, None)
    if not parameters:
        dweight, dbias, dpoles, dresidues, dskip = (empty(0) for _ in range(5))
        return dz, dweight, dbias, dpoles, dresidues, dskip, dshort_in, dlong_in
    dpoles, dresidues, dskip = torch.empty_like(poles), torch.empty_like(poles), empty(channels)
    start = segments_gradients_kernel[(channels,)]
    start(
        *(poles, residues, outers, of_w, of_g, of_states, dpoles, dresidues, dskip, batch),
        REAL=real,
        D=channels,
        N=modes,
        NP=power_of_two(modes),
        num_warps=1,
    )
    total = of_filters.sum(0)
    dweight = total[:taps].t().contiguous()
    return dz, dweight, total[taps].clone(), dpoles, dresidues, dskip, dshort_in, dlong_in
