"""Linear layers as records that operators read, and the one function that applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Dense(NamedTuple):
    """A plain linear layer: weight [E,D] and bias [E] or None. Kernels may read it."""

    weight: Tensor
    bias: Tensor | None = None


Linear = Dense | Callable[[Tensor], Tensor]
"""A record of weights, or anything that maps [..., D] to [..., E] when it is called: an adapter, a quantized layer."""


def linear(x: Tensor, layer: Linear, *, residual: Tensor | None = None) -> Tensor:
    """``residual + weight·x + bias``: x [..., D] -> [..., E]."""
    y = torch.nn.functional.linear(x, layer.weight, layer.bias) if isinstance(layer, Dense) else layer(x)
    return y if residual is None else residual + y
