"""The canonical (companion) form of a filter: one real rational function per channel, and the recurrence it stands for.

    H(z) = B(z)/A(z) + skip        A = 1 + a_1 z⁻¹ + … + a_M z⁻ᴹ,   B = b_0 + b_1 z⁻¹ + … + b_(M-1) z⁻⁽ᴹ⁻¹⁾
    y[t] = Σ_j b_j x[t-j] - Σ_j a_j y[t-j]

A complex mode is a real fraction of order two, a mode with a real pole one of order one; an order of 2N always
suffices. The state is the numerator of what the past alone still makes, ``S(z)/A(z)``: M real numbers, which is the
transposed direct form II.

The coefficients of a polynomial determine clustered roots badly, so few filters have this form: conversions run in
float64 and refuse beyond a bound (``CONDITION``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.long_conv.canonical_fft import companion, long_conv_rational_fft
from hyaena.ops.long_conv.filters import SHORT, by_document, check_shape, wide_dtype
from hyaena.ops.long_conv.modal import ModalFilter
from hyaena.ops.long_conv.modes import as_real_pairs

CONDITION = 1e7
"""The largest ``cond(V)·‖C‖`` of a channel that conversions accept: V the Vandermonde matrix of its poles (the
eigenvectors of the companion matrix C). Rounding moves C by about 1e-16·‖C‖, and a pole by at most cond(V) times that
(Bauer & Fike 1960), so by 1e-9; a pole that is given twice, which float64 finds twice at a distance of 1e-8, lies
beyond the bound."""


class CanonicalFilter(NamedTuple):
    """F long filters as real rational functions; the state is real [B,D,M].

    Attributes:
        numerator: b_0 … b_(M-1), real [F,M].
        denominator: a_1 … a_M, real [F,M]; the leading 1 is not stored.
        skip: the instantaneous gain, real [D], or None for none.
    """

    numerator: Tensor
    denominator: Tensor
    skip: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.denominator.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.numerator, self.denominator)

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        order = self.denominator.shape[1]
        return torch.zeros(batch, channels, order, dtype=self.dtype, device=self.denominator.device)

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        check_shape(state, (batch, channels, self.denominator.shape[1]))

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        return "recurrence" if length < SHORT else "canonical-fft"

    def _recurrence(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return long_conv_canonical(x, self.numerator.to(x.dtype), self.denominator.to(x.dtype), state, reset)

    def _reference(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        b, a = self.numerator.double(), self.denominator.double()
        return long_conv_canonical(x.double(), b, a, state.double(), reset)

    def _canonical_fft(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return long_conv_rational_fft(x, self.numerator, self.denominator, state)

    methods = {  # noqa: RUF012, an annotation would make it a field
        "reference": _reference,
        "recurrence": _recurrence,
        "canonical-fft": by_document(_canonical_fft),
    }


def to_canonical(filter: ModalFilter) -> CanonicalFilter:
    """Multiply the modes' fractions out, in float64. M is the largest order that a channel needs, at most 2N.

    Raises:
        InputError: poles or residues that are not finite.
        UnsupportedError: a channel beyond ``CONDITION``, such as one with a repeated pole.
    """
    _check_finite("poles and residues", filter.poles, filter.residues)
    poles, residues = filter.poles.detach().to(torch.complex128), filter.residues.detach().to(torch.complex128)
    roots = torch.cat([poles, poles.conj()], dim=-1)  # [D,2N]; a real pole counts once, and one at zero is no root
    distinct = torch.cat([poles != 0, poles.imag != 0], dim=-1)
    counts = distinct.sum(-1)
    for count in counts[counts > 0].unique().tolist():
        channels = (counts == count).nonzero().squeeze(1)
        _check_condition(roots[channels][distinct[channels]].view(len(channels), count), channels)
    denominator, cofactors = _expand(poles)
    numerator = _numerator(poles, residues, cofactors)
    used = ((numerator != 0) | (denominator != 0)).any(0).nonzero()
    order = int(used.max()) + 1 if len(used) else 1
    skip = None if filter.skip is None else filter.skip.detach().double()
    return CanonicalFilter(numerator[:, :order], denominator[:, :order], skip)


def to_canonical_state(filter: ModalFilter, state: Tensor, order: int) -> Tensor:
    """The state of ``to_canonical(filter)``, of order M, where that of ``filter`` is complex [B,D,N]: float64 [B,D,M].

    It is the numerator of the free response ``Re Σ_n (R_n p_n s_n) p_n^t``.
    """
    poles, residues = filter.poles.detach().to(torch.complex128), filter.residues.detach().to(torch.complex128)
    return _numerator(poles, residues * poles * state, _expand(poles)[1])[..., :order]


def to_modal(filter: CanonicalFilter) -> ModalFilter:
    """Expand into partial fractions, in float64: as many modes as the channel with the most needs, others being zero.

    A pole at zero is an instantaneous gain, and joins the skip.

    Raises:
        InputError: coefficients that are not finite, or a numerator longer than its denominator allows.
        UnsupportedError: a channel beyond ``CONDITION``.
    """
    _check_finite("numerator and denominator", *filter[:2])
    device = filter.denominator.device
    b, a = (torch.nn.functional.pad(t.detach().cpu().double(), (0, 1)) for t in filter[:2])  # [D,M+1]
    a = torch.cat([torch.ones_like(a[:, :1]), a[:, :-1]], dim=-1)  # 1, a_1 … a_M
    channels, size = a.shape
    steps = torch.arange(size, device="cpu")
    degree = torch.where(a != 0, steps, 0).amax(-1)
    longer = torch.where(b != 0, steps, 0).amax(-1) > degree
    if bool(longer.any()):
        raise InputError(
            f"the numerator of channel {int(longer.nonzero()[0])} has a higher order than its denominator: "
            "such taps come from no mode, put them into an ExplicitFilter"
        )
    gain = (b.gather(1, degree[:, None]) / a.gather(1, degree[:, None])).squeeze(1)
    b = b - gain[:, None] * a

    poles = torch.zeros(channels, size - 1, dtype=torch.complex128, device="cpu")
    residues = torch.zeros_like(poles)
    for count in degree[degree > 0].unique().tolist():
        rows = (degree == count).nonzero().squeeze(1)
        roots = torch.linalg.eigvals(companion(a[rows, 1 : count + 1]))  # conjugates come exactly so
        _check_condition(roots, rows)
        distance = roots.unsqueeze(-1) - roots.unsqueeze(-2) + torch.eye(count, device="cpu")
        powers = roots.unsqueeze(-1) ** torch.arange(count - 1, -1, -1, device="cpu")
        weight = (powers * b[rows, None, :count]).sum(-1) / distance.prod(-1)
        weight = torch.where(roots.imag > 0, 2 * weight, weight.real)  # one mode stands for a pole and its conjugate
        kept = roots.imag >= 0
        order = (~kept).long().argsort(dim=-1, stable=True)
        for target, values in ((poles, roots), (residues, weight)):
            target[rows, :count] = torch.where(kept, values, 0).gather(1, order)
    modes = max(1, int(((poles != 0).sum(-1)).max()))
    skip = None if filter.skip is None else filter.skip.detach().double()
    if bool((gain != 0).any()):
        skip = gain.to(device) if skip is None else skip + gain.to(device)
    return ModalFilter(poles[:, :modes].to(device), residues[:, :modes].to(device), skip)


def condition(roots: Tensor) -> Tensor:
    """``cond(V)·‖C‖`` of rows of m >= 1 roots: complex [R,m] -> float64 [R], infinite where two roots are the same."""
    count = roots.shape[-1]
    singular = torch.linalg.svdvals(roots.unsqueeze(-1) ** torch.arange(count, device=roots.device))
    polynomial = torch.ones_like(roots[:, :1])
    for n in range(count):
        polynomial = _product(polynomial, torch.stack([torch.ones_like(roots[:, n]), -roots[:, n]], dim=-1))
    companion = torch.linalg.vector_norm(polynomial, dim=-1) + (count - 1) ** 0.5  # at least its Frobenius norm
    return companion * singular[:, 0] / singular[:, -1]


def long_conv_canonical(
    x: Tensor, numerator: Tensor, denominator: Tensor, state: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The step loop: x real [B,T,F], state real [B,F,M] -> (y real [B,T,F], state). 2·M products a step."""
    ahead = torch.nn.functional.pad(numerator[:, 1:], (0, 1))
    outputs = []
    for t in range(x.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None], 0, state)
        now = x[:, t]
        y = numerator[:, 0] * now + state[..., 0]
        state = torch.nn.functional.pad(state[..., 1:], (0, 1)) + ahead * now.unsqueeze(-1)
        state = state - denominator * y.unsqueeze(-1)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _expand(poles: Tensor) -> tuple[Tensor, Tensor]:
    """The product of all modes' denominators without its leading 1, [D,2N], and the products that leave one mode out.

    The latter, [D,N,2N-1], turn the numerators of the modes into that of their sum.
    """
    real = poles.imag == 0
    linear = torch.where(real, -poles.real, -2 * poles.real)
    quadratic = torch.where(real, 0, poles.real**2 + poles.imag**2)
    sections = torch.stack([torch.ones_like(linear), linear, quadratic], dim=-1)  # [D,N,3]
    count = poles.shape[-1]
    cofactors = []
    for left_out in range(count):
        product = torch.ones_like(linear[:, :1])
        for n in range(count):
            if n != left_out:
                product = _product(product, sections[:, n])
        cofactors.append(product)
    return _product(cofactors[0], sections[:, 0])[:, 1:], torch.stack(cofactors, dim=1)


