"""The convolution through the zero-padded real FFT, O(T log T), of exponentially damped sequences.

With ``ρ >= 1`` and ``a'[t] = a[t]·ρ^-t``, ``y'= h' * x'``: the convolution of damped sequences is the damped
convolution. An FFT makes errors of one size at all steps, relative to the largest numbers in it. Undamped, a filter
with |p| > 1 would leave the error of its last and largest outputs at its first ones; with ``ρ = max(1, |p|)`` of each
channel the error grows with the outputs. Where no pole is outside the unit circle, ρ is 1 and changes nothing.

The incoming state adds its free response ``Re Σ_n R_n p_n^(t+1) s_n``; the final state is one weighted sum
``s = p^T s_in + Σ_j p^(T-1-j) x_j``, evaluated in blocks, so no array of the size [B,F,N,T] is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.modes import Modes, as_real_pairs, from_real_pairs, powers


def fft_size(length: int) -> int:
    """The smallest size of the form 2^a, 3·2^a or 5·2^a that is at least ``length``: sizes every FFT library likes."""
    return min(m << max(0, (-(-length // m) - 1).bit_length()) for m in (1, 3, 5))


def convolve(x: Tensor, h: Tensor) -> Tensor:
    """The first T numbers of ``h * x``: x real [B,F,T], h real [F,W] -> [B,F,T]."""
    length = x.shape[-1]
    h = h[..., :length]
    size = fft_size(length + h.shape[-1] - 1)
    spectrum = torch.fft.rfft(x, n=size) * torch.fft.rfft(h, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :length]


def long_conv_fft(x: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state [B,F,N] -> (y real [B,T,F], final state)."""
    poles, residues = modes
    length = x.shape[1]
    xt = x.transpose(1, 2)  # [B,F,T]
    growth = poles.detach().abs().amax(-1, keepdim=True).clamp(min=1)  # ρ, [F,1]
    # ρ^t overflows where outputs do. Half the exponent, twice: no output that float32 can hold is multiplied by inf
    half = torch.exp(0.5 * growth.log() * torch.arange(length, device=x.device))
    undamp, damp = half.to(x.dtype), half.reciprocal().to(x.dtype)
    y = convolve(xt * damp * damp, Modes(poles / growth, residues).impulse_response(length)) * undamp * undamp
    free = Modes(poles, residues * poles.to(residues.dtype) * state)  # residues [B,F,N]
    return (y + free.impulse_response(length)).transpose(1, 2), final_state(xt, poles, state)


def final_state(x: Tensor, poles: Tensor, state: Tensor, block: int = 64) -> Tensor:
    """``p^T s + Σ_j p^(T-1-j) x_j``: x real [B,F,T], poles [F,N] as in ``Modes``, state [B,F,N] -> [B,F,N]."""
    length = x.shape[-1]
    count = -(-length // block)
    x = torch.nn.functional.pad(x, (count * block - length, 0))  # leading zeros leave the sum alone
    fine = powers(poles, block + 1)
    inner = as_real_pairs(fine[..., :block].flip(-1).transpose(-1, -2).to(state.dtype))  # p^(b-1-j), [F,b,M]
    local = from_real_pairs(x.unflatten(-1, (count, block)) @ inner, state)  # [B,F,count,N]
    outer = powers(fine[..., block], count).flip(-1).to(state.dtype)  # [F,N,count]
    return (poles**length).to(state.dtype) * state + torch.einsum("bdcn,dnc->bdn", local, outer)
