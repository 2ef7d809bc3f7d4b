"""The arguments and the gradients of the operator with explicit taps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of z, weight, bias, taps, skip, short and long."""


class Operands(NamedTuple):
    """The arguments of the operator with explicit taps.

    Attributes:
        z: [B,T,3D], bfloat16, float16 or float32.
        weight, bias: of the short filter, [3D,K] and [3D] or None.
        taps: of the long filter, [F,W], F divides D.
        skip: [D] or None.
        short, long: the states before z, [B,3D,K-1] and float32 [B,D,W-1]; None for zeros.
        mask: bool [B,T], False where a step is padding; None for no padding.
        reset: bool [B,T], True where a packed document begins; None for none.
    """

    z: Tensor
    weight: Tensor
    bias: Tensor | None
    taps: Tensor
    skip: Tensor | None
    short: Tensor | None
    long: Tensor | None
    mask: Tensor | None
    reset: Tensor | None

    def contiguous(self) -> Operands:
        """The same operands, each contiguous in memory."""
        return Operands(*(None if t is None else t.contiguous() for t in self))  # type: ignore[arg-type]


def rows_of(short: Tensor | None, z: Tensor) -> Tensor | None:
    """The state of the short filter as steps of z, [B,K-1,3D]."""
    return None if short is None else short.to(z.dtype).transpose(1, 2).contiguous()


def of_short_filter(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight and bias, and what ``sums`` has of the long filter: [3D,K], [3D], [W,D]."""
    width, taps = weight.shape
    total = sums.sum(dim=(0, 1))  # [3K+3+W,D]
    dweight = total[: 3 * taps].view(3, taps, width // 3).flip(1).transpose(1, 2).reshape(width, taps)
    return dweight, total[3 * taps : 3 * taps + 3].reshape(width).clone(), total[3 * taps + 3 :]


def add_window_gradient(
    dz: Tensor, dshort_in: Tensor, dshort: Tensor, mask: Tensor | None, last_age: Tensor | None
) -> None:
    """Add, in place, the gradient of the short filter's state after z to those of z and of the state before."""
    steps, length = dshort.shape[-1], dz.shape[1]
    if last_age is not None:  # steps before the last document are not in the state
        ago = torch.arange(steps - 1, -1, -1, device=dz.device)
        dshort = dshort.masked_fill((ago > last_age[:, None])[:, None], 0.0)
    inside = min(steps, length)
    recent = dshort[..., steps - inside :].transpose(1, 2)
    if mask is not None:
        recent = recent * mask[:, length - inside :, None]
    dz[:, length - inside :] += recent
    if length < steps:
        dshort_in[..., length:] += dshort[..., : steps - length]
