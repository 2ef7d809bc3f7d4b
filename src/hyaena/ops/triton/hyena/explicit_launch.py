"""Launchers of the kernels for explicit taps: tiles, scratch memory, grids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.ops.triton import FEW_TAPS, interpreted
from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.hyena.direct import direct_forward_kernel, gate_kernel
from hyaena.ops.triton.hyena.direct_backward import direct_backward_kernel
from hyaena.ops.triton.hyena.explicit import explicit_forward_kernel
from hyaena.ops.triton.hyena.explicit_backward import explicit_backward_kernel
from hyaena.ops.triton.hyena.launch import age, as_words, cdiv, power_of_two, window

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of z, weight, bias, taps, skip, short and long."""


class Operands(NamedTuple):
    """The arguments of the operator with explicit taps.

    Attributes:
        z: [B,T,3D], bfloat16, float16 or float32.
        weight, bias: of the short filter, [3D,K] and [3D] or None.
        taps: of the long filter, [F,W], F divides D.
        skip: [D] or None.
        short, long: the states before z, [B,3D,K-1] and float32 [B,D,W-1]; None for zeros.
        mask: bool [B,T], False where a step is padding; None for no padding.
        reset: bool [B,T], True where a packed document begins; None for none.
    """

    z: Tensor
    weight: Tensor
    bias: Tensor | None
    taps: Tensor
    skip: Tensor | None
    short: Tensor | None
    long: Tensor | None
    mask: Tensor | None
    reset: Tensor | None

    def contiguous(self) -> Operands:
        """The same operands, each contiguous in memory."""
        return Operands(*(None if t is None else t.contiguous() for t in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tiling:
    """How the kernels cut time and channels.

    Attributes:
        chunk: steps of a chunk, a power of two, at least 16.
        channels: of a program at most, a power of two, at least 16.
        run: chunks of a program.
        warps: of a program.
        stages: chunks whose inputs are under way together, the one that is computed among them.
        registers: of a thread at most; fewer let more programs run on a processor.
    """

    chunk: int = 64
    channels: int = 16
    run: int = 32
    warps: int = 4
    stages: int = 1
    registers: int = 128


FORWARD = Tiling()
BACKWARD = Tiling(registers=255)


def choose_tiling(tiling: Tiling, dtype: torch.dtype) -> Tiling:
    """Numbers of four bytes, in two terms, take chunks half as long: shared memory holds the matrices."""
    return tiling if dtype == torch.bfloat16 else replace(tiling, chunk=32, run=2 * tiling.run, registers=255)


@dataclass(frozen=True)
class Walk:
    """How the kernels of few taps cut time and channels.

    Attributes:
        words: of a program, a power of two.
        run: steps of a program.
        group: steps whose inputs are loaded together.
        warps: of a program.
    """

    words: int = 128
    run: int = 256
    group: int = 8
    warps: int = 4


class _Shape(NamedTuple):
    """What both kernels are told of a problem and its tiling."""

    blocks: int
    runs: int
    keywords: dict[str, Any]


def _shape(operands: Operands, tiling: Tiling) -> _Shape:
    z, weight, bias, taps, skip, short, long, mask, reset = operands
    channels = z.shape[2] // 3
    groups, count = taps.shape
    width = channels // groups
    block = min(tiling.channels, max(16, power_of_two(width)))
    narrow = z.dtype == torch.bfloat16 and not interpreted()  # the interpreter has no products of bfloat16
    keywords = {
        "D": channels,
        "K": weight.shape[1],
        "W": count,
        "WIDTH": width,
        "C": tiling.chunk,
        "BC": block,
        "BACK": cdiv(count - 1, tiling.chunk),
        "TERMS": 2 if narrow and taps.dtype != torch.bfloat16 else 1,
        "TYPE": TYPES[torch.bfloat16 if narrow else torch.float32],
        "HAS_BIAS": bias is not None,
        "HAS_SKIP": skip is not None,
        "HAS_SHORT": short is not None and weight.shape[1] > 1,
        "HAS_LONG": long is not None and count > 1,
        "HAS_MASK": mask is not None,
        "HAS_RESET": reset is not None,
        "num_warps": tiling.warps,
        "maxnreg": tiling.registers,
    }
    return _Shape(groups * cdiv(width, block), cdiv(z.shape[1], tiling.chunk * tiling.run), keywords)


def _documents(reset: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """``age``, and the number of every step's document in rising order, 0 before the first boundary: int32 [B,T]."""
    if reset is None:
        return other, other
    return age(reset), reset.cumsum(1, dtype=torch.int32)


def _rows(short: Tensor | None, z: Tensor) -> Tensor | None:
    """The state of the short filter as steps of z, [B,K-1,3D]."""
    return None if short is None else short.to(z.dtype).transpose(1, 2).contiguous()


def _walk(operands: Operands, walk: Walk) -> tuple[int, dict[str, Any]]:
    """Numbers of a word, and what both kernels of few taps are told."""
    z, weight, bias, taps, skip, short, long, mask, reset = operands
    channels = z.shape[2] // 3
    numbers = 2 if z.dtype.itemsize == 2 and channels % 2 == 0 else 1
    keywords = {
        "TYPE": TYPES[z.dtype],
        "D": channels,
        "K": weight.shape[1],
        "W": taps.shape[1],
        "WIDTH": channels // taps.shape[0],
        "P": numbers,
        "BW": min(walk.words, power_of_two(cdiv(channels, numbers))),
        "U": walk.group,
        "HAS_BIAS": bias is not None,
        "HAS_SKIP": skip is not None,
        "HAS_SHORT": short is not None and weight.shape[1] > 1,
        "HAS_LONG": long is not None and taps.shape[1] > 1,
        "HAS_MASK": mask is not None,
        "HAS_RESET": reset is not None,
        "num_warps": walk.warps,
    }
    return numbers, keywords


def forward_direct(operands: Operands, walk: Walk | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``forward`` for up to FEW_TAPS taps."""
    operands = operands.contiguous()
    z, weight, bias, taps, skip, short, long, mask, reset = operands
    batch, length, width = z.shape
    walk = walk or Walk(words=64, warps=2)
    y = z.new_empty(batch, length, width // 3)
    long_out = taps.new_empty(batch, width // 3, taps.shape[1] - 1, dtype=torch.float32)
    before = _rows(short, z)
    numbers, keywords = _walk(operands, walk)
    start: Any = direct_forward_kernel[(cdiv(width // 3, keywords["BW"] * numbers), cdiv(length, walk.run), batch)]
    words = as_words(z, numbers)
    start(
        words,
        weight,
        z if bias is None else bias,
        taps,
        z if skip is None else skip,
        words if before is None else as_words(before, numbers),
        z if long is None else long,
        z if mask is None else mask.view(torch.uint8),
        z if reset is None else reset.view(torch.uint8),
        as_words(y, numbers),
        long_out,
        length,
        walk.run,
        **keywords,
    )
    steps = weight.shape[1] - 1
    tails = None if reset is None else age(reset)[:, -1].clamp(max=steps)
    return y, window(z, before, mask, tails, steps), long_out


def backward_direct(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    operands: Operands,
    walk: Walk | None = None,
    *,
    parameters: bool = True,
) -> Gradients:
    """``backward`` for up to FEW_TAPS taps."""
    operands = operands.contiguous()
    groups, count = operands.taps.shape
    dlong = dlong if count > 1 else None
    dz, sums, dshort_in, dlong_in = _walk_back(dy, dshort, dlong, operands, walk or Walk(), None, parameters)
    if not parameters:
        return dz, *(sums.new_empty(0) for _ in range(4)), dshort_in, dlong_in  # type: ignore[return-value]
    dweight, dbias, of_taps = _of_short_filter(sums, operands.weight)
    dtaps = of_taps.view(count, groups, -1).sum(-1).t().contiguous()
    return dz, dweight, dbias, dtaps, of_taps[0].clone(), dshort_in, dlong_in


def _walk_back(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    operands: Operands,
    walk: Walk,
    given: tuple[Tensor, Tensor] | None,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of z, of the parameters (``sums`` of the kernel) and of both states.

    ``given`` are the long filter's output and the gradient of its input, where those are known.
    """
    z, weight, bias, taps, skip, short, long, mask, reset = operands
    batch, length, width = z.shape
    channels, steps = width // 3, weight.shape[1] - 1
    numbers, keywords = _walk(operands, walk)
    if given is not None:
        keywords |= {"W": 1, "HAS_SKIP": False, "HAS_LONG": False}
    runs, count, before = cdiv(length, walk.run), keywords["W"], _rows(short, z)

    def empty(*size: int) -> Tensor:
        return z.new_empty(*size, dtype=torch.float32)

    dz = torch.empty_like(z)
    sums = empty(batch, runs, 3 * (steps + 1) + 3 + count, channels) if parameters else empty(0)
    dshort_in, dlong_in = empty(batch, width, steps), empty(batch, channels, count - 1)
    ages = z if reset is None else age(reset)
    words = as_words(z, numbers)
    start: Any = direct_backward_kernel[(cdiv(channels, keywords["BW"] * numbers), runs, batch)]
    start(
        words,
        as_words(dy, numbers),
        weight,
        z if bias is None else bias,
        taps,
        z if skip is None else skip,
        words if before is None else as_words(before, numbers),
        z if long is None else long,
        z if mask is None else mask.view(torch.uint8),
        z if reset is None else reset.view(torch.uint8),
        ages,
        z if dlong is None else dlong.contiguous(),
        *((words, words) if given is None else (as_words(t, numbers) for t in given)),
        as_words(dz, numbers),
        sums,
        dshort_in,
        dlong_in,
        length,
        walk.run,
        HAS_DLONG=dlong is not None,
        PARAMETERS=parameters,
        GIVEN=given is not None,
        **keywords,
    )
    if dshort is not None and steps:
        add_window_gradient(dz, dshort_in, dshort, mask, None if reset is None else ages[:, -1])
    return dz, sums, dshort_in, dlong_in


def _of_short_filter(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight and bias, and what ``sums`` has of the long filter: [3D,K], [3D], [W,D]."""
    width, taps = weight.shape
    total = sums.sum(dim=(0, 1))  # [3K+3+W,D]
    dweight = total[: 3 * taps].view(3, taps, width // 3).flip(1).transpose(1, 2).reshape(width, taps)
    return dweight, total[3 * taps : 3 * taps + 3].reshape(width).clone(), total[3 * taps + 3 :]


def forward(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel for this number of taps.

    Returns:
        y [B,T,D] and the state of the short filter in the dtype of z, that of the long filter float32 [B,D,W-1].
    """
    few = operands.taps.shape[1] <= FEW_TAPS
    return forward_direct(operands) if few else forward_products(operands)


def forward_products(operands: Operands, tiling: Tiling | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``forward`` by matrix products, for any number of taps; ``tiling`` None to choose."""
    tiling = tiling or choose_tiling(FORWARD, operands.z.dtype)
    operands = operands.contiguous()
    z, weight, bias, taps, skip, short, long, mask, reset = operands
    batch, length, width = z.shape
    y = z.new_empty(batch, length, width // 3)
    long_out = taps.new_empty(batch, width // 3, taps.shape[1] - 1, dtype=torch.float32)
    before = _rows(short, z)
    ages, docs = _documents(reset, z)
    shape = _shape(operands, tiling)
    start: Any = explicit_forward_kernel[(shape.blocks, shape.runs + 1, batch)]
    start(
        z,
        weight,
        z if bias is None else bias,
        taps,
        z if skip is None else skip,
        z if before is None else before,
        z if long is None else long,
        z if mask is None else mask.view(torch.uint8),
        ages,
        docs,
        y,
        long_out,
        length,
        tiling.run,
        STAGES=tiling.stages,
        **shape.keywords,
    )
    taps_before = weight.shape[1] - 1
    tails = None if reset is None else ages[:, -1].clamp(max=taps_before)
    return y, window(z, before, mask, tails, taps_before), long_out


def backward(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    operands: Operands,
    *,
    parameters: bool = True,
) -> Gradients:
    """Launch the backward kernels for this number of taps.

    Args:
        dy, dshort, dlong: gradients of the results of ``forward``; None for zero.
        parameters: whether the gradients of the filters are wanted.

    Returns:
        The gradients of z (in its dtype), weight, bias, taps, skip, short and long (float32), whether or not the
        argument was None. Those of the filters are empty tensors without ``parameters``.
    """
    few = operands.taps.shape[1] <= FEW_TAPS
    launch = backward_direct if few else backward_products
    return launch(dy, dshort, dlong, operands, parameters=parameters)


def backward_products(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    operands: Operands,
    tiling: Tiling | None = None,
    walk: Walk | None = None,
    *,
    parameters: bool = True,
) -> Gradients:
    """``backward`` by matrix products, for any number of taps; ``tiling`` and ``walk`` None to choose."""
    tiling = tiling or choose_tiling(BACKWARD, operands.z.dtype)
    operands = operands.contiguous()
    z, weight, bias, taps, skip, short, long, mask, reset = operands
    batch, length, width = z.shape
    walk = walk or Walk()
    channels, count = width // 3, taps.shape[1]
    before = _rows(short, z)
    numbers, keywords = _walk(operands, walk)
    w, dg, g, dw = (z.new_empty(batch, length, channels) for _ in range(4))
    words = as_words(z, numbers)
    for name in ("W", "WIDTH", "HAS_SKIP", "HAS_LONG"):
        del keywords[name]
    start: Any = gate_kernel[(cdiv(channels, keywords["BW"] * numbers), cdiv(length, walk.run), batch)]
    start(
        words,
        as_words(dy, numbers),
        weight,
        z if bias is None else bias,
        words if before is None else as_words(before, numbers),
        z if mask is None else mask.view(torch.uint8),
        z if reset is None else reset.view(torch.uint8),
        as_words(w, numbers),
        as_words(dg, numbers),
        length,
        walk.run,
        **keywords,
    )
    blocks, runs, keywords = _shape(operands, tiling)
    programs = batch * runs * blocks

    def empty(*size: int) -> Tensor:
        return z.new_empty(*size, dtype=torch.float32)

    dtaps = empty(batch, runs, blocks, count) if parameters else empty(0)
    dlong_in = empty(batch, channels, count - 1)
    for name in ("K", "HAS_BIAS", "HAS_SHORT", "HAS_MASK"):
        del keywords[name]
    start = explicit_backward_kernel[(blocks, runs, batch)]
    start(
        w,
        dg,
        taps,
        z if skip is None else skip,
        z if long is None else long,
        _documents(reset, z)[1],
        z if dlong is None else dlong.contiguous(),
        empty(programs, keywords["BACK"] + 1, tiling.chunk, tiling.chunk) if parameters else empty(0),
        g,
        dw,
        dtaps,
        dlong_in,
        length,
        tiling.run,
        WP=power_of_two(count),
        STAGES=tiling.stages,
        HAS_DLONG=dlong is not None and count > 1,
        PARAMETERS=parameters,
        **keywords,
    )
    dz, sums, dshort_in, _ = _walk_back(dy, dshort, None, operands, walk, (g, dw), parameters)
    if not parameters:
        return dz, *(empty(0) for _ in range(4)), dshort_in, dlong_in  # type: ignore[return-value]
    dweight, dbias, of_skip = _of_short_filter(sums, weight)
    dtaps = dtaps.view(batch * runs, taps.shape[0], -1, count).sum(dim=(0, 2))
    return dz, dweight, dbias, dtaps, of_skip[0].clone(), dshort_in, dlong_in


def add_window_gradient(
    dz: Tensor, dshort_in: Tensor, dshort: Tensor, mask: Tensor | None, last_age: Tensor | None
) -> None:
    """Add, in place, the gradient of the short filter's state after z to those of z and of the state before."""
    steps, length = dshort.shape[-1], dz.shape[1]
    if last_age is not None:  # steps before the last document are not in the state
        ago = torch.arange(steps - 1, -1, -1, device=dz.device)
        dshort = dshort.masked_fill((ago > last_age[:, None])[:, None], 0.0)
    inside = min(steps, length)
    recent = dshort[..., steps - inside :].transpose(1, 2)
    if mask is not None:
        recent = recent * mask[:, length - inside :, None]
    dz[:, length - inside :] += recent
    if length < steps:
        dshort_in[..., length:] += dshort[..., : steps - length]
