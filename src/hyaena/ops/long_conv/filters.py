"""The filters of a long convolution, and the numbers that every method builds from them.

A modal filter is a sum of damped complex exponentials, one sum per channel::

    h[t] = skip·δ[t] + Re Σ_n R_n p_n^t            t = 0, 1, 2, …

so it is a convolution kernel (``taps``) and a recurrence ``s[t] = p·s[t-1] + x[t]`` at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ModalFilter(NamedTuple):
    """A long filter in modal form: one set of N modes per channel.

    Attributes:
        poles: p, complex [D,N].
        residues: R, complex [D,N].
        skip: the instantaneous gain, real [D], or None for none.
    """

    poles: Tensor
    residues: Tensor
    skip: Tensor | None = None

    def initial_state(self, batch, channels):
        return torch.zeros(batch, channels, self.poles.shape[1], dtype=self.poles.dtype, device=self.poles.device)


def as_real_pairs(z: Tensor) -> Tensor:
    """Complex [..., N] as real [..., 2N]: all real parts, then all imaginary parts."""
    return torch.cat([z.real, z.imag], dim=-1)


def from_real_pairs(x: Tensor) -> Tensor:
    """The inverse of ``as_real_pairs``."""
    real, imag = x.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imag.contiguous())


def readout_pairs(z: Tensor) -> Tensor:
    """Complex [..., N] as real [..., 2N] so that ``Re Σ_n z_n s_n == readout_pairs(z) · as_real_pairs(s)``."""
    return torch.cat([z.real, -z.imag], dim=-1)


def widen(z: Tensor) -> Tensor:
    """Complex128, in which powers are formed: squaring doubles the relative error, so |p|^100000 needs the room.

    Devices without double precision (Apple's MPS) keep complex64.
    """
    return z if z.device.type == "mps" else z.to(torch.complex128)


def powers(p: Tensor, count: int) -> Tensor:
    """``p^0 … p^(count-1)`` along a new last axis: complex [...] -> [..., count], by repeated squaring."""
    out = torch.ones_like(p).unsqueeze(-1)
    step = p.unsqueeze(-1)
    while out.shape[-1] < count:
        out = torch.cat([out, out * step], dim=-1)
        step = step * step
    return out[..., :count]


def taps(filter: ModalFilter, length: int) -> Tensor:
    """The filter's impulse response h[0 … length-1], real [D,length], in the precision of the poles.

    Writes t = a·m + b with m ≈ √length, so ``p^t`` is the product of two short tables and the sum over modes is one
    matrix product; nothing of the size [D,N,length] is ever made.
    """
    dtype = filter.poles.dtype
    block = max(1, 1 << ((max(length, 1) - 1).bit_length() + 1) // 2)
    rows = -(-length // block)
    p = widen(filter.poles)
    fine = powers(p, block)  # [D,N,b]
    coarse = widen(filter.residues).unsqueeze(-1) * powers(fine[..., -1] * p, rows)  # [D,N,a]
    left = readout_pairs(coarse.transpose(-1, -2).to(dtype))  # [D,a,2N]
    right = as_real_pairs(fine.transpose(-1, -2).to(dtype))  # [D,b,2N]
    h = (left @ right.transpose(-1, -2)).flatten(-2)[..., :length]
    if filter.skip is not None and length:
        h = torch.cat([h[..., :1] + filter.skip.to(h.dtype).unsqueeze(-1), h[..., 1:]], dim=-1)
    return h


def decay_lengths(poles: Tensor, threshold: float = 1e-3) -> Tensor:
    """Steps until ``|p|^t`` falls below ``threshold``: complex [...] -> float64 [...], infinite where |p| >= 1."""
    magnitude = widen(poles).abs().double()
    steps = torch.log(torch.tensor(threshold, dtype=torch.float64)) / torch.log(magnitude)
    return torch.where(magnitude < 1, steps, torch.inf)
