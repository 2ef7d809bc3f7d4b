"""The float64 step loop: the oracle that every other method is tested against. It imports nothing of ours.

s[t] = p·s[t-1] + x[t]        y[t] = Re Σ_n R_n s_n[t] + skip·x[t]
"""

from __future__ import annotations

import torch
from torch import Tensor


def long_conv_reference(
    x: Tensor,
    poles: Tensor,
    residues: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in float64, differentiable.

    Args:
        x: real [B,T,D].
        poles: complex [D,N].
        residues: complex [D,N].
        skip: real [D] or None.
        state: complex [B,D,N] before the first step, or None for zero.
        reset: bool [B,T]; where True the state is forgotten before the step.

    Returns:
        y float64 [B,T,D] and the final state complex128 [B,D,N].
    """
    x, poles, residues = x.double(), poles.to(torch.complex128), residues.to(torch.complex128)
    batch, length, channels = x.shape
    s = torch.zeros(batch, channels, poles.shape[-1], dtype=torch.complex128, device=x.device)
    if state is not None:
        s = s + state
    outputs = []
    for t in range(length):
        if reset is not None:
            s = torch.where(reset[:, t, None, None], torch.zeros_like(s), s)
        s = poles * s + x[:, t, :, None]
        y = (residues * s).real.sum(-1)
        outputs.append(y if skip is None else y + skip.double() * x[:, t])
    return torch.stack(outputs, dim=1), s
