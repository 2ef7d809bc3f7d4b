"""The gate of an MLP: an activation of one product times another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hyaena.ops.backend import Backend, use_pointwise

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "identity": lambda a: a,
}
"""By the names of configurations; gelu is the exact one."""


def gate(a: Tensor, b: Tensor, activation: str, *, backend: Backend | str = "auto") -> Tensor:
    """Multiply ``activation(a) · b``, elementwise, two tensors of one shape and dtype.

    On a GPU, in inference, one kernel reads each once and computes in float32; see ``ops.backend``.
    """
    if use_pointwise(backend, a, b):
        from hyaena.ops.triton import pointwise

        return pointwise.gate(a, b, activation)
    return ACTIVATIONS[activation](a) * b
