"""The short causal depthwise filter: K explicit taps per channel, with a window of K-1 steps as its state."""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.errors import InputError


def short_conv(
    z: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None = None, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Filter every channel with its own K taps.

    Equation: ``u[t] = bias + Σ_k weight[K-1-k]·z[t-k]``, k = 0 … K-1; steps before the first come from the state.

    Args:
        z: [B,T,E], T >= 1.
        weight: [E,K]; the last tap multiplies the current step (the order of torch's conv1d).
        bias: [E] or None.
        state: [B,E,K-1], the last K-1 steps before z, oldest first; None for zeros.
        reset: bool [B,T]; True forgets everything before that step.

    Returns:
        u [B,T,E], and the state after z, [B,E,K-1].
    """
    batch, length, channels = z.shape
    window = weight.shape[-1] - 1
    if state is None:
        state = z.new_zeros(batch, channels, window)
    elif state.shape != (batch, channels, window):
        raise InputError(f"short_conv's state must be {(batch, channels, window)}, and is {tuple(state.shape)}")
    padded = torch.cat([state.transpose(1, 2).to(z.dtype), z], dim=1)  # [B,K-1+T,E]
    weight = weight.to(z.dtype)

    now = padded[:, window:]
    u = now * weight[:, window] if bias is None else torch.addcmul(bias.to(z.dtype), now, weight[:, window])
    keep = None  # [B,T,1]: no boundary between the tap's step and the current one
    for k in range(1, window + 1):
        tap = padded[:, window - k : window - k + length]
        if reset is not None:
            crossed = torch.nn.functional.pad(reset, (k - 1, 0))[:, :length]  # the boundary k-1 steps ago
            keep = ~crossed.unsqueeze(-1) if keep is None else keep & ~crossed.unsqueeze(-1)
            tap = tap * keep
        u.addcmul_(tap, weight[:, window - k])

    state = padded[:, length:].transpose(1, 2)
    if reset is not None:  # a step is remembered when no boundary came after it
        boundaries = torch.nn.functional.pad(reset, (window, 0)).long()
        later = boundaries.flip(1).cumsum(1).flip(1) - boundaries
        state = state * (later[:, length:] == 0).unsqueeze(1)
    return u, state
