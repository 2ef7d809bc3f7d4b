"""Linear layers whose weights have 8 or 4 bits: the record, its numbers, and its product.

    w[e,d] = scale[e,g]·(q[e,d] - zero) + minimum[e,g],   g = d // group

with zero = 8 for 4 bits without minima, and 0 otherwise. q is an integer, or an e4m3 number of 8 bits. Two numbers of
4 bits share a byte: byte j of a block of 32 columns holds column j in its low and column j + 16 in its high half, as
the blocks of GGUF do.

A product widens the weight to the dtype of x some rows at a time, so that memory is that of one tile; kernels for CPUs
read it narrow. Where a device multiplies e4m3 numbers, those of a pass without gradients are not widened, and x is
rounded (``fp8.rowwise_product``). Gradients pass through x only.

Shapes: E outputs, D inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable

from hyaena.ops import cpu
from hyaena.ops.backend import use_pointwise, wants_gradients
from hyaena.ops.fp8 import E4M3, rowwise_product, takes_rowwise

BLOCK = 32
"""Columns whose 4-bit numbers share 16 bytes."""

TILE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Numbers of a weight that are widened at a time: on a CPU as many as its cache holds, elsewhere a matrix of a 7B."""


class Narrow(NamedTuple):
    """A linear layer with a narrow weight. Kernels may read it.

    Attributes:
        codes: q; int8 or float8_e4m3fn [E,D], or uint8 [E,D/2] of two 4-bit numbers each.
        scale: [E,G].
        minimum: [E,G], or None.
        bias: [E], or None.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    bias: Tensor | None = None

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def floating(self) -> bool:
        """Whether q are e4m3 numbers."""
        return self.codes.dtype == E4M3

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, (E, D)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def zero(self) -> int:
        return 8 if self.bits == 4 and self.minimum is None else 0


def pack(codes: Tensor) -> Tensor:
    """Numbers 0…15, uint8 [...,D], two to a byte: uint8 [...,D/2]."""
    low, high = codes.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of ``pack``."""
    halves = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.stack([halves & 15, halves >> 4], dim=-2).flatten(-3)


def widen(layer: Narrow, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """The weight, or some rows of it: [E,D] in a dtype, rounded once from float32."""
    codes = layer.codes[rows] if layer.bits == 8 else unpack(layer.codes[rows])
    scale = layer.scale[rows].float().unsqueeze(-1)
    wide = codes.unflatten(-1, (scale.shape[1], -1)).float()
    if layer.minimum is not None:
        wide = wide.mul_(scale).add_(layer.minimum[rows].float().unsqueeze(-1))
    else:
        wide = wide.sub_(layer.zero).mul_(scale)
    return wide.flatten(-2).to(dtype)


def narrow_linear(x: Tensor, layer: Narrow) -> Tensor:
    """``weight·x + bias``: x [...,D] -> [...,E], multiplied in the dtype of x."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if wants_gradients(x):
        y: Any = _Product.apply(x, layer)
    elif layer.floating and takes_rowwise(x, *layer.shape):
        y = rowwise_product(x, layer.codes, layer.scale)
    else:
        y = _unwidened_product(x, layer)
        y = _product(x, layer) if y is None else y
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _tiles(layer: Narrow) -> Iterator[slice]:
    outputs, inputs = layer.shape
    step = max(1, TILE["cuda" if layer.codes.is_cuda else "cpu"] // inputs)
    for start in range(0, outputs, step):
        yield slice(start, min(start + step, outputs))


def _unwidened_product(x: Tensor, layer: Narrow) -> Tensor | None:
    """The product without bias by a kernel for CPUs that reads the weight narrow, where there is one for x.

    That for few rows rounds x to 16 bits of a block, which is finer than any 16-bit dtype, but not than float32.
    """
    if x.dtype == torch.float32 or not _compiled(x):
        return None
    if x.shape[-1:] != layer.shape[1:] or layer.codes.device != x.device:  # torch says what is wrong; a kernel crashes
        return None
    from hyaena.ops.cpu.operators import few_rows
    from hyaena.ops.cpu.tiles import many_rows

    y = many_rows(x, layer)
    return few_rows(x, layer) if y is None else y


def _compiled(x: Tensor) -> bool:
    """Whether kernels for a CPU may compute with x."""
    if torch.compiler.is_compiling():  # first: a compiler can ask for none of what follows
        return False
    plain = type(x) is Tensor and x.device.type == "cpu" and not is_functorch_wrapped_tensor(x)
    return plain and cpu.unsupported_reason(x.dtype) is None and not _followed(x)


def _followed(x: Tensor) -> bool:
    """Whether somebody follows what torch computes with x, and would miss a kernel: forward derivatives, a trace, or a
    mode of dispatch, such as that in which a step is recorded.
    """
    traced = _get_tracing_state() is not None or _len_torch_dispatch_stack() > 0
    return traced or unpack_dual(x).tangent is not None


def _product(x: Tensor, layer: Narrow) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        parts = [torch.nn.functional.linear(x, _widened(layer, x, rows)) for rows in _tiles(layer)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _widened(layer: Narrow, x: Tensor, rows: slice) -> Tensor:
    """``widen`` for a product with x, by a kernel where there are any."""
    if use_pointwise("auto", x.detach()):
        from hyaena.ops.triton.widen import widen as by_kernel

        return by_kernel(layer, x.dtype, rows)
    if _compiled(x):
        from hyaena.ops.cpu.widen import widen as by_compiled

        wide = by_compiled(layer, x.dtype, rows)
        if wide is not None:
            return wide
    return widen(layer, x.dtype, rows)


class _Product(torch.autograd.Function):
    """The product, whose backward pass widens the weight again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Narrow) -> Tensor:
        ctx.layer = layer
        return _product(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        parts = (dy[..., rows] @ _widened(ctx.layer, dy, rows) for rows in _tiles(ctx.layer))
        first, *others = parts
        dx = first.to(torch.promote_types(dy.dtype, torch.float32)) if others else first
        for part in others:
            dx += part  # in float32: a sum of 16 bits would be rounded at every tile
        return dx.to(dy.dtype), None
