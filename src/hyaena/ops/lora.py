"""A frozen linear layer with a trainable update of low rank (LoRA).

    y = W·x + bias + scale·B·(A·x)          A [r,D], B [E,r], r small

Training it costs little more than the gradient of x through the frozen layer, if the wide tensors are read and written
seldom: r is so small that all products with A and B are bound by memory. So the frozen product adds to the update
(``y = scale·B·A·x``, then ``y += W·x`` as one matrix product), and likewise for the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyaena.ops.backend import wants_gradients
from hyaena.ops.linear import Dense, Linear, linear


def lora_linear(x: Tensor, layer: Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``layer(x) + scale·B·(A·x)``: x [..., D] -> [..., E].

    Args:
        x: of the dtype of the layer; under autocast, of any.
        layer: the frozen layer. The weights of a plain one get no gradient here; any other is called.
        a: [r,D], in the dtype of x or wider; it is rounded for the products.
        b: [E,r], likewise.
        scale: the factor of the update.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        if isinstance(layer, Dense):
            layer = Dense(layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    if isinstance(layer, Dense) and not wants_gradients(layer.weight) and x.dtype == layer.weight.dtype:
        return _Frozen.apply(x, layer.weight, layer.bias, a, b, scale)  # type: ignore[return-value]
    h = torch.nn.functional.linear(x, a.to(x.dtype))
    return linear(x, layer) + torch.nn.functional.linear(h, (scale * b).to(x.dtype))


class _Frozen(torch.autograd.Function):
    """The layer and its update; gradients of x, of A and of B, and of the bias where it is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down, up = a.to(x.dtype), b.to(x.dtype)
        h = (rows @ down.t()).mul_(scale)
        y = h @ up.t() if bias is None else torch.addmm(bias, h, up.t())
        y.addmm_(rows, weight.t())
        ctx.save_for_backward(rows, weight, down, up, h)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, h = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        dh = (dy @ up).mul_(ctx.scale)
        dx = (dh @ down).addmm_(dy, weight).view(ctx.shape) if need_x else None
        dbias = dy.sum(0) if need_bias else None
        return dx, None, dbias, dh.t() @ rows if need_a else None, dy.t() @ h if need_b else None, None
