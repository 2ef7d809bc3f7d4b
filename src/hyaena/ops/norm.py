"""Root-mean-square normalisation, in the two conventions that checkpoints depend on."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, eps_inside_root: bool = True) -> Tensor:
    """Scale x [..., D] to unit root mean square, then by ``weight`` [D].

    Equation: ``x / sqrt(mean(x^2) + eps) · weight`` (SH-7B), or with ``eps_inside_root=False``
    ``x / (sqrt(mean(x^2)) + eps) · weight`` (Evo). Statistics are float32 (or wider); the result has the dtype of x.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    if eps_inside_root:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps
    return (wide / scale).to(x.dtype) * weight
