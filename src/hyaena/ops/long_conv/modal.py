"""Filters of modes: sums of damped exponentials, complex or real, which are convolutions and recurrences.

complex:  h[t] = Re Σ_n R_n p_n^t            real:  h[t] = Σ_n R_n exp(λ_n t)
state:    s[t] = p·s[t-1] + x[t], one number per mode
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.long_conv.blocked import BlockTables, long_conv_blocked, states_blocked
from hyaena.ops.long_conv.canonical_fft import long_conv_canonical_fft
from hyaena.ops.long_conv.exported import long_conv_exported
from hyaena.ops.long_conv.fft import long_conv_fft
from hyaena.ops.long_conv.filters import SHORT, Stop, by_document, check_shape, complex_dtype, wide_dtype
from hyaena.ops.long_conv.modes import Modes, widen
from hyaena.ops.long_conv.recurrence import long_conv_recurrence
from hyaena.ops.long_conv.reference import long_conv_reference
from hyaena.ops.long_conv.scan import long_conv_scan
from hyaena.ops.long_conv.truncated import TRUNCATION_TOLERANCE, choose_window, cut


def _blocked(filter: Any, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return long_conv_blocked(x, filter.block_tables(), state, reset)[:2]


def _scan(filter: Any, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return long_conv_scan(x, filter.modes(), state, reset)


def _fft(filter: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    evaluate = long_conv_exported if torch.compiler.is_exporting() else long_conv_fft
    return evaluate(x, filter.modes(), state)


def _canonical_fft(filter: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, after = long_conv_canonical_fft(x, filter.modes(), state)
    return y, after if state.is_complex() else after.real


def _truncated(filter: Any, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return cut(filter, state.shape[-1] + 1).evaluate(x, state, reset)


def _automatic(length: int) -> str:
    if torch.compiler.is_exporting():
        return "fft"  # whose graph holds for every length, see exported.py
    return "recurrence" if length < SHORT else "blocked"


def _zero_state(filter: Any, batch: int, channels: int, method: str) -> Tensor:
    modes = filter.modes()
    if method == "truncated":
        size, dtype = truncation_window(filter) - 1, filter.dtype
    else:
        size, dtype = modes.poles.shape[1], modes.residues.dtype
    return torch.zeros(batch, channels, size, dtype=dtype, device=modes.poles.device)


class ModalFilter(NamedTuple):
    """F long filters of N complex modes each; the state is complex [B,D,N].

    The method ``"truncated"`` alone has another state, a window of inputs, real [B,D,W-1]: ``"auto"`` continues with
    it from such a state.

    Attributes:
        poles: p, complex [F,N].
        residues: R, complex [F,N].
        skip: the instantaneous gain, real [D], or None for none.
    """

    poles: Tensor
    residues: Tensor
    skip: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.poles.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.poles)

    def modes(self) -> Modes:
        """Poles in double precision, residues in the precision of the arithmetic."""
        return Modes(widen(self.poles), self.residues.to(complex_dtype(self.dtype)))

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        return _zero_state(self, batch, channels, method)

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        if method != "truncated" and not state.is_complex():
            raise InputError(
                f"long_conv method {method!r} was given the window of a truncated filter for a state: continue with "
                "truncated or auto, or start without a state"
            )
        if method == "truncated" and state.is_complex():
            raise InputError(
                "long_conv method 'truncated' keeps a window of inputs, and was given a state of modes: start without "
                "a state, or with a cache that was made for it (make_cache(method='truncated'))"
            )
        check_shape(state, (batch, channels, state.shape[-1] if method == "truncated" else self.poles.shape[1]))

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        if state is not None and not state.is_complex():
            return "truncated"
        return _automatic(length)

    def states(self, x: Tensor, state: Tensor, stops: Sequence[Stop]) -> list[Tensor] | None:
        return states_blocked(x, self.block_tables(), state, stops) if state.is_complex() else None

    def blocked_with_states(
        self, x: Tensor, state: Tensor, stops: Sequence[Stop]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        return long_conv_blocked(x, self.block_tables(), state, None, stops)

    def block_tables(self) -> BlockTables:
        """What the method ``"blocked"`` computes with."""
        return BlockTables(self.modes())

    def _recurrence(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        poles = self.poles.to(state.dtype)
        return long_conv_recurrence(x, lambda s, now: poles * s + now, self.residues.to(state.dtype), state, reset)

    def _reference(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return long_conv_reference(x, self.poles, self.residues, state, reset)

    methods = {  # noqa: RUF012, an annotation would make it a field
        "reference": _reference,
        "recurrence": _recurrence,
        "fft": by_document(_fft),
        "blocked": _blocked,
        "scan": _scan,
        "canonical-fft": by_document(_canonical_fft),
        "truncated": _truncated,
    }


class RealModalFilter(NamedTuple):
    """F long filters of N real modes each, ``h[t] = Σ_n R_n exp(λ_n t)``; the state is real [B,D,N].

    The method ``"truncated"`` alone has another state, a window of inputs, real [B,D,W-1] with W-1 other than N:
    ``"auto"`` continues with it from such a state.

    The poles are given by their logarithms, because float32 cannot hold a slow one: near 1 it rounds to 6e-8, which is
    a share of 6e-8/r of the rate of a pole 1 - r. Powers are formed of the logarithms in float64, and the recurrence
    adds ``expm1(λ)·s``, which keeps the digits of λ.

    Attributes:
        log_poles: λ, real [F,N].
        residues: R, real [F,N].
        skip: the instantaneous gain, real [D], or None for none.

    Source: Brixi et al. 2025, "Genome modeling and design across all domains of life with Evo 2" (Hyena-LI).
    """

    log_poles: Tensor
    residues: Tensor
    skip: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.log_poles.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return wide_dtype(self.log_poles)

    def modes(self) -> Modes:
        """Poles in double precision, residues in the precision of the arithmetic."""
        return Modes(widen(self.log_poles).exp(), self.residues.to(self.dtype))

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        return _zero_state(self, batch, channels, method)

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        if state.is_complex():
            raise InputError("a filter of real modes has a real state, and was given a complex one: start without it")
        if method == "truncated" and state.shape[-1] == self.log_poles.shape[1]:
            raise InputError(
                "long_conv method 'truncated' keeps a window of inputs, and was given a state of modes: start without "
                "a state, or with a cache that was made for it (make_cache(method='truncated'))"
            )
        check_shape(state, (batch, channels, state.shape[-1] if method == "truncated" else self.log_poles.shape[1]))

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        if state is not None and state.shape[-1] != self.log_poles.shape[1]:
            return "truncated"
        return _automatic(length)

    def states(self, x: Tensor, state: Tensor, stops: Sequence[Stop]) -> list[Tensor] | None:
        if state.shape[-1] != self.log_poles.shape[1]:
            return None
        return states_blocked(x, self.block_tables(), state, stops)

    def blocked_with_states(
        self, x: Tensor, state: Tensor, stops: Sequence[Stop]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        return long_conv_blocked(x, self.block_tables(), state, None, stops)

    def block_tables(self) -> BlockTables:
        """What the method ``"blocked"`` computes with."""
        return BlockTables(self.modes())

    def _recurrence(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        change = torch.expm1(self.log_poles.to(state.dtype))
        return long_conv_recurrence(
            x, lambda s, now: s + (change * s + now), self.residues.to(state.dtype), state, reset
        )

    def _reference(self, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        return long_conv_reference(x, self.log_poles.double().exp(), self.residues, state, reset)

    methods = {  # noqa: RUF012, an annotation would make it a field
        "reference": _reference,
        "recurrence": _recurrence,
        "fft": by_document(_fft),
        "blocked": _blocked,
        "scan": _scan,
        "canonical-fft": by_document(_canonical_fft),
        "truncated": _truncated,
    }


def truncation_window(filter: ModalFilter | RealModalFilter, tolerance: float = TRUNCATION_TOLERANCE) -> int:
    """How many taps the method ``"truncated"`` keeps of a filter; raises as ``truncate`` does.

    A window of real modes is told from their state by its length, so it is made one tap longer where both agree.
    """
    window = choose_window(filter, tolerance)
    ambiguous = isinstance(filter, RealModalFilter) and window - 1 == filter.log_poles.shape[1]
    return window + ambiguous


def taps(filter: ModalFilter | RealModalFilter, length: int) -> Tensor:
    """The impulse response h[0 … length-1], real [F,length], in the precision of the filter.

    With a skip, which belongs to channels, it is [D,length].
    """
    h = filter.modes().impulse_response(length)
    if filter.skip is not None and length:
        h = h.repeat_interleave(filter.skip.shape[0] // filter.groups, dim=0)
        h = torch.cat([h[:, :1] + filter.skip.to(h.dtype).unsqueeze(-1), h[:, 1:]], dim=-1)
    return h
