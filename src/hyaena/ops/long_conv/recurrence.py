"""The recurrence, one step at a time, in the precision of the states: the lowest memory, and the decoding step.

s[t] = p·s[t-1] + x[t]        y[t] = Re Σ_n R_n s_n[t]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def long_conv_recurrence(
    x: Tensor, advance: Callable[[Tensor, Tensor], Tensor], residues: Tensor, state: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state [B,F,N] -> (y real [B,T,F], state). O(T·N) time, O(N) memory beyond x and y.

    Args:
        advance: ``(s, x[t]) -> p·s + x[t]``, [B,F,N] and [B,F,1], as it is most accurate for the form of the poles.
        residues: [F,N].
        reset: bool [B,T].
    """
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None], 0, state)
        state = advance(state, x[:, t].unsqueeze(-1))
        y = residues * state
        outputs.append((y.real if y.is_complex() else y).sum(-1))  # real sums take a third of the time of complex ones
    return torch.stack(outputs, dim=1), state
