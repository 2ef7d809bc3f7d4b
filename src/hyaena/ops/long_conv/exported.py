"""The convolution for a graph that ``torch.export`` makes once for every length T.

The other methods choose blocks, transform sizes or numbers of squarings by T, so their graphs hold for some lengths
only. Here nothing but sizes depends on T: powers are exponentials, the transform has 2T points. The price is memory,
O(F·N·T) for the powers in double precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.modes import Modes


def long_conv_exported(x: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state [B,F,N] -> (y real [B,T,F], final state)."""
    length, xt = x.shape[1], x.transpose(1, 2)
    p, residues = modes.poles, modes.residues.to(modes.poles.dtype)
    steps = torch.arange(length, device=x.device)
    rate = p.abs().log().unsqueeze(-1)
    size = torch.where(steps == 0, 1.0, (steps * rate).exp())  # 0^0 is 1
    # p^0 … p^(T-1), [F,N,T]; the poles of real modes are positive.
    ladder = torch.polar(size, steps * p.angle().unsqueeze(-1)) if p.is_complex() else size
    # A growing filter is damped, and its input alike: see fft.py.
    half = torch.exp(-0.5 * rate.amax(1).clamp(min=0) * steps).to(x.dtype)  # [F,T]
    h = torch.einsum("fn,fnt->ft", residues, ladder).real * half.double() * half.double()
    spectrum = torch.fft.rfft(xt * half * half, n=2 * length) * torch.fft.rfft(h.to(x.dtype), n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length).narrow(-1, 0, length) / half / half
    free = torch.einsum("bfn,fnt->bft", residues * p * state, ladder).real
    final = ladder.narrow(-1, length - 1, 1).squeeze(-1) * p * state
    final = final + torch.einsum("bft,fnt->bfn", xt.to(ladder.dtype), ladder.flip(-1))
    return (y + free.to(y.dtype)).transpose(1, 2), final.to(state.dtype)
