"""Launches of the step kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyaena.ops.triton.hyena.launch import cdiv, power_of_two
from hyaena.ops.triton.hyena.step import explicit_step_kernel, hyena_step_kernel

CHANNELS = 64
"""Channels of a program; fewer where a filter has many taps, to keep ``NUMBERS`` of a window in it."""
NUMBERS = 2048
PROGRAMS = 2048
"""Programs to keep at least, so that a large device is occupied: about 16 for each processor."""


def rows_of_program(rows: int, blocks: int) -> int:
    """How many rows share the filters that a program reads, where each row takes so many programs: a power of two."""
    return 1 << (max(1, min(16, rows * blocks // PROGRAMS)).bit_length() - 1)


def step_modes(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    short: Tensor,
    long: Tensor,
    short_out: Tensor,
    long_out: Tensor,
    overlap: bool = False,
    real: bool = False,
    places: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Launch the kernel of a filter of modes; the outputs may be the states that are read.

    Shapes and ``real`` as in ``launch.Operands`` with T = 1; ``places`` are source and target of
    ``DecodeOperators.hyena_at``.
    """
    channels, modes = poles.shape[:2]
    batch, padded = z.shape[0], power_of_two(modes)
    y = z.new_empty(batch, 1, channels)
    blocks = cdiv(channels, CHANNELS)
    rows = rows_of_program(batch, blocks)
    start: Any = hyena_step_kernel[(blocks, cdiv(batch, rows))]
    start(
        z.contiguous(),
        weight.contiguous(),
        z if bias is None else bias,
        poles.contiguous(),
        residues.contiguous(),
        z if skip is None else skip,
        short,
        long,
        y,
        short_out,
        long_out,
        *((z, z, 0, 0) if places is None else (*places, short.stride(0), long.stride(0))),
        batch,
        D=channels,
        N=modes,
        NP=padded,
        K=weight.shape[-1],
        BD=CHANNELS,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not None,
        OVERLAP=overlap,
        PLACES=places is not None,
        REAL=real,
        launch_pdl=overlap,
        num_warps=2,
    )
    return y


def step_taps(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    short: Tensor,
    long: Tensor,
    short_out: Tensor,
    long_out: Tensor,
    overlap: bool = False,
    places: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Launch the kernel of a filter of explicit taps: see ``step_modes``."""
    channels = z.shape[-1] // 3
    groups, count = taps.shape
    columns = power_of_two(count)
    block = max(1, min(CHANNELS, NUMBERS // columns))
    y = z.new_empty(z.shape[0], 1, channels)
    start: Any = explicit_step_kernel[(cdiv(channels, block), z.shape[0])]
    start(
        z.contiguous(),
        weight.contiguous(),
        z if bias is None else bias,
        taps.contiguous(),
        z if skip is None else skip,
        short,
        long,
        y,
        short_out,
        long_out,
        *((z, z, 0, 0) if places is None else (*places, short.stride(0), long.stride(0))),
        D=channels,
        K=weight.shape[-1],
        W=count,
        WP=columns,
        WIDTH=channels // groups,
        BD=block,
        HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not None,
        OVERLAP=overlap,
        PLACES=places is not None,
        launch_pdl=overlap,
        num_warps=1 if block < CHANNELS else 2,  # the sum over a long window stays in one warp
    )
    return y
