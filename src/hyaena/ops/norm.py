"""Root-mean-square normalisation, in the two conventions that checkpoints depend on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from hyaena.ops.backend import Backend, use_pointwise

BOUND = 2.0**50
"""The largest magnitude that is squared: a sum of 2^27 such squares is finite in float32."""


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, eps_inside_root: bool = True, backend: Backend | str = "auto"
) -> Tensor:
    """Scale x [..., D] to unit root mean square, then by ``weight`` [D].

    Equation: ``x / sqrt(mean(x^2) + eps) · weight`` (SH-7B), or with ``eps_inside_root=False``
    ``x / (sqrt(mean(x^2)) + eps) · weight`` (Evo). Statistics are float32 (or wider); the result has the dtype of x.
    No finite x overflows: rows with numbers beyond ``BOUND`` are scaled to it first, which leaves the result as it is,
    and others unchanged. Rows that are not finite give NaN. On a GPU, in inference, one kernel does it in one pass;
    see ``ops.backend``.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    if use_pointwise(backend, x, weight):
        from hyaena.ops.triton import pointwise

        return pointwise.rms_norm(x, weight, eps, eps_inside_root=eps_inside_root)
    x = bounded(x)
    if eps_inside_root:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps
    return (wide / scale).to(x.dtype) * weight


def bounded(x: Tensor) -> Tensor:
    """Scale down the rows whose largest magnitude is beyond ``BOUND``; others keep every bit.

    ``rms_norm`` does not depend on the scale of such rows (eps is 1e-30 of their mean square and less), so neither
    does its gradient: the factor is a constant.
    """
    if torch.finfo(x.dtype).max <= BOUND or not x.numel():
        return x
    x_ = x.detach()
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_functorch_wrapped_tensor(x):
        low, high = torch.aminmax(x_)  # looking first costs less than a second pass over x, where looking is free
        if float(low) >= -BOUND and float(high) <= BOUND:
            return x
    largest = torch.linalg.vector_norm(x_, torch.inf, dim=-1, keepdim=True)
    return x / (largest * (1 / BOUND)).clamp(min=1)
