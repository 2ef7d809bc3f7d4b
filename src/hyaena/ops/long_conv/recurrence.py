"""The recurrence, one step at a time, in the precision of the poles: the lowest memory, and the decoding step.

s[t] = p·s[t-1] + x[t]        y[t] = Re Σ_n R_n s_n[t] + skip·x[t]
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.filters import ModalFilter


def long_conv_recurrence(
    x: Tensor, filter: ModalFilter, state: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x real [B,T,D], state complex [B,D,N] -> (y real [B,T,D], state). O(T·N) time, O(N) memory beyond x and y."""
    poles, residues, skip = filter
    real = x.dtype
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            state = state * ~reset[:, t, None, None]
        now = x[:, t]
        state = poles * state + now.unsqueeze(-1)
        y = (residues * state).real.sum(-1)  # summing reals is three times as fast as summing complex numbers
        outputs.append(y if skip is None else torch.addcmul(y, skip.to(real), now))
    return torch.stack(outputs, dim=1), state
