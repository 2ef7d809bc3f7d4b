"""Root-mean-square normalisation, in the two conventions that checkpoints depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.backend import use_kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, eps_inside_root: bool = True, backend="auto") -> Tensor:
    """Scale x [..., D] to unit root mean square, then by ``weight`` [D].

    Equation: ``x / sqrt(mean(x^2) + eps) · weight`` (SH-7B), or with ``eps_inside_root=False``
    ``x / (sqrt(mean(x^2)) + eps) · weight`` (Evo). Statistics are float32 (or wider); the result has the dtype of x.
    On a GPU, in inference, one kernel does it in one pass; see ``ops.backend``.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    if use_kernels(x, weight):
        from hyaena.ops.triton import pointwise

        return pointwise.rms_norm(x, weight, eps, eps_inside_root=eps_inside_root)
    if eps_inside_root:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps
    return (wide / scale).to(x.dtype) * weight
