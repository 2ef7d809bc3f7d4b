"""The gate of an MLP: an activation of one product times another."""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.backend import use_kernels

ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
"""By the name that configurations give them; gelu is the exact one."""


def gate(a: Tensor, b: Tensor, activation: str, backend="auto") -> Tensor:
    """``activation(a) · b``, elementwise, of two tensors of one shape and dtype.

    On a GPU, in inference, one kernel reads each once and computes in float32; see ``ops.backend``.
    """
    if use_kernels(a, b):
        from hyaena.ops.triton import pointwise

        return pointwise.gate(a, b, activation)
    return ACTIVATIONS[activation](a) * b
