"""The kernels as custom operators of torch: fake implementations and gradients, so that torch.compile keeps one graph.

Complex numbers cross this border as real pairs: poles and residues float32 [D,N,2], the state of the modes [B,D,N,2].
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hyaena.ops.triton.hyena import launch
from hyaena.ops.triton.hyena.launch import Gradients


def _device(z: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()


@torch.library.custom_op("hyaena::hyena", mutates_args=())
def hyena_operator(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor | None,
    iir: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, any T >= 1: shapes and results as in ``launch.forward``."""
    if z.shape[1] > 1 or mask is not None:
        with _device(z):
            return launch.forward(z, weight, bias, poles, residues, skip, fir, iir, mask)
    fir_out = z.new_empty(z.shape[0], z.shape[2], weight.shape[-1] - 1)
    iir_out = poles.new_empty(z.shape[0], *poles.shape)
    before = (torch.zeros_like(fir_out) if fir is None else fir.contiguous(),)
    before += (torch.zeros_like(iir_out) if iir is None else iir.contiguous(),)
    with _device(z):
        y = launch.step(z, weight, bias, poles, residues, skip, *before, fir_out, iir_out)
    return y, fir_out, iir_out


@hyena_operator.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor | None,
    iir: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = z.shape
    return (
        z.new_empty(batch, length, width // 3),
        z.new_empty(batch, width, weight.shape[-1] - 1),
        poles.new_empty(batch, *poles.shape),
    )


@torch.library.custom_op("hyaena::hyena_backward", mutates_args=())
def hyena_backward_operator(
    dy: Tensor,
    dfir: Tensor | None,
    diir: Tensor | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor | None,
    iir: Tensor | None,
    mask: Tensor | None,
) -> Gradients:
    """The gradients, as in ``launch.backward``."""
    with _device(z):
        return launch.backward(dy, dfir, diir, z, weight, bias, poles, residues, skip, fir, iir, mask)


@hyena_backward_operator.register_fake
def _(
    dy: Tensor,
    dfir: Tensor | None,
    diir: Tensor | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor | None,
    iir: Tensor | None,
    mask: Tensor | None,
) -> Gradients:
    batch, _, width = z.shape
    wide = poles.new_empty
    return (
        torch.empty_like(z, memory_format=torch.contiguous_format),
        wide(weight.shape),
        wide(width),
        wide(poles.shape),
        wide(poles.shape),
        wide(width // 3),
        wide(batch, width, weight.shape[-1] - 1),
        wide(batch, *poles.shape),
    )


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)
    ctx.shape = output[0].shape


def _differentiate(ctx: Any, dy: Tensor | None, dfir: Tensor | None, diir: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if dy is None:
        dy = inputs[0].new_zeros(ctx.shape)
    gradients = hyena_backward_operator(dy, dfir, diir, *inputs)
    given = [None if t is None else g.to(t.dtype) for g, t in zip(gradients, inputs[:8], strict=True)]
    return (*given, None)


hyena_operator.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("hyaena::hyena_step", mutates_args=("fir", "iir"))
def hyena_step_operator(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor,
    iir: Tensor,
) -> Tensor:
    """One step [B,1,3D] -> y [B,1,D]; fir and iir, contiguous, are brought up to date in place."""
    with _device(z):
        return launch.step(z, weight, bias, poles, residues, skip, fir, iir, fir, iir)


@hyena_step_operator.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    fir: Tensor,
    iir: Tensor,
) -> Tensor:
    return z.new_empty(z.shape[0], 1, z.shape[2] // 3)
