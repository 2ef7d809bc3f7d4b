"""Filters of modes cut to their first W taps.

The dropped energy has a closed form (``dropped_energy``), so the window is chosen from a tolerance before any
convolution.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.long_conv.explicit import ExplicitFilter
from hyaena.ops.long_conv.modes import Modes

TRUNCATION_TOLERANCE = 1e-12
"""Of the energy, so 1e-6 of the amplitude: what float32 would round away."""

LONGEST = 1 << 20
"""The longest window that a tolerance may choose, in steps."""


class FilterOfModes(Protocol):
    """What is needed of a filter to cut it: ``ModalFilter`` or ``RealModalFilter``."""

    @property
    def skip(self) -> Tensor | None: ...

    def modes(self) -> Modes: ...


class Truncation(NamedTuple):
    """What a truncation did.

    Attributes:
        window: W, the taps that are left.
        dropped: the share of each channel's energy that is gone, ``Σ_{t>=W} h[t]² / Σ_t h[t]²`` without the skip
            (which stays whole), float64 [D].
    """

    window: int
    dropped: Tensor


def truncate(
    filter: FilterOfModes, *, tolerance: float | None = None, window: int | None = None
) -> tuple[ExplicitFilter, Truncation]:
    """Cut a modal filter to its first W taps, and report what that drops.

    Args:
        filter: the filter; every mode must decay.
        tolerance: the largest share of any channel's energy that may be dropped; the shortest window that keeps to
            it is chosen. ``TRUNCATION_TOLERANCE`` when neither this nor a window is given.
        window: W, instead of a tolerance.

    Raises:
        InputError: tolerance and window together, or one of them out of range.
        UnsupportedError: a pole on or outside the unit circle, or a tolerance that takes more than ``LONGEST`` taps.
    """
    if tolerance is not None and window is not None:
        raise InputError("truncate takes a tolerance or a window, and was given both: leave one out")
    if window is not None and window < 1:
        raise InputError(f"the window is {window}: keep at least one tap")
    if window is None:
        window = choose_window(filter, TRUNCATION_TOLERANCE if tolerance is None else tolerance)
    return cut(filter, window), Truncation(window, dropped_energy(filter, window))


def cut(filter: FilterOfModes, window: int) -> ExplicitFilter:
    """The first ``window`` taps, whatever they leave out."""
    return ExplicitFilter(filter.modes().impulse_response(window), filter.skip)


def choose_window(filter: FilterOfModes, tolerance: float = TRUNCATION_TOLERANCE) -> int:
    """The smallest W at which no channel drops more than ``tolerance`` of its energy. Raises as ``truncate`` does."""
    if not 0 < tolerance < 1:
        raise InputError(f"the tolerance is {tolerance}: give a share of the energy between 0 and 1")
    energy = _Energy(filter)
    excess = energy.dropped(LONGEST) > tolerance
    if bool(excess.any()):
        channel = int(excess.nonzero()[0])
        raise UnsupportedError(
            f"a window of {LONGEST:,} taps drops more than {tolerance:g} of the energy of channel {channel}, whose "
            f"largest |p| is {float(energy.size[channel]):.9f}: allow a larger tolerance, or use another method"
        )
    low, high = 0, LONGEST  # a window of `low` is too short, one of `high` is not: the energy left only ever falls
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bool((energy.dropped(middle) > tolerance).any()) else (low, middle)
    return high


def dropped_energy(filter: FilterOfModes, window: int) -> Tensor:
    """The share of each channel's energy that lies beyond ``window`` taps, float64 [D], in closed form.

    With ``v_n = R_n p_n^W``, and 1/(1 - q) the sum of a geometric series::

        Σ_{t>=W} (Re Σ_n R_n p_n^t)² = ½ Re Σ_nm [ v_n v_m / (1 - p_n p_m) + v_n v̄_m / (1 - p_n p̄_m) ]
    """
    return _Energy(filter).dropped(window)


class _Energy:
    """The closed form, its matrices made once. On the CPU: it is small, and not every device has float64."""

    def __init__(self, filter: FilterOfModes) -> None:
        self.poles, self.residues = (z.detach().cpu().to(torch.complex128) for z in filter.modes())
        self.poles = torch.where(self.residues == 0, 0, self.poles)  # a mode of no weight has no energy
        self.size = self.poles.abs().amax(-1)
        if not bool((self.size < 1).all()):
            channel = int((~(self.size < 1)).nonzero()[0])
            raise UnsupportedError(
                f"channel {channel} has a pole of |p| = {float(self.size[channel]):.9f}, which never decays, so "
                "cutting its filter would drop infinite energy: use another method than truncated"
            )
        p = self.poles
        self.plain = 1 / (1 - p.unsqueeze(-1) * p.unsqueeze(-2))  # [D,N,N]
        self.crossed = 1 / (1 - p.unsqueeze(-1) * p.conj().unsqueeze(-2))
        self.total = self._after(0)

    def _after(self, start: int) -> Tensor:
        v = (self.residues * self.poles**start).unsqueeze(-2)  # [D,1,N]
        energy = v @ self.plain @ v.mT + v @ self.crossed @ v.mH
        return energy.real.flatten().clamp(min=0) / 2  # a sum of squares, which rounding alone can take below zero

    def dropped(self, window: int) -> Tensor:
        return torch.where(self.total > 0, self._after(window) / self.total, 0)
