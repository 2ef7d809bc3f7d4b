"""The convolution through the zero-padded real FFT, O(T log T), of exponentially damped sequences.

With ``ρ >= 1`` and ``a'[t] = a[t]·ρ^-t``, ``y'= h' * x'``: the convolution of damped sequences is the damped
convolution. An FFT makes errors of one size at all steps, relative to the largest numbers in it. Undamped, a filter
with |p| > 1 would leave the error of its last and largest outputs at its first ones; with ``ρ = max(1, |p|)`` of each
channel the error grows with the outputs. Where no pole is outside the unit circle, ρ is 1 and changes nothing.

The incoming state adds its free response ``Re Σ_n R_n p_n^(t+1) s_n``; the final state is one weighted sum
``s = p^T s_in + Σ_j p^(T-1-j) x_j``, evaluated in blocks, so no array of the size [B,F,N,T] is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from hyaena.ops.long_conv.modes import Modes, as_real_pairs, from_real_pairs, narrow, power, powers

RANGE = 0.7
"""The share of the exponents of a dtype that damping may use: float32 then holds inputs of 1e-11 at the end."""


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


def piece_length(growth: Tensor, length: int, dtype: torch.dtype) -> int:
    """The steps, at most ``length``, over which ``exp(growth·t)`` stays in the range of a dtype; growth >= 0.

    All of them inside torch.compile and torch.func, where numbers cannot be looked at.
    """
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(growth):
        return length
    steps = RANGE * math.log(torch.finfo(dtype).max) / max(float(growth.max()), 1e-9)
    return max(1, min(length, int(steps)))


def in_pieces(
    x: Tensor, state: Tensor, steps: int, evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Evaluate pieces of x [B,F,T] of so many steps, each from the state before it; y [B,F,T] and the last state."""
    outputs = []
    for part in x.split(steps, dim=2):
        y, state = evaluate(part, state)
        outputs.append(y)
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], state


def long_conv_fft(x: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state [B,F,N] -> (y real [B,T,F], final state); in pieces where ρ^T is beyond the dtype."""
    poles, residues = modes
    growth = poles.detach().abs().amax(-1, keepdim=True).clamp(min=1).log()  # log ρ, [F,1]
    most = piece_length(growth, x.shape[1], x.dtype)
    undamp = torch.exp(growth * torch.arange(most, device=x.device))  # ρ^t, [F,T]
    damp, undamp = undamp.reciprocal().to(x.dtype), undamp.to(x.dtype)
    h = Modes(poles / growth.exp(), residues).impulse_response(most)

    def evaluate(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[2]
        y = convolve(x * damp[:, :length], h[:, :length]) * undamp[:, :length]
        free = Modes(poles, residues * narrow(poles, residues.dtype) * state)  # residues [B,F,N]
        return y + free.impulse_response(length), final_state(x, poles, state)

    y, state = in_pieces(x.transpose(1, 2), state, most, evaluate)
    return y.transpose(1, 2), state


def final_state(x: Tensor, poles: Tensor, state: Tensor, block: int = 64) -> Tensor:
    """``p^T s + Σ_j p^(T-1-j) x_j``: x real [B,F,T], poles [F,N] as in ``Modes``, state [B,F,N] -> [B,F,N]."""
    length = x.shape[-1]
    count = -(-length // block)
    x = torch.nn.functional.pad(x, (count * block - length, 0))  # leading zeros leave the sum alone
    fine = powers(poles, block + 1)
    inner = as_real_pairs(fine[..., :block].flip(-1).transpose(-1, -2).to(state.dtype))  # p^(b-1-j), [F,b,M]
    local = from_real_pairs(x.unflatten(-1, (count, block)) @ inner, state)  # [B,F,count,N]
    outer = narrow(powers(fine[..., block], count).flip(-1), state.dtype)  # [F,N,count]
    return narrow(power(poles, length), state.dtype) * state + torch.einsum("bdcn,dnc->bdn", local, outer)
