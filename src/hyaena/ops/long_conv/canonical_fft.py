"""The convolution as a division of transforms: the canonical form of the filter, on a circle around its poles.

The transfer function of a mode, with its conjugate, is a real fraction of order two, and so is what a state makes of
it. The first T outputs alone are those of the input and the state before, without those of the state after::

    Y(z) = Σ_n [ X(z) B_n(z) + S_n(z) - z⁻ᵀ S'_n(z) ] / A_n(z)
    A_n = 1 - 2 Re p_n z⁻¹ + |p_n|² z⁻²        numerator of a weight w:  Re w - Re(w p̄_n) z⁻¹
    weights:  B_n: R_n     S_n: R_n p_n s_n     S'_n: R_n p_n s'_n

Subtracting the state after makes Y a polynomial of degree T-1, so T points determine it, and nothing is padded. They
are on a circle outside of every pole (``z = ρ e^{iω}``, ρ a little larger than both 1 and max |p|), so poles on or
outside the unit circle are divided by as safely as others.

The fractions are added where they are evaluated. Multiplied out first (``canonical.py``), sixteen poles near 1 would
leave no digit even of float64, in which all of this is computed.

Source: Massaroli et al. 2023, "Laughing Hyena Distillery", section 3 (prefilling through the transfer function);
Parnichkun et al. 2024, "State-free inference of state-space models" (the correction for a finite length).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hyaena.errors import UnsupportedError
from hyaena.ops.long_conv.fft import fft_size, final_state, in_pieces, piece_length
from hyaena.ops.long_conv.modes import Modes

MARGIN = 2.0
"""log of (ρ/max |p|)^T: a wide circle amplifies rounding by e^MARGIN, one that is close to a pole by 1/MARGIN."""


def long_conv_canonical_fft(x: Tensor, modes: Modes, state: Tensor) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state complex [B,F,N] -> (y float64 [B,T,F], final state complex128 [B,F,N])."""
    check_double(x)
    p, residues, state = (z.to(torch.complex128) for z in (*modes, state))
    growth = p.detach().abs().amax(-1, keepdim=True).clamp(min=1).log()  # [F,1]
    steps = piece_length(growth, x.shape[1], torch.float64)
    evaluate = partial(_divide_modes, Modes(p, residues), growth)
    y, state = in_pieces(x.double().transpose(1, 2), state, steps, evaluate)
    return y.transpose(1, 2), state


def _divide_modes(modes: Modes, growth: Tensor, xt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One piece: xt float64 [B,F,T], state complex128 [B,F,N] -> (y float64 [B,F,T], final state)."""
    p, residues = modes
    after = final_state(xt, p, state)
    length = xt.shape[-1]
    size = fft_size(length)

    growth = growth + MARGIN / size  # log ρ, [F,1]
    damping = torch.exp(-growth * torch.arange(length, device=xt.device))  # ρ^-t
    bins = torch.arange(size // 2 + 1, device=xt.device)
    turn = 2 * torch.pi / size
    z = torch.polar(torch.exp(-growth), -turn * bins.double())  # z⁻¹, [F,K]
    z_length = torch.polar(torch.exp(-growth * length), -turn * (bins * length % size).double())  # z⁻ᵀ

    spectrum = torch.fft.rfft(xt * damping, n=size)
    y = torch.zeros_like(spectrum)
    for n in range(p.shape[-1]):
        pole, residue = p[:, n], residues[:, n]
        before = fraction(pole, residue * pole * state[..., n], z) - z_length * fraction(
            pole, residue * pole * after[..., n], z
        )
        a = 1 - z * (2 * pole.real.unsqueeze(-1) - z * (pole * pole.conj()).real.unsqueeze(-1))
        y = y + (spectrum * fraction(pole, residue, z) + before) / a
    return torch.fft.irfft(y, n=size)[..., :length] / damping, after


def fraction(pole: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    """The numerator ``Re w - Re(w p̄) z⁻¹``: pole complex [F], weight complex [..., F], z⁻¹ [F,K] -> [..., F,K]."""
    return weight.real.unsqueeze(-1) - (weight * pole.conj()).real.unsqueeze(-1) * z


ROOM = 24.5
"""The margin for a filter in canonical form, whose state after is not known beforehand: what follows the T outputs
wraps around, damped by e^-ROOM over the 2T points. Undoing the damping amplifies rounding by e^(ROOM/2). Each makes an
error near 2e-11."""


def long_conv_rational_fft(x: Tensor, numerator: Tensor, denominator: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x real [B,T,F], state real [B,F,M] -> (y float64 [B,T,F], state float64 [B,F,M]): ``Y = (B·X + S)/A``.

    The coefficients are those of ``CanonicalFilter``. The state after is what ``B·X + S - A·Y`` has left at z⁻ᵀ and
    beyond.
    """
    check_double(x)
    b, a = numerator.double(), denominator.double()
    growth = torch.linalg.eigvals(companion(a.detach())).abs().amax(-1, keepdim=True).clamp(min=1).log()  # [F,1]
    steps = piece_length(growth, x.shape[1], torch.float64)
    evaluate = partial(_divide_polynomials, b, a, growth)
    y, state = in_pieces(x.double().transpose(1, 2), state.double(), steps, evaluate)
    return y.transpose(1, 2), state


def _divide_polynomials(b: Tensor, a: Tensor, growth: Tensor, xt: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One piece: b, a [F,M], xt float64 [B,F,T], state [B,F,M] -> (y float64 [B,F,T], state)."""
    length, order = xt.shape[-1], a.shape[-1]
    size = fft_size(max(2 * length, order + 1))
    growth = growth + ROOM / size  # log ρ, [F,1]
    damping = torch.exp(-growth * torch.arange(size, device=xt.device))  # ρ^-t

    def transform(v: Tensor) -> Tensor:
        return torch.fft.rfft(v * damping[:, : v.shape[-1]], n=size)

    whole = torch.cat([torch.ones_like(a[:, :1]), a], dim=-1)
    y = (transform(xt) * transform(b) + transform(state)) / transform(whole)
    y = torch.fft.irfft(y, n=size)[..., :length] / damping[:, :length]

    def tail(v: Tensor, coefficients: Tensor) -> Tensor:
        """The product of the last M values and ``c_1 z⁻¹ + … + c_M z⁻ᴹ``, from z⁻ᵀ on: [B,F,T] -> [B,F,M]."""
        steps = torch.arange(order, device=v.device)
        lag = order + steps[None, :] - steps[:, None]  # of the value i, M - i steps before the end, at z^-(T+j)
        matrix = torch.where(lag <= order, coefficients[:, (lag - 1).clamp(max=order - 1)], 0.0)
        last = torch.nn.functional.pad(v[..., -order:], (max(order - length, 0), 0))
        return torch.einsum("bdi,dij->bdj", last, matrix)

    rest = torch.nn.functional.pad(state[..., length:], (0, min(order, length)))
    after = rest + tail(xt, torch.nn.functional.pad(b[:, 1:], (0, 1))) - tail(y, a)
    return y, after


def companion(a: Tensor) -> Tensor:
    """Matrices whose eigenvalues are the roots of ``z^m + a_1 z^(m-1) + … + a_m``: [R,m] -> [R,m,m]."""
    shift = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)[:-1]
    return torch.cat([-a.unsqueeze(1), shift.expand(a.shape[0], -1, -1)], dim=1)


def check_double(x: Tensor) -> None:
    """Refuse a device that has no double precision."""
    if x.device.type == "mps":
        raise UnsupportedError("long_conv method 'canonical-fft' needs double precision, which mps lacks: use blocked")
