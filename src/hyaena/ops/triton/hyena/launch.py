"""Launchers of the operator's kernels: the choice of tiles, scratch memory, and the grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.hyena.backward import backward_chain_kernel, backward_gradients_kernel, backward_sums_kernel
from hyaena.ops.triton.hyena.boundaries import boundaries_kernel
from hyaena.ops.triton.hyena.forward import hyena_forward_kernel

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of z, weight, bias, poles, residues, skip, short and long."""


class Operands(NamedTuple):
    """The arguments of the operator; complex numbers are real pairs.

    Attributes:
        z: [B,T,3D], bfloat16, float16 or float32.
        weight, bias: of the short filter, [3D,K] and [3D] or None.
        poles, residues: of the long filter, float32 [D,N,2].
        skip: [D] or None.
        short, long: the states before z, [B,3D,K-1] and float32 [B,D,N,2]; None for zeros.
        mask: bool [B,T], False where a step is padding; None for no padding.
        reset: bool [B,T], True where a packed document begins; None for none.
        real: pairs are not complex numbers but two real modes, and ``poles`` holds the logarithms of their poles.
    """

    z: Tensor
    weight: Tensor
    bias: Tensor | None
    poles: Tensor
    residues: Tensor
    skip: Tensor | None
    short: Tensor | None
    long: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    real: bool = False

    def contiguous(self) -> Operands:
        """The same operands, each contiguous in memory."""
        return Operands(*(None if t is None else t.contiguous() for t in self[:-1]), self.real)  # type: ignore[arg-type]


EXCHANGE = 16384
"""Bytes of shared memory that Triton may use to rearrange states."""


def cdiv(count: int, size: int) -> int:
    """Ceiling division."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class Tiling:
    """How the forward kernel cuts time and channels.

    Attributes:
        channels: of a program, a power of two.
        segments: of a tile, a power of two, at most 64: within a tile, rounding of the decay adds up.
        steps: of a segment, a power of two, at most 16.
        group: steps that are gathered into a state together; divides ``steps``.
        packed: a thread has two channels of 16-bit numbers; otherwise, and in float32, it has one channel.
        warps: of a program.
        stages: tiles in flight, the one that is computed among them.
        parts: parts of time, each a program of its own; None for as many as fill the device.
    """

    channels: int = 32
    segments: int = 16
    steps: int = 16
    group: int = 4
    packed: bool = True
    warps: int = 8
    stages: int = 3
    parts: int | None = None


def choose_tiling(modes: int, dtype: torch.dtype) -> Tiling:
    """As long a tile as registers hold: a thread needs some for every mode of its channels, and for every step."""
    if modes > 8:
        return Tiling(segments=8, steps=8, group=1, packed=False)
    if modes > 4:
        return Tiling(segments=8, steps=8, group=2, packed=False)
    if modes > 2:
        return Tiling(segments=8, group=2, packed=False)
    return Tiling(segments=16 if dtype.itemsize == 2 else 8)


def choose_stages(tiling: Tiling, taps: int, itemsize: int, device: torch.device) -> int:
    """No more stages than shared memory has room for: each but one holds a tile of z, and the steps before segments."""
    if device.type != "cuda":
        return tiling.stages
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    steps = tiling.steps + power_of_two(taps)
    tile = 3 * tiling.channels * tiling.segments * steps * itemsize
    return max(1, min(tiling.stages, 1 + (room - EXCHANGE) // tile))


def choose_parts(programs: int, tiles: int, device: torch.device) -> int:
    """Parts of time: 1 where rows and channels fill the device, since every further part reads x1 and v once more."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles, processors // programs))


def as_words(x: Tensor, numbers: int) -> Tensor:
    """Contiguous x [...,D] as [...,D/numbers] words that hold so many numbers each."""
    return x.contiguous() if numbers == 1 else x.contiguous().view(torch.int32)


