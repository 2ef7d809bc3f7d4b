"""Launchers of the kernels for explicit taps: tiles, scratch memory, grids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.ops.triton import FEW_TAPS, interpreted
from hyaena.ops.triton.common import TYPES
from hyaena.ops.triton.hyena.direct import direct_forward_kernel
from hyaena.ops.triton.hyena.direct_backward import direct_backward_kernel
from hyaena.ops.triton.hyena.explicit import explicit_forward_kernel
from hyaena.ops.triton.hyena.explicit_backward import explicit_backward_kernel
from hyaena.ops.triton.hyena.explicit_operands import Gradients, Operands, rows_of
from hyaena.ops.triton.hyena.launch import age, as_words, cdiv, find_boundaries, power_of_two, segment_bits, window
from hyaena.ops.triton.hyena.toeplitz_launch import backward_in_registers, forward_in_registers, takes_registers


@dataclass(frozen=True)
class Tiling:
    """How the kernels of products cut time and channels.

    Attributes:
        chunk: steps of a chunk, a power of two, at least 16.
        runs: of a program, a power of two; with the channels of a group they make the columns of its products.
        length: chunks of a run at most.
        steps: of a segment, a power of two, at most 16.
        channels: of a program at most, a power of two, at least 16.
        warps: of a program.
        stages: chunks whose inputs are under way together, the one that is computed among them.
    """

    chunk: int = 64
    runs: int = 2
    length: int = 32
    steps: int = 8
    channels: int = 16
    warps: int = 4
    stages: int = 2


FORWARD = Tiling()
BACKWARD = Tiling(length=64, stages=2)


def choose_tiling(tiling: Tiling, dtype: torch.dtype) -> Tiling:
    """Factors of four bytes, in two terms, take chunks half as long: shared memory holds the matrices."""
    return tiling if dtype == torch.bfloat16 else replace(tiling, chunk=32, length=2 * tiling.length, stages=2)


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
    before = rows_of(short, z)
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
        keywords |= {"W": 1, "HAS_LONG": False}
    runs, count, before = cdiv(length, walk.run), keywords["W"], rows_of(short, z)

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
    if operands.taps.shape[1] <= FEW_TAPS:
        return forward_direct(operands)
    return forward_in_registers(operands) if takes_registers(operands) else forward_products(operands)


class _Products(NamedTuple):
    """How the kernels of products are launched for a problem.

    Attributes:
        blocks, sets: the grid, for every row.
        stride: steps of a run.
        numbers: of a word.
        before: the state of the short filter as steps of z, if there is one.
        keep, bounds, docs, tails: padding and documents, see the forward kernel and ``launch.Boundaries``.
        keywords: what both kernels are told.
    """

    blocks: int
    sets: int
    stride: int
    numbers: int
    before: Tensor | None
    keep: Tensor
    bounds: Tensor
    docs: Tensor
    tails: Tensor | None
    keywords: dict[str, Any]


def _products(operands: Operands, tiling: Tiling) -> _Products:
    z, weight, bias, taps, _, short, long, mask, reset = operands
    groups, count = taps.shape
    channels, steps = z.shape[2] // 3, weight.shape[1] - 1
    width = channels // groups
    numbers = 2 if z.dtype.itemsize == 2 and width % 2 == 0 else 1
    block = min(tiling.channels, max(16, power_of_two(width)))
    chunks = cdiv(z.shape[1], tiling.chunk)
    sets = cdiv(chunks, tiling.runs * tiling.length)
    words, before = as_words(z, numbers), rows_of(short, z)
    bounds = None if reset is None else find_boundaries(reset, tiling.steps, steps, tiling.chunk // tiling.steps, 1)
    narrow = z.dtype == torch.bfloat16 and not interpreted()  # the interpreter has no products of bfloat16
    keywords = {
        "TYPE": TYPES[z.dtype],
        "FACTOR": TYPES[torch.bfloat16 if narrow else torch.float32],
        "D": channels,
        "K": steps + 1,
        "W": count,
        "WIDTH": width,
        "P": numbers,
        "BW": block // numbers,
        "RUNS": tiling.runs,
        "C": tiling.chunk,
        "L": tiling.steps,
        "BACK": max(1, cdiv(count - 1, tiling.chunk)),
        "TERMS": 2 if narrow and taps.dtype != torch.bfloat16 else 1,
        "STAGES": tiling.stages,
        "HAS_BIAS": bias is not None,
        "HAS_SHORT": short is not None and steps > 0,
        "HAS_LONG": long is not None and count > 1,
        "HAS_MASK": mask is not None,
        "HAS_RESET": reset is not None,
        "num_warps": tiling.warps,
    }
    return _Products(
        groups * cdiv(width, block),
        sets,
        cdiv(chunks, sets * tiling.runs) * tiling.chunk,
        numbers,
        before,
        words if mask is None else segment_bits(mask, tiling.steps, steps),
        words if bounds is None else bounds.segments,
        words if reset is None else reset.cumsum(1, dtype=torch.int32),
        None if bounds is None else bounds.tails,
        keywords,
    )


def forward_products(operands: Operands, tiling: Tiling | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``forward`` by matrix products, for any number of taps; ``tiling`` None to choose."""
    operands = operands.contiguous()
    z, weight, bias, taps, skip, _, long, mask, _ = operands
    batch, length, width = z.shape
    plan = _products(operands, tiling or choose_tiling(FORWARD, z.dtype))
    y = z.new_empty(batch, length, width // 3)
    long_out = taps.new_empty(batch, width // 3, taps.shape[1] - 1, dtype=torch.float32)
    words = as_words(z, plan.numbers)
    start: Any = explicit_forward_kernel[(plan.blocks, plan.sets + 1, batch)]
    start(
        words,
        weight,
        z if bias is None else bias,
        taps,
        z if skip is None else skip,
        words if plan.before is None else as_words(plan.before, plan.numbers),
        z if long is None else long,
        plan.keep,
        plan.bounds,
        plan.docs,
        as_words(y, plan.numbers),
        long_out,
        length,
        plan.stride,
        HAS_SKIP=skip is not None,
        **plan.keywords,
    )
    return y, window(z, plan.before, mask, plan.tails, weight.shape[1] - 1), long_out


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
    operands = operands.contiguous()
    z, weight, reset = operands.z, operands.weight, operands.reset
    if tiling is None and takes_registers(operands):
        g, dw, dtaps, dlong_in = backward_in_registers(dy.contiguous(), operands, parameters=parameters)
    else:
        tiling = tiling or choose_tiling(BACKWARD, z.dtype)
        g, dw, dtaps, dlong_in = _share_of_filter(dy, operands, tiling, parameters)
    if dlong is not None and dlong_in.shape[2]:
        add_window_gradient(dw, dlong_in, dlong, None, None if reset is None else age(reset)[:, -1])
    dz, sums, dshort_in, _ = _walk_back(dy, dshort, None, operands, walk or Walk(), (g, dw), parameters)
    if not parameters:
        return dz, *(sums.new_empty(0) for _ in range(4)), dshort_in, dlong_in  # type: ignore[return-value]
    dweight, dbias, of_skip = _of_short_filter(sums, weight)
    return dz, dweight, dbias, dtaps, of_skip[0].clone(), dshort_in, dlong_in


def _share_of_filter(
    dy: Tensor, operands: Operands, tiling: Tiling, parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``toeplitz_launch.backward_in_registers``, for every problem."""
    z, weight, bias, taps, _, _, long, _, _ = operands
    batch, length, width = z.shape
    plan = _products(operands, tiling)
    groups, count = taps.shape
    g, dw = (z.new_empty(batch, length, width // 3) for _ in range(2))

    def empty(*size: int) -> Tensor:
        return z.new_empty(*size, dtype=torch.float32)

    programs, matrices = batch * plan.sets * plan.blocks, plan.keywords["BACK"] + 1
    outers = empty(programs, matrices, tiling.chunk, tiling.chunk) if parameters else empty(0)
    dtaps = empty(batch, plan.sets, plan.blocks, count) if parameters else empty(0)
    dlong_in = empty(batch, width // 3, count - 1)
    words = as_words(z, plan.numbers)
    start: Any = explicit_backward_kernel[(plan.blocks, plan.sets, batch)]
    start(
        words,
        as_words(dy, plan.numbers),
        weight,
        z if bias is None else bias,
        taps,
        words if plan.before is None else as_words(plan.before, plan.numbers),
        z if long is None else long,
        plan.keep,
        plan.bounds,
        plan.docs,
        outers,
        as_words(g, plan.numbers),
        as_words(dw, plan.numbers),
        dtaps,
        dlong_in,
        length,
        plan.stride,
        WP=power_of_two(count),
        PARAMETERS=parameters,
        **plan.keywords,
    )
    if parameters:
        dtaps = dtaps.view(batch * plan.sets, groups, -1, count).sum(dim=(0, 2))
    return g, dw, dtaps, dlong_in


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
