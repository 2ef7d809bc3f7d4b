"""The short causal depthwise filter: K explicit taps per channel, with a window of K-1 steps as its state."""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.long_conv.explicit import fir_sum, next_window


def short_conv(
    z: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None = None, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Filter every channel with its own K taps.

    Equation: ``u[t] = bias + Σ_k weight[K-1-k]·z[t-k]``, k = 0 … K-1; steps before the first come from the state.
    The sum is float32 (float64 for float64), and is rounded once to the dtype of z.

    Args:
        z: [B,T,E], T >= 1.
        weight: [E,K]; the last tap multiplies the current step (the order of torch's conv1d).
        bias: [E] or None.
        state: [B,E,K-1], the last K-1 steps before z, oldest first; None for zeros.
        reset: bool [B,T]; True forgets everything before that step.

    Returns:
        u [B,T,E], and the state after z, [B,E,K-1] in the dtype of z.

    Raises:
        InputError: a state of another shape.
    """
    shape = z.shape[0], z.shape[2], weight.shape[-1] - 1
    if state is None:
        state = z.new_zeros(shape)
    elif state.shape != shape:
        raise InputError(f"short_conv's state must be {shape}, and is {tuple(state.shape)}")
    state = state.to(z.dtype)
    wide = torch.promote_types(z.dtype, torch.float32)
    padded = torch.cat([state.transpose(1, 2), z], dim=1)  # [B,K-1+T,E]
    u = fir_sum(padded, weight.flip(-1).to(wide), None if bias is None else bias.to(wide), reset)
    return u.to(z.dtype), next_window(z, state, reset)