def forward(operands: Operands, tiling: Tiling | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel; ``tiling`` None to choose.

    Returns:
        y [B,T,D] and the state of the short filter in the dtype of z, that of the modes float32 [B,D,N,2].
    """
    operands = operands.contiguous()
    z, weight, bias, poles, residues, skip, short, long, mask, reset, real = operands
    batch, length, _ = z.shape
    channels, modes = poles.shape[:2]
    taps = weight.shape[-1]
    y = z.new_empty(batch, length, channels)
    long_out = poles.new_empty(batch, channels, modes, 2)
    before = None if short is None else short.to(z.dtype).transpose(1, 2)  # [B,K-1,3D]

    tiling = tiling or choose_tiling(modes, z.dtype)
    numbers = 2 if tiling.packed and z.dtype.itemsize == 2 and channels % 2 == 0 else 1
    blocks = cdiv(channels, tiling.channels)
    tile = tiling.segments * tiling.steps
    tiles = cdiv(length, tile)
    parts = choose_parts(batch * blocks, tiles, z.device) if tiling.parts is None else tiling.parts
    part_tiles = cdiv(tiles, parts)
    parts = cdiv(tiles, part_tiles)
    sums = poles.new_empty(batch, max(parts - 1, 1), channels, modes, 2)
    words = as_words(z, numbers)
    keep = words if mask is None else segment_bits(mask, tiling.steps, taps - 1)
    bounds = None
    if reset is not None:
        bounds = find_boundaries(reset, tiling.steps, taps - 1, tiling.segments, part_tiles)

    def launch(count: int, states_only: bool) -> None:
        start: Any = hyena_forward_kernel[(blocks, count, batch)]
        start(
            words,
            weight,
            z if bias is None else bias,
            poles,
            residues,
            z if skip is None else skip,
            words if before is None else as_words(before, numbers),
            poles if long is None else long,
            keep,
            words if bounds is None else bounds.segments,
            words if bounds is None else bounds.tiles,
            words if bounds is None else bounds.parts,
            sums,
            as_words(y, numbers),
            long_out,
            length,
            part_tiles * tile,
            TYPE=TYPES[z.dtype],
            REAL=real,
            D=channels,
            N=modes,
            NP=power_of_two(modes),
            K=taps,
            P=numbers,
            S=tiling.segments,
            L=tiling.steps,
            G=tiling.group,
            BD=tiling.channels,
            STAGES=choose_stages(tiling, taps, z.element_size(), z.device),
            STATES_ONLY=states_only,
            PARTS=parts > 1,
            HAS_BIAS=bias is not None,
            HAS_SKIP=skip is not None,
            HAS_SHORT=short is not None and taps > 1,
            HAS_LONG=long is not None,
            HAS_MASK=mask is not None,
            HAS_RESET=reset is not None,
            num_warps=tiling.warps,
        )

    if parts > 1:
        launch(parts - 1, True)
    launch(parts, False)
    return y, window(z, before, mask, None if bounds is None else bounds.tails, taps - 1), long_out


def segment_bits(mask: Tensor, steps: int, before: int) -> Tensor:
    """Pack a padding mask [B,T] by segments, int32 [B,T/steps+1]: bit i is set where step ``i - before`` is kept.

    Steps before the first count as kept, since they come from a state; those after the last do not.
    """
    mask = torch.nn.functional.pad(mask, (before, 0), value=True)
    mask = torch.nn.functional.pad(mask, (0, steps), value=False)
    bits = mask.unfold(1, before + steps, steps)  # [B,segments,before+steps]
    return (bits << torch.arange(before + steps, device=mask.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


class Boundaries(NamedTuple):
    """Where documents begin, as the forward kernel reads it.

    Attributes:
        segments: int32 [B,T/L+1], bit i of a segment: a document begins at its step ``i - (K-1)``.
        tiles: int64 [B,tiles], bit i of a tile: a document begins in its segment i.
        parts: bool [B,parts], whether a document begins in a part of time.
        tails: int32 [B], how many steps ago the last document began; K-1 where it was longer ago.
    """

    segments: Tensor
    tiles: Tensor
    parts: Tensor
    tails: Tensor


def find_boundaries(reset: Tensor, steps: int, before: int, segments: int, part_tiles: int) -> Boundaries:
    """Pack bool [B,T] for tiles of ``segments`` segments of ``steps`` steps, and parts of ``part_tiles`` tiles."""
    batch, length = reset.shape
    tiles = reset.new_empty(batch, cdiv(length, segments * steps), dtype=torch.int64)
    words = reset.new_empty(batch, length // steps + 1, dtype=torch.int32)
    tails = reset.new_empty(batch, dtype=torch.int32)
    start: Any = boundaries_kernel[(tiles.shape[1], batch)]
    start(
        reset.view(torch.uint8),
        words,
        tiles,
        tails,
        length,
        W=before,
        S=segments,
        L=steps,
        BITS=power_of_two(before + steps),
        num_warps=1,
    )
    parts = torch.nn.functional.pad(tiles, (0, -tiles.shape[1] % part_tiles)).unflatten(1, (-1, part_tiles))
    return Boundaries(words, tiles, parts.any(-1), tails)


def window(z: Tensor, before: Tensor | None, mask: Tensor | None, tails: Tensor | None, steps: int) -> Tensor:
    """Return the state of the short filter [B,3D,steps], the last steps of z [B,T,3D] after ``before`` [B,steps,3D].

    Steps before the last document are zero, see ``Boundaries.tails``.
    """
    recent = z[:, max(0, z.shape[1] - steps) :] if steps else z[:, :0]
    if mask is not None:
        recent = recent * mask[:, z.shape[1] - recent.shape[1] :, None]
    missing = steps - recent.shape[1]
    if missing:
        older = z.new_zeros(z.shape[0], steps, z.shape[2]) if before is None else before
        recent = torch.cat([older[:, steps - missing :], recent], dim=1)
    if tails is not None:
        ago = torch.arange(steps - 1, -1, -1, device=z.device)
        recent = recent.masked_fill((ago > tails[:, None])[:, :, None], 0.0)
    return recent.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def age(reset: Tensor) -> Tensor:
    """How many steps ago the document of every step began, int32 [B,T]; 2^30 and more where that was before the first.

    Tap k of the short filter stays inside the document where ``k <= age``, and a document begins where it is 0.
    """
    steps = torch.arange(reset.shape[1], device=reset.device)
    return (steps - torch.where(reset, steps, -(2**30)).cummax(dim=1).values).int()


@dataclass(frozen=True)
class BackwardTiling:
    """How the backward kernels cut time and channels.

    Attributes:
        chunk: steps of a chunk, a multiple of ``batch`` and at least K-1.
        batch: steps whose states are in registers together.
        channels: of a program, a power of two.
        run: the most chunks of a program; more make fewer partial sums and fewer programs.
    """

    chunk: int = 64
    batch: int = 4
    channels: int = 128
    run: int = 8


def choose_backward_tiling(length: int, channels: int, modes: int) -> BackwardTiling:
    """Short sequences take short chunks; more modes leave registers for fewer steps of a thread."""
    return BackwardTiling(
        chunk=64 if length > 16 else 16,
        batch=4 if modes <= 2 else 2 if modes <= 4 else 1,
        channels=min(128, power_of_two(channels)),
    )


def backward(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    operands: Operands,
    tiling: BackwardTiling | None = None,
    *,
    parameters: bool = True,
) -> Gradients:
    """Launch the backward kernels; ``tiling`` None to choose.

    Args:
        dy, dshort, dlong: gradients of the results of ``forward``; None for zero.
        parameters: whether the gradients of the filters are wanted.

    Returns:
        The gradients of z (in its dtype), weight, bias, poles, residues, skip, short and long (float32), whether or
        not the argument was None. Those of the filters are empty tensors without ``parameters``.
    """
    operands = operands.contiguous()
    z, weight, bias, poles, residues, skip, short, long, mask, reset, real = operands
    batch, length, width = z.shape
    channels, modes = poles.shape[:2]
    taps = weight.shape[-1]
    dy = dy.contiguous()
    dshort, dlong = (None if t is None else t.contiguous() for t in (dshort, dlong))
    keep = z if mask is None else mask.view(torch.uint8)
    ages = z if reset is None else age(reset)
    tiling = tiling or choose_backward_tiling(length, channels, modes)
    steps, held, block = tiling.chunk, tiling.batch, tiling.channels
    warps = max(1, block // 32)
    blocks, chunks = cdiv(channels, block), cdiv(length, steps)
    run = min(tiling.run, max(1, chunks * blocks * batch // 2048))  # not fewer programs than fill the device
    runs = cdiv(chunks, run)

    ahead = poles.new_empty(batch, chunks, modes, 2, channels)
    behind = torch.empty_like(ahead)
    shape: dict[str, Any] = {"D": channels, "N": modes, "C": steps, "REAL": real}
    start: Any = backward_sums_kernel[(blocks, chunks, batch)]
    start(
        z,
        dy,
        weight,
        z if bias is None else bias,
        poles,
        residues,
        z if short is None else short,
        keep,
        ages,
        ahead,
        behind,
        length,
        **shape,
        K=taps,
        U=held,
        BD=block,
        HAS_BIAS=bias is not None,
        HAS_SHORT=short is not None,
        HAS_MASK=mask is not None,
        HAS_RESET=reset is not None,
        num_warps=warps,
    )
    narrow = min(32, block)
    start = backward_chain_kernel[(cdiv(channels, narrow), modes, 2 * batch)]
    start(
        poles,
        poles if long is None else long,
        poles if dlong is None else dlong,
        ages,
        ahead,
        behind,
        length,
        chunks,
        **shape,
        W=taps - 1,
        U=8,
        BD=narrow,
        HAS_LONG=long is not None,
        HAS_DLONG=dlong is not None,
        HAS_RESET=reset is not None,
        num_warps=1,
    )
    dz = torch.empty_like(z)
    rows = 3 * (taps + 1) + 4 * modes + 1
    sums = poles.new_empty(batch, runs, rows, channels) if parameters else poles.new_empty(0)
    saved = poles.new_empty(batch * runs * blocks * cdiv(steps + taps - 1, held) * modes * 2 * block)
    dshort_in = poles.new_empty(batch, width, taps - 1)
    dlong_in = poles.new_empty(batch, channels, modes, 2)
    start = backward_gradients_kernel[(blocks, runs, batch)]
    start(
        z,
        dy,
        weight,
        z if bias is None else bias,
        poles,
        residues,
        z if skip is None else skip,
        z if short is None else short,
        keep,
        ages,
        z if dshort is None else dshort,
        ahead,
        behind,
        saved,
        dz,
        sums,
        dshort_in,
        dlong_in,
        length,
        chunks,
        run,
        **shape,
        K=taps,
        U=held,
        BD=block,
        HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not None,
        HAS_SHORT=short is not None,
        HAS_MASK=mask is not None,
        HAS_RESET=reset is not None,
        HAS_DSHORT=dshort is not None and taps > 1,
        PARAMETERS=parameters,
        num_warps=warps,
    )
    if not parameters:
        dweight, dbias, dpoles, dresidues, dskip = (poles.new_empty(0) for _ in range(5))
        return dz, dweight, dbias, dpoles, dresidues, dskip, dshort_in, dlong_in
    total = sums.sum(dim=(0, 1))  # [rows,D]
    filters, modal = total[: 3 * (taps + 1)].view(3, taps + 1, channels), total[3 * (taps + 1) : -1]
    dweight = filters[:, :taps].transpose(1, 2).reshape(width, taps)
    dpoles, dresidues = modal.view(2, modes, 2, channels).permute(0, 3, 1, 2)
    of_filters = (dweight, filters[:, taps].reshape(width), dpoles, dresidues, total[-1])
    # A custom operator's results must not share storage.
    dweight, dbias, dpoles, dresidues, dskip = (t.clone(memory_format=torch.contiguous_format) for t in of_filters)
    return dz, dweight, dbias, dpoles, dresidues, dskip, dshort_in, dlong_in
