"""The convolution for a graph that ``torch.export`` makes once for every length T.

The other methods choose blocks, transform sizes or numbers of squarings by T, so their graphs hold for some lengths
only. Here nothing but sizes depends on T: powers are exponentials, the transform has 2T points. The price is memory,
O(D·N·T) for the powers in double precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.filters import ModalFilter, widen


def long_conv_exported(x: Tensor, filter: ModalFilter, state: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve x real [B,T,D] from state complex [B,D,N]; return y real [B,T,D] and the final state."""
    length = x.shape[1]
    xt, p = x.transpose(1, 2), widen(filter.poles).unsqueeze(-1)
    steps = torch.arange(length, device=x.device)
    rate, phase = p.abs().log(), p.angle()
    growth = torch.exp(-rate.amax((1, 2)).clamp(min=0).unsqueeze(-1) * steps).to(x.dtype)  # [D,T], 1 where |p| <= 1
    ladder = torch.polar(torch.where(steps == 0, 1.0, (steps * rate).exp()), steps * phase)  # p^0 … p^(T-1), [D,N,T]
    residues = widen(filter.residues)
    h = (residues.unsqueeze(-1) * ladder).sum(-2).real.to(x.dtype)
    if filter.skip is not None:
        h = h + filter.skip.to(h.dtype).unsqueeze(-1) * (steps == 0)
    # A growing filter is damped, and its input alike: the transform spreads the error of the largest number over all.
    spectrum = torch.fft.rfft(xt * growth, n=2 * length) * torch.fft.rfft(h * growth, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length).narrow(-1, 0, length) / growth
    free = torch.einsum("bdn,dnt->bdt", residues * p.squeeze(-1) * state, ladder).real
    final = ladder.narrow(-1, length - 1, 1).squeeze(-1) * p.squeeze(-1) * state
    final = final + torch.einsum("bdt,dnt->bdn", xt.to(ladder.dtype), ladder.flip(-1))
    return (y + free.to(y.dtype)).transpose(1, 2), final.to(state.dtype)
