"""The convolution through the zero-padded real FFT, O(T log T).

The incoming state adds its free response ``Re Σ_n R_n p_n^(t+1) s_n``; the final state is one weighted sum
``s = p^T s_in + Σ_j p^(T-1-j) x_j``, evaluated in blocks, so no array of the size [B,D,N,T] is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyaena.ops.long_conv.exported import long_conv_exported
from hyaena.ops.long_conv.filters import ModalFilter, as_real_pairs, from_real_pairs, powers, taps, widen


def fft_size(length: int) -> int:
    """The smallest size of the form 2^a, 3·2^a or 5·2^a that is at least ``length``: sizes every FFT library likes."""
    return min(m << max(0, (-(-length // m) - 1).bit_length()) for m in (1, 3, 5))


def long_conv_fft(x: Tensor, filter: ModalFilter, state: Tensor) -> tuple[Tensor, Tensor]:
    """x real [B,T,D], state complex [B,D,N] -> (y real [B,T,D], final state)."""
    if torch.compiler.is_exporting():
        return long_conv_exported(x, filter, state)
    length = x.shape[1]
    xt = x.transpose(1, 2)  # [B,D,T]
    size = fft_size(2 * length - 1)
    spectrum = torch.fft.rfft(xt, n=size) * torch.fft.rfft(taps(filter, length), n=size)
    y = torch.fft.irfft(spectrum, n=size)[..., :length]
    free = ModalFilter(filter.poles, filter.residues * filter.poles * state)  # residues [B,D,N]
    y = y + taps(free, length)
    return y.transpose(1, 2), final_state(xt, filter.poles, state)


def final_state(x: Tensor, poles: Tensor, state: Tensor, block: int = 64) -> Tensor:
    """``p^T s + Σ_j p^(T-1-j) x_j``: x real [B,D,T], poles complex [D,N], state complex [B,D,N] -> complex [B,D,N]."""
    length = x.shape[-1]
    count = -(-length // block)
    x = torch.nn.functional.pad(x, (count * block - length, 0))  # leading zeros leave the sum alone
    p = widen(poles)
    fine = powers(p, block + 1)
    inner = as_real_pairs(fine[..., :block].flip(-1).transpose(-1, -2).to(poles.dtype))  # [D,block,2N]
    local = from_real_pairs(x.unflatten(-1, (count, block)) @ inner)  # [B,D,count,N]
    outer = powers(fine[..., block], count).flip(-1).to(poles.dtype)  # [D,N,count]
    return (p**length).to(poles.dtype) * state + torch.einsum("bdcn,dnc->bdn", local, outer)
