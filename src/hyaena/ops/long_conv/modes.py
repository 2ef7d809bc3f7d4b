"""Sums of exponentials, real or complex: what the methods for filters of modes build from poles and residues.

    h[t] = Re Σ_n R_n p_n^t            t = 0, 1, 2, …

A method is written once for both. Complex numbers enter matrix products as pairs of reals, and real numbers as they
are: ``M`` below is 2N or N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Modes(NamedTuple):
    """Poles and residues, both complex or both real.

    Attributes:
        poles: p [F,N], in double precision where the device has it (``widen``): powers are formed of them.
        residues: R [F,N], or [B,F,N]; their dtype is that of the arithmetic and of states.
    """

    poles: Tensor
    residues: Tensor

    def impulse_response(self, length: int) -> Tensor:
        """h[0 … length-1], real [F,length] or [B,F,length].

        Writes t = a·m + b with m ≈ √length, so ``p^t`` is the product of two short tables and the sum over modes is
        one matrix product; nothing of the size [F,N,length] is ever made.
        """
        p, residues = self
        block = max(1, 1 << ((max(length, 1) - 1).bit_length() + 1) // 2)
        rows = -(-length // block)
        fine = powers(p, block)  # [F,N,b]
        coarse = residues.to(p.dtype).unsqueeze(-1) * powers(fine[..., -1] * p, rows)  # [F,N,a]
        left = readout_pairs(coarse.transpose(-1, -2).to(residues.dtype))  # [F,a,M]
        right = as_real_pairs(fine.transpose(-1, -2).to(residues.dtype))  # [F,b,M]
        return (left @ right.transpose(-1, -2)).flatten(-2)[..., :length]


def as_real_pairs(z: Tensor) -> Tensor:
    """Complex [..., N] as real [..., 2N], all real parts, then all imaginary parts; real numbers as they are."""
    return torch.cat([z.real, z.imag], dim=-1) if z.is_complex() else z


def from_real_pairs(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``as_real_pairs`` for numbers that are complex where ``like`` is."""
    if not like.is_complex():
        return x
    real, imag = x.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imag.contiguous())


def readout_pairs(z: Tensor) -> Tensor:
    """[..., N] as real [..., M] so that ``Re Σ_n z_n s_n == readout_pairs(z) · as_real_pairs(s)``."""
    return torch.cat([z.real, -z.imag], dim=-1) if z.is_complex() else z


def widen(z: Tensor) -> Tensor:
    """Double precision, in which powers are formed: squaring doubles the relative error at each step.

    Devices without double precision (Apple's MPS) keep what they have.
    """
    if z.device.type == "mps":
        return z
    return z.to(torch.complex128 if z.is_complex() else torch.float64)


def powers(p: Tensor, count: int) -> Tensor:
    """``p^0 … p^(count-1)`` along a new last axis: [...] -> [..., count], by repeated squaring."""
    out = torch.ones_like(p).unsqueeze(-1)
    step = p.unsqueeze(-1)
    while out.shape[-1] < count:
        out = torch.cat([out, out * step], dim=-1)
        step = limit(step * step)
    return out[..., :count]


def power(p: Tensor, exponent: int) -> Tensor:
    """``p^exponent``, by repeated squaring: [...] -> [...]; exponent >= 0."""
    out = torch.ones_like(p)
    while exponent:
        if exponent % 2:
            out = limit(out * p)
        p, exponent = limit(p * p), exponent // 2
    return out


def limit(z: Tensor, largest: float | None = None) -> Tensor:
    """Scale numbers beyond a magnitude down to it, by default one whose square is finite; others keep every bit.

    Powers of a pole outside the unit circle overflow, and infinity times zero is NaN. So long as they are finite, a
    channel that has read zeros only (padding, say) stays zero, and others overflow where their outputs do.
    """
    bound = torch.finfo(z.dtype).max ** 0.5 / 4 if largest is None else largest
    return z / (z.detach().abs() / bound).clamp(min=1)


def narrow(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a narrower dtype, in which the result is finite; see ``limit``."""
    return limit(z, torch.finfo(dtype).max / 4).to(dtype)


def decay_lengths(poles: Tensor, threshold: float = 1e-3) -> Tensor:
    """Steps until ``|p|^t`` falls below ``threshold``: [...] -> float64 [...], infinite where |p| >= 1."""
    magnitude = widen(poles).abs().double()
    steps = torch.log(torch.tensor(threshold, dtype=torch.float64, device="cpu")) / torch.log(magnitude)
    return torch.where(magnitude < 1, steps, torch.inf)
