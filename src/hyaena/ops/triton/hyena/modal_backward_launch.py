"""Launcher of the backward kernels of modes as products: which problems go to them, scratch memory, grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton import interpreted
from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.hyena import explicit_launch, launch, segments_launch
from hyaena.ops.triton.hyena.explicit_operands import Operands as ExplicitOperands
from hyaena.ops.triton.hyena.explicit_operands import rows_of
from hyaena.ops.triton.hyena.launch import Gradients, Operands, cdiv, power_of_two
from hyaena.ops.triton.hyena.modal_backward import (
    modal_inputs_kernel,
    modal_powers_kernel,
    modal_products_kernel,
    modal_states_kernel,
)

FEWEST_MODES = 5
"""Complex modes, or pairs of real ones, from which products are faster than the recurrence."""

SHORTEST = 8192
"""Steps from which that was measured."""


@dataclass(frozen=True)
class Tiling:
    """How the kernels cut time and channels.

    Attributes:
        chunk: steps of a chunk, 16 or 64.
        chunks: of a tile, 16 or 64.
        channels: of a program that transposes, a power of two.
        stages: tiles under way together.
        exact: whether the filter's output and the gradient of its input are right to their own rounding.
    """

    chunk: int = 64
    chunks: int = 64
    channels: int = 64
    stages: int = 1
    exact: bool = True


def takes_products(operands: Operands, dlong: Tensor | None) -> bool:
    """Whether products are faster than the recurrence: bfloat16, many modes, no packed documents, a full device."""
    z, modes = operands.z, operands.poles.shape[1]
    if z.dtype != torch.bfloat16 or operands.reset is not None or dlong is not None or z.shape[1] < SHORTEST:
        return False
    if z.device.type != "cuda" or modes < FEWEST_MODES or z.shape[2] % 2:
        return False
    return z.shape[0] * operands.poles.shape[0] >= 8 * torch.cuda.get_device_properties(z.device).multi_processor_count


def backward(
    dy: Tensor, dshort: Tensor | None, dlong: Tensor | None, operands: Operands, *, parameters: bool = True
) -> Gradients:
    """``launch.backward`` by the kernels that suit the problem."""
    if segments_launch.takes_registers_back(operands, dlong):
        return segments_launch.backward_in_registers(dy, dshort, operands, parameters=parameters)
    if takes_products(operands, dlong):
        return backward_products(dy, dshort, operands, parameters=parameters)
    return launch.backward(dy, dshort, dlong, operands, parameters=parameters)


def backward_products(
    dy: Tensor, dshort: Tensor | None, operands: Operands, tiling: Tiling | None = None, *, parameters: bool = True
) -> Gradients:
    """``launch.backward`` by matrix products, for any number of modes, with no gradient of the modes' last state.

    ``reset`` is not looked at, and the number of channels is even.
    """
    operands, dy = operands.contiguous(), dy.contiguous()
    z, weight, bias, poles, residues, skip, short, long, mask, _, real = operands
    batch, length, _ = z.shape
    channels, pairs = poles.shape[:2]
    tiling = tiling or Tiling()
    chunks = cdiv(length, tiling.chunk)
    narrow = z.dtype == torch.bfloat16 and not interpreted()  # the interpreter has no products of bfloat16
    factor, parts, modes = torch.bfloat16 if narrow else torch.float32, 2 - real, pairs * (1 + real)
    shape: dict[str, Any] = {"D": channels, "C": tiling.chunk}
    kinds: dict[str, Any] = {"FACTOR": TYPES[factor], "TERMS": 1 + narrow}
    modal: dict[str, Any] = {"N": modes, "NP": max(16, power_of_two(modes)), "M": tiling.chunks, "PARTS": parts}

    def empty(*size: int) -> Tensor:
        return poles.new_empty(*size)

    x = z.new_empty(2, 1 + narrow, batch, channels, chunks * tiling.chunk, dtype=factor)
    before = rows_of(short, z)
    start: Any = modal_inputs_kernel[(chunks, cdiv(channels, tiling.channels), batch)]
    start(
        z,
        dy,
        weight.t().contiguous(),
        z if bias is None else bias,
        z if before is None else before,
        z if mask is None else mask.view(torch.uint8),
        x,
        length,
        chunks,
        K=weight.shape[1],
        BD=tiling.channels,
        HAS_BIAS=bias is not None,
        HAS_SHORT=before is not None,
        HAS_MASK=mask is not None,
        num_warps=8,
        **shape,
        **kinds,
    )
    line = parts * modal["NP"]
    powers, hops = empty(channels, tiling.chunk + 1, line), empty(channels, tiling.chunks + 1, line)
    out_of, taps = empty(channels, tiling.chunk, line), empty(channels, tiling.chunk)
    start = modal_powers_kernel[(channels,)]
    start(poles, residues, powers, hops, out_of, taps, num_warps=2, **shape, **modal)
    dlong_in = empty(batch, channels, pairs, 2)

    def states(*, reverse: bool) -> Tensor:
        out = empty(batch, channels, chunks + tiling.chunks, parts * modes)
        given = dlong_in if long is None else long
        start: Any = modal_states_kernel[(channels, batch)]
        start(
            *(x, powers, hops, out_of, given, out, dlong_in, chunks),
            REVERSE=reverse,
            HAS_FIRST=long is not None,
            STAGES=tiling.stages,
            num_warps=4,
            **shape,
            **kinds,
            **modal,
        )
        return out

    ahead, behind = states(reverse=False), states(reverse=True)
    g, dw = (z.new_empty(batch, channels // 2, chunks * tiling.chunk // 16, 2, 16) for _ in range(2))
    size = (batch, channels) if parameters else (0, 0)
    sums = empty(*size, 2, pairs, 2)
    start = modal_products_kernel[(channels, batch)]
    start(
        *(x, powers, out_of, taps, residues, ahead, behind, g, dw),
        empty(*size, tiling.chunk, tiling.chunk),
        sums,
        chunks,
        EXACT=tiling.exact and narrow,
        STAGES=tiling.stages,
        PARAMETERS=parameters,
        num_warps=4,
        **shape,
        **kinds,
        **modal,
    )
    gated = ExplicitOperands(z, weight, bias, taps, skip, short, None, mask, None)
    dz, dweight, dbias, dskip, dshort_in = explicit_launch.walk_back(
        dy, dshort, gated, (g, dw), turned=True, parameters=parameters
    )
    dpoles, dresidues = sums.sum(0).unbind(1) if parameters else (empty(0), empty(0))
    return (dz, dweight, dbias, dpoles.contiguous(), dresidues.contiguous(), dskip, dshort_in, dlong_in)
