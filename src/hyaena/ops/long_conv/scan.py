"""The recurrence as an associative scan over time: logarithmic depth, O(T·N) work, the state of every step in memory.

``s[t] = p·s[t-1] + x[t]`` composes: two steps are one step of ``p²`` that takes ``p·x[t-1] + x[t]``. So the odd steps
form a scan of half the length, and the even ones follow from them (Blelloch 1990, "Prefix sums and their
applications"; Smith et al. 2023, "S5", for state-space models).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.modes import Modes, limit, narrow


def long_conv_scan(x: Tensor, modes: Modes, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state [B,F,N] -> (y real [B,T,F], final state); ``reset`` bool [B,T]."""
    poles, residues = modes
    passes = None if reset is None else ~reset[:, :, None, None]
    carried = poles.to(residues.dtype) * state
    if passes is not None:
        carried = torch.where(passes[:, 0], carried, 0)
    inputs = x.unsqueeze(-1).to(residues.dtype)  # [B,T,F,1]
    first = inputs[:, :1] + carried.unsqueeze(1)
    states = scan(torch.cat([first, inputs[:, 1:].expand(-1, -1, -1, poles.shape[-1])], dim=1), poles, passes)
    y = (residues * states).sum(-1)
    return y.real if y.is_complex() else y, states[:, -1].clone()  # a view would keep the states of all steps


def scan(values: Tensor, decay: Tensor, passes: Tensor | None = None) -> Tensor:
    """``s[t] = values[t] + decay·s[t-1]`` where ``passes[t]``, and ``s[t] = values[t]`` where not.

    Args:
        values: [B,T,F,N].
        decay: [F,N], in which precision it is squared.
        passes: bool [B,T,1,1]; None for everywhere.
    """
    length = values.shape[1]
    if length == 1:
        return values
    step = narrow(decay, values.dtype)
    before, after = values[:, : length // 2 * 2 : 2], values[:, 1::2]
    carried, joined = step * before, None
    if passes is not None:
        carried = torch.where(passes[:, 1::2], carried, 0)
        joined = passes[:, : length // 2 * 2 : 2] & passes[:, 1::2]
    odd = scan(after + carried, limit(decay * decay), joined)
    carried = step * odd[:, : (length - 1) // 2]
    if passes is not None:
        carried = torch.where(passes[:, 2::2], carried, 0)
    even = values[:, 2::2] + carried
    even = torch.cat([values[:, :1], even], dim=1)
    states = torch.stack([even[:, : length // 2], odd], dim=2).flatten(1, 2)
    return states if length % 2 == 0 else torch.cat([states, even[:, -1:]], dim=1)
