"""The kernels as custom operators of torch: fake implementations and gradients, so that torch.compile keeps one graph.

Complex numbers are real pairs in the operators' arguments: poles and residues float32 [D,N,2], the state of the modes
[B,D,N,2].
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.long_conv import ExplicitFilter, ModalFilter, RealModalFilter
from hyaena.ops.triton.hyena import explicit_launch, modal_backward_launch, modal_launch
from hyaena.ops.triton.hyena.launch import Gradients, Operands
from hyaena.ops.triton.hyena.step_launch import step_modes, step_taps


def fused_hyena(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: object,
    short: Tensor | None,
    long: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate ``ops.hyena`` in one kernel: y [B,T,D], and the states of both filters after z. Differentiable.

    For arguments that ``ops.triton.unsupported_reason`` finds no fault with.

    Raises:
        InputError: shapes that do not fit.
    """
    batch, length, width = z.shape
    flags = [t for t in (mask, reset) if t is not None]
    if length == 0 or any(t.shape != (batch, length) for t in flags):
        raise InputError(
            f"hyena takes z [B, T>=1, 3D] and a mask and a reset [B, T], not z {tuple(z.shape)} "
            f"and {', '.join(str(tuple(t.shape)) for t in flags) or 'none'}"
        )
    if isinstance(long_filter, ExplicitFilter):
        size = long_filter.taps.shape[1] - 1
    else:
        assert isinstance(long_filter, ModalFilter | RealModalFilter)
        size = long_filter.residues.shape[1]
    shapes = (batch, width, short_weight.shape[-1] - 1), (batch, width // 3, size)
    for state, shape in zip((short, long), shapes, strict=True):
        if state is not None and state.shape != shape:
            raise InputError(f"hyena's states must be {shapes[0]} and {shapes[1]}, and one is {tuple(state.shape)}")
    if isinstance(long_filter, ExplicitFilter):
        long = None if long is None else long.float()
        return explicit_operator(
            z, short_weight, short_bias, long_filter.taps, long_filter.skip, short, long, mask, reset
        )
    poles, residues, pairs = real_pairs(long_filter, long)
    real = isinstance(long_filter, RealModalFilter)
    y, window, pairs = hyena_operator(
        z, short_weight, short_bias, poles, residues, long_filter.skip, short, pairs, mask, reset, real
    )
    return y, window, pairs.flatten(2)[..., :size] if real else torch.view_as_complex(pairs)


def real_pairs(filter: ModalFilter | RealModalFilter, long: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Poles (of real modes: their logarithms), residues and state as pairs, float32 [D,N,2] and [B,D,N,2].

    An odd number of real modes gets another, whose residue is zero.
    """
    if isinstance(filter, ModalFilter):
        pairs = None if long is None else torch.view_as_real(long.to(torch.complex64))
        return torch.view_as_real(filter.poles), torch.view_as_real(filter.residues), pairs
    numbers = [filter.log_poles, filter.residues, None if long is None else long.float()]
    if filter.residues.shape[1] % 2:
        numbers = [None if t is None else torch.nn.functional.pad(t, (0, 1)) for t in numbers]
    log_poles, residues, pairs = (None if t is None else t.unflatten(-1, (-1, 2)) for t in numbers)
    assert log_poles is not None and residues is not None
    return log_poles, residues, pairs


def _device(z: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()


@torch.library.custom_op("hyaena::hyena", mutates_args=())
def hyena_operator(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    short: Tensor | None,
    long: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    real: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the operator for any T >= 1: shapes in ``launch.Operands``, results as in ``launch.forward``."""
    with _device(z):
        if z.shape[1] > 1 or mask is not None or reset is not None:
            operands = Operands(z, weight, bias, poles, residues, skip, short, long, mask, reset, real)
            return modal_launch.forward(operands)
        short_out = z.new_empty(z.shape[0], z.shape[2], weight.shape[-1] - 1)
        long_out = poles.new_empty(z.shape[0], *poles.shape)
        short = torch.zeros_like(short_out) if short is None else short.contiguous()
        long = torch.zeros_like(long_out) if long is None else long.contiguous()
        y = step_modes(z, weight, bias, poles, residues, skip, short, long, short_out, long_out, real=real)
        return y, short_out, long_out


@hyena_operator.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor | None, poles: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = z.shape
    return (
        z.new_empty(batch, length, width // 3),
        z.new_empty(batch, width, weight.shape[-1] - 1),
        poles.new_empty(batch, *poles.shape),
    )


@torch.library.custom_op("hyaena::hyena_backward", mutates_args=())
def hyena_backward_operator(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    short: Tensor | None,
    long: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    real: bool,
    parameters: bool,
) -> Gradients:
    """Compute the gradients, as ``launch.backward`` does."""
    operands = Operands(z, weight, bias, poles, residues, skip, short, long, mask, reset, real)
    with _device(z):
        return modal_backward_launch.backward(dy, dshort, dlong, operands, parameters=parameters)


@hyena_backward_operator.register_fake
def _(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    poles: Tensor,
    *rest: Any,
) -> Gradients:
    batch, width = z.shape[0], z.shape[2]
    parameters = rest[-1]
    shapes = (weight.shape, (width,), poles.shape, poles.shape, (width // 3,)) if parameters else ((0,),) * 5
    dweight, dbias, dpoles, dresidues, dskip = (poles.new_empty(shape) for shape in shapes)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    dshort_in = poles.new_empty(batch, width, weight.shape[-1] - 1)
    return dz, dweight, dbias, dpoles, dresidues, dskip, dshort_in, poles.new_empty(batch, *poles.shape)


@torch.library.custom_op("hyaena::hyena_explicit", mutates_args=())
def explicit_operator(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    short: Tensor | None,
    long: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the operator with taps: shapes in ``explicit_launch.Operands``, results as in its ``forward``."""
    with _device(z):
        if z.shape[1] > 1 or mask is not None or reset is not None:
            operands = explicit_launch.Operands(z, weight, bias, taps, skip, short, long, mask, reset)
            return explicit_launch.forward(operands)
        batch, _, width = z.shape
        short_out = z.new_empty(batch, width, weight.shape[-1] - 1)
        long_out = z.new_empty(batch, width // 3, taps.shape[1] - 1, dtype=torch.float32)
        short = torch.zeros_like(short_out) if short is None else short.contiguous()
        long = torch.zeros_like(long_out) if long is None else long.contiguous()
        y = step_taps(z, weight, bias, taps, skip, short, long, short_out, long_out)
        return y, short_out, long_out


@explicit_operator.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = z.shape
    return (
        z.new_empty(batch, length, width // 3),
        z.new_empty(batch, width, weight.shape[-1] - 1),
        z.new_empty(batch, width // 3, taps.shape[1] - 1, dtype=torch.float32),
    )


@torch.library.custom_op("hyaena::hyena_explicit_backward", mutates_args=())
def explicit_backward_operator(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    skip: Tensor | None,
    short: Tensor | None,
    long: Tensor | None,
    mask: Tensor | None,
    reset: Tensor | None,
    parameters: bool,
) -> explicit_launch.Gradients:
    """Compute the gradients, as ``explicit_launch.backward`` does."""
    operands = explicit_launch.Operands(z, weight, bias, taps, skip, short, long, mask, reset)
    with _device(z):
        return explicit_launch.backward(dy, dshort, dlong, operands, parameters=parameters)


@explicit_backward_operator.register_fake
def _(
    dy: Tensor,
    dshort: Tensor | None,
    dlong: Tensor | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    *rest: Any,
) -> explicit_launch.Gradients:
    batch, width = z.shape[0], z.shape[2]
    shapes = (weight.shape, (width,), taps.shape, (width // 3,)) if rest[-1] else ((0,),) * 4
    states = (batch, width, weight.shape[-1] - 1), (batch, width // 3, taps.shape[1] - 1)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    return dz, *(z.new_empty(shape, dtype=torch.float32) for shape in (*shapes, *states))  # type: ignore[return-value]


def _register_gradients(operator: Any, backward: Any, count: int) -> None:
    """Give an operator its gradients.

    Args:
        operator: its first ``count`` arguments have gradients; the first is z, the last two of them are the states, and
            those between them parameters. Two masks and options follow.
        backward: takes the gradients of the results, the operator's arguments, and whether parameters need gradients.
        count: see above.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: count + 2])
        ctx.options = inputs[count + 2 :]
        ctx.set_materialize_grads(False)
        ctx.shape = output[0].shape

    def differentiate(
        ctx: Any, dy: Tensor | None, dshort: Tensor | None, dlong: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if dy is None:
            dy = inputs[0].new_zeros(ctx.shape)
        wanted = ctx.needs_input_grad[:count]
        gradients = backward(dy, dshort, dlong, *inputs, *ctx.options, parameters=any(wanted[1:-2]))
        given = [g.to(t.dtype) if want else None for g, t, want in zip(gradients, inputs[:count], wanted, strict=True)]
        return (*given, *(None for _ in (*inputs[count:], *ctx.options)))

    operator.register_autograd(differentiate, setup_context=save)


_register_gradients(hyena_operator, hyena_backward_operator, 8)
_register_gradients(explicit_operator, explicit_backward_operator, 7)
