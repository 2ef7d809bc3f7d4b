"""The recurrence as an associative scan over time: logarithmic depth, O(T·N) work, the state of every step in memory.

``s[t] = p·s[t-1] + x[t]`` composes: two steps are one step of ``p²`` that takes ``p·x[t-1] + x[t]``. So the odd steps
form a scan of half the length, and the even ones follow from them (Blelloch 1990, "Prefix sums and their
applications"; Smith et al. 2023, "S5", for state-space models).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.filters import ModalFilter, widen


def long_conv_scan(x: Tensor, filter: ModalFilter, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x real [B,T,D], state complex [B,D,N] -> (y real [B,T,D], final state); ``reset`` bool [B,T]."""
    poles, residues, skip = filter
    passes = None if reset is None else ~reset[:, :, None, None]
    carried = poles * state if passes is None else poles * state * passes[:, 0]
    inputs = x.unsqueeze(-1).to(poles.dtype)  # [B,T,D,1]
    first = inputs[:, :1] + carried.unsqueeze(1)
    states = scan(torch.cat([first, inputs[:, 1:].expand(-1, -1, -1, poles.shape[-1])], dim=1), widen(poles), passes)
    y = (residues * states).sum(-1).real
    last = states[:, -1].clone()  # a view would keep the states of all steps
    return y if skip is None else torch.addcmul(y, skip.to(x.dtype), x), last


def scan(values: Tensor, decay: Tensor, passes: Tensor | None = None) -> Tensor:
    """``s[t] = values[t] + decay·s[t-1]`` where ``passes[t]``, and ``s[t] = values[t]`` where not.

    Args:
        values: complex [B,T,D,N].
        decay: complex [D,N], in which precision it is squared.
        passes: bool [B,T,1,1]; None for everywhere.
    """
    length = values.shape[1]
    if length == 1:
        return values
    step = decay.to(values.dtype)
    before, after = values[:, : length // 2 * 2 : 2], values[:, 1::2]
    through, beyond, joined = step, step, None
    if passes is not None:
        through, beyond = step * passes[:, 1::2], step * passes[:, 2::2]
        joined = passes[:, : length // 2 * 2 : 2] & passes[:, 1::2]
    odd = scan(after + through * before, decay * decay, joined)
    even = values[:, 2::2] + beyond * odd[:, : (length - 1) // 2]
    even = torch.cat([values[:, :1], even], dim=1)
    states = torch.stack([even[:, : length // 2], odd], dim=2).flatten(1, 2)
    return states if length % 2 == 0 else torch.cat([states, even[:, -1:]], dim=1)
