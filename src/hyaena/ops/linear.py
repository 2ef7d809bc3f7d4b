"""Linear layers as records that operators read, and the one function that applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.ops.narrow import Narrow, narrow_linear


class Dense(NamedTuple):
    """A plain linear layer: weight [E,D] and bias [E] or None. Kernels may read it."""

    weight: Tensor
    bias: Tensor | None = None


Linear = Dense | Narrow | Callable[[Tensor], Tensor]
"""A record of weights, or anything that maps [..., D] to [..., E] when it is called, such as an adapter."""


def linear(x: Tensor, layer: Linear, *, residual: Tensor | None = None) -> Tensor:
    """``residual + weight·x + bias``: x [..., D] -> [..., E]."""
    if isinstance(layer, Dense):
        y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    else:
        y = narrow_linear(x, layer) if isinstance(layer, Narrow) else layer(x)
    return y if residual is None else residual + y
