"""How the kernels are cut to the shape of a problem, and started."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hyaena.ops.triton.forward import hyena_forward_kernel
from hyaena.ops.triton.step import hyena_step_kernel

STEP_CHANNELS = 64


@dataclass(frozen=True)
class Tiling:
    """How the forward kernel cuts time and channels.

    Attributes:
        channels: of a program, a power of two.
        segments: of a tile, a power of two.
        steps: of a segment, a multiple of ``load1`` and ``load2``.
        group: steps that sweep 1 gathers at once; divides ``load1``.
        load1, load2: steps whose loads are in flight together, in each sweep.
        warps: of a program.
        stages1, stages2: depth of the software pipeline of each sweep; 1 for none.
        registers: the most a thread may use, or None.
        evict: the cache policy of what is read or written for the last time.
        parts: parts of time, each a program of its own; None for as many as fill the device.
    """

    channels: int = 32
    segments: int = 32
    steps: int = 32
    group: int = 2
    load1: int = 8
    load2: int = 4
    warps: int = 16
    stages1: int = 1
    stages2: int = 1
    registers: int | None = None
    evict: str = ""
    parts: int | None = None


def choose_tiling(modes: int) -> Tiling:
    """More modes need more registers: fewer warps, then one channel per thread in place of two."""
    if modes <= 2:
        return Tiling()
    if modes <= 4:
        return Tiling(segments=16, warps=8, group=1)
    return Tiling(segments=8, warps=8, group=1, load1=4, load2=2)


def choose_parts(programs: int, tiles: int, device: torch.device) -> int:
    """Parts of time: 1 where rows and channels fill the device, since every further part reads x1 and v once more."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles, processors // programs))


def forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor | None,
    iir: Tensor | None,
    mask: Tensor | None,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        z: [B,T,3D], bfloat16, float16 or float32.
        weight, bias: [3D,K] and [3D].
        poles, residues: float32 [D,N,2].
        skip: [D].
        fir, iir: [B,3D,K-1] and float32 [B,D,N,2].
        mask: bool [B,T].
        tiling: None to choose.

    Returns:
        y [B,T,D] and fir in the dtype of z, iir float32 [B,D,N,2].
    """
    batch, length, width = z.shape
    channels, modes = poles.shape[:2]
    taps = weight.shape[-1]
    z, weight, poles, residues = (t.contiguous() for t in (z, weight, poles, residues))
    bias, skip, fir, iir, mask = (None if t is None else t.contiguous() for t in (bias, skip, fir, iir, mask))
    y = torch.empty(batch, length, channels, dtype=z.dtype, device=z.device)
    fir_out = torch.empty(batch, width, taps - 1, dtype=z.dtype, device=z.device)
    iir_out = torch.empty(batch, channels, modes, 2, dtype=torch.float32, device=z.device)

    tiling = tiling or choose_tiling(modes)
    blocks = triton.cdiv(channels, tiling.channels)
    tile = tiling.segments * tiling.steps
    tiles = triton.cdiv(length, tile)
    parts = choose_parts(batch * blocks, tiles, z.device) if tiling.parts is None else tiling.parts
    part_tiles = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, part_tiles)
    lanes = torch.empty(2, batch * parts * blocks * tiling.segments * modes * 2 * tiling.channels, device=z.device)
    sums = torch.empty(batch, max(parts - 1, 1), channels, modes, 2, device=z.device)

    def launch(count: int, states_only: bool) -> None:
        hyena_forward_kernel[(blocks, count, batch)](
            z,
            weight,
            z if bias is None else bias,
            poles,
            residues,
            z if skip is None else skip,
            z if fir is None else fir,
            poles if iir is None else iir,
            z if mask is None else mask.view(torch.uint8),
            lanes[0],
            lanes[1],
            sums,
            y,
            fir_out,
            iir_out,
            length,
            part_tiles * tile,
            D=channels,
            N=modes,
            NP=triton.next_power_of_2(modes),
            K=taps,
            S=tiling.segments,
            L=tiling.steps,
            G=tiling.group,
            U1=tiling.load1,
            U2=tiling.load2,
            BD=tiling.channels,
            STATES_ONLY=states_only,
            PARTS=parts > 1,
            HAS_BIAS=bias is not None,
            HAS_SKIP=skip is not None,
            HAS_FIR=fir is not None,
            HAS_IIR=iir is not None,
            HAS_MASK=mask is not None,
            STAGES1=tiling.stages1,
            STAGES2=tiling.stages2,
            EVICT=tiling.evict,
            num_warps=tiling.warps,
            **({} if tiling.registers is None else {"maxnreg": tiling.registers}),
        )

    if parts > 1:
        launch(parts - 1, True)
    launch(parts, False)
    return y, fir_out, iir_out


def step(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor,
    iir: Tensor,
    fir_out: Tensor,
    iir_out: Tensor,
) -> Tensor:
    """Launch the step kernel: shapes as in ``forward`` with T = 1; the outputs may be the states that are read."""
    channels, modes = poles.shape[:2]
    y = torch.empty(z.shape[0], 1, channels, dtype=z.dtype, device=z.device)
    hyena_step_kernel[(triton.cdiv(channels, STEP_CHANNELS), z.shape[0])](
        z.contiguous(),
        weight.contiguous(),
        z if bias is None else bias,
        poles.contiguous(),
        residues.contiguous(),
        z if skip is None else skip,
        fir,
        iir,
        y,
        fir_out,
        iir_out,
        D=channels,
        N=modes,
        K=weight.shape[-1],
        BD=STEP_CHANNELS,
        HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not None,
        num_warps=2,
    )
    return y
