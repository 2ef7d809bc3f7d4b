"""The float64 step loops: the oracles that every other method is tested against. They import nothing of ours.

modes:  s[t] = p·s[t-1] + x[t],  y[t] = Re Σ_n R_n s_n[t]            taps:  y[t] = Σ_k h[k] x[t-k]
"""

from __future__ import annotations

import torch
from torch import Tensor


def long_conv_reference(
    x: Tensor, poles: Tensor, residues: Tensor, state: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in float64, differentiable.

    Args:
        x: real [B,T,F].
        poles, residues: [F,N], both complex or both real.
        state: [B,F,N] before the first step, complex or real as they are.
        reset: bool [B,T]; where True the state is forgotten before the step.

    Returns:
        y float64 [B,T,F] and the final state, complex128 or float64 [B,F,N].
    """
    wide = torch.complex128 if poles.is_complex() else torch.float64
    x, s, poles, residues = x.double(), state.to(wide), poles.to(wide), residues.to(wide)
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            s = torch.where(reset[:, t, None, None], torch.zeros_like(s), s)
        s = poles * s + x[:, t, :, None]
        y = residues * s
        outputs.append((y.real if y.is_complex() else y).sum(-1))
    return torch.stack(outputs, dim=1), s


def fir_reference(x: Tensor, taps: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Explicit taps, one step at a time, in float64: x [B,T,F], taps [F,W], state [B,F,W-1], oldest first."""
    x, window, mirrored = x.double(), state.double(), taps.double().flip(-1)
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            window = torch.where(reset[:, t, None, None], torch.zeros_like(window), window)
        window = torch.cat([window, x[:, t, :, None]], dim=-1)
        outputs.append((window * mirrored).sum(-1))
        window = window[..., 1:]
    return torch.stack(outputs, dim=1), window
