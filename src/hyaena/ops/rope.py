"""Rotary position embedding over the whole head, in half-split (NeoX) order."""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.backend import Backend, use_pointwise


def rotary_frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Compute the frequencies ``theta^(-2i/head_dim)``, [head_dim/2]."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
    return 1.0 / theta**exponents


def rotary_table(
    positions: Tensor,
    head_dim: int,
    theta: float,
    scaling_factor: float = 1.0,
    *,
    frequencies: Tensor | None = None,
    rounds: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of the angles ``position / scaling_factor · theta^(-2i/head_dim)``.

    Args:
        positions: int [T] or [B,T].
        head_dim: channels of a head, even.
        theta: base of the frequencies.
        scaling_factor: linear interpolation of positions; 1 leaves them alone.
        frequencies: [head_dim/2], in place of the powers of theta.
        rounds: cos and sin are rounded to numbers of ``dtype``.
        dtype: that of the model. Angles and tables are float64 for float64, and float32 for any other.

    Returns:
        cos and sin, each [..., T, head_dim/2].

    Source: Su et al. 2021, "RoFormer"; interpolation: Chen et al. 2023, "Extending Context Window … by Interpolation".
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if frequencies is None:
        frequencies = rotary_frequencies(head_dim, theta, wide, positions.device)
    angles = (positions.to(wide) / scaling_factor).unsqueeze(-1) * frequencies.to(positions.device, wide)
    cos, sin = angles.cos(), angles.sin()
    return (cos.to(dtype).to(wide), sin.to(dtype).to(wide)) if rounds else (cos, sin)


def rotate(x: Tensor, table: tuple[Tensor, Tensor], *, backend: Backend | str = "auto") -> Tensor:
    """Rotate x [B,heads,T,head_dim] by a table of [T,head_dim/2] or [B,T,head_dim/2].

    Arithmetic is in the dtype of the table; the result has the dtype of x. On a GPU, in inference, one kernel does it
    in one pass, and the result is stored as [B,T,heads,head_dim]; see ``ops.backend``.
    """
    if use_pointwise(backend, x):
        from hyaena.ops.triton import pointwise

        return pointwise.rotate(x, table)
    cos, sin = (t.unsqueeze(-3) for t in table)
    x1, x2 = x.chunk(2, dim=-1)
    turned = [torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)]
    return torch.cat(turned, dim=-1).to(x.dtype)