def _numerator(poles: Tensor, weights: Tensor, cofactors: Tensor) -> Tensor:
    """The numerator of ``Σ_t (Re Σ_n w_n p_n^t) z⁻ᵗ``: weights complex [..., D,N] -> real [..., D,2N].

    A mode's own numerator is ``Re w - Re(w p̄) z⁻¹``; the second term is absent where p is real.
    """
    ahead = torch.where(poles.imag == 0, 0, -(weights * poles.conj()).real)
    matrix = torch.cat([torch.nn.functional.pad(cofactors, (0, 1)), torch.nn.functional.pad(cofactors, (1, 0))], dim=1)
    return torch.einsum("...dn,dnm->...dm", as_real_pairs(torch.complex(weights.real, ahead)), matrix)


def _product(p: Tensor, q: Tensor) -> Tensor:
    """The product of polynomials, row by row: [D,m] and [D,k] -> [D,m+k-1]."""
    size = p.shape[-1] + q.shape[-1] - 1
    terms = [torch.nn.functional.pad(p * q[:, k : k + 1], (k, size - p.shape[-1] - k)) for k in range(q.shape[-1])]
    return torch.stack(terms).sum(0)


def _check_finite(what: str, *tensors: Tensor) -> None:
    bad = torch.stack([(~torch.isfinite(t)).any(-1) for t in tensors]).any(0)
    if bool(bad.any()):
        raise InputError(f"{what} of channel {int(bad.nonzero()[0])} are not finite: check the weights")


def _check_condition(roots: Tensor, channels: Tensor) -> None:
    """Refuse rows of roots beyond the bound; ``channels`` [R] names them."""
    worst, row = condition(roots).max(0)
    if not float(worst) <= CONDITION:
        raise UnsupportedError(
            f"channel {int(channels[int(row)])} has poles so close that the canonical form cannot hold them: its "
            f"condition is {float(worst):.1e}, and the bound {CONDITION:.0e}; stay with the modal form"
        )
