"""The long convolution: one function, many ways to evaluate it, one contract.

    long_conv(a ++ b, f)  ==  long_conv(a, f) -> s, then long_conv(b, f, s)        for every method and every split

A filter comes in one of three forms, each with a state of its own kind:

    ModalFilter        modes                  complex [B,D,N], one number per mode
    CanonicalFilter    a rational function    real [B,D,M], the numerator of the free response
    ExplicitFilter     taps                   real [B,D,W-1], a window of inputs

``METHODS`` says what each way can do; the tests are driven by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.long_conv.blocked import long_conv_blocked
from hyaena.ops.long_conv.canonical import (
    CanonicalFilter,
    long_conv_canonical,
    to_canonical,
    to_canonical_state,
    to_modal,
)
from hyaena.ops.long_conv.canonical_fft import long_conv_canonical_fft, long_conv_rational_fft
from hyaena.ops.long_conv.fft import long_conv_fft
from hyaena.ops.long_conv.filters import ModalFilter, decay_lengths, taps
from hyaena.ops.long_conv.recurrence import long_conv_recurrence
from hyaena.ops.long_conv.reference import long_conv_reference
from hyaena.ops.long_conv.scan import long_conv_scan
from hyaena.ops.long_conv.truncated import (
    TRUNCATION_TOLERANCE,
    ExplicitFilter,
    Truncation,
    choose_window,
    cut,
    dropped_energy,
    long_conv_explicit,
    truncate,
)

__all__ = [
    "METHODS",
    "TRUNCATION_TOLERANCE",
    "CanonicalFilter",
    "Capabilities",
    "ExplicitFilter",
    "Filter",
    "Method",
    "ModalFilter",
    "Truncation",
    "choose_window",
    "decay_lengths",
    "dropped_energy",
    "long_conv",
    "resolve_method",
    "taps",
    "to_canonical",
    "to_canonical_state",
    "to_modal",
    "truncate",
]

Filter = ModalFilter | CanonicalFilter | ExplicitFilter
Evaluate = Callable[[Tensor, Any, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one way of evaluating a filter can do.

    Attributes:
        summary: one line for people.
        state: what it leaves behind of a modal filter. Methods that leave modes can be mixed freely.
        exact: it computes what the filter says, up to rounding.
        reset: it can forget its state inside a sequence (packed documents).
        padding: zeros in front contribute nothing, so padded rows equal rows alone.
        gradients: autograd passes through it at a sensible cost.
        cost: per channel.
        memory: per channel, beyond input and output.
    """

    summary: str
    state: Literal["modes", "window"] = "modes"
    exact: bool = True
    reset: bool
    padding: bool = True
    gradients: bool = True
    cost: str
    memory: str

    @property
    def forms(self) -> tuple[type, ...]:
        """The forms of filters that it takes."""
        return (ModalFilter,)


@dataclass(frozen=True, kw_only=True)
class Method(Capabilities):
    """One way of evaluating the long convolution.

    Attributes:
        evaluate: for each form of filter that it takes, ``(x, filter, state, reset) -> (y, state)``, every argument
            given. A method that leaves a window is given modal filters cut.
    """

    evaluate: Mapping[type, Evaluate]

    @property
    def forms(self) -> tuple[type, ...]:
        """Those that it evaluates, and modal ones where it cuts them first."""
        return (ModalFilter, *self.evaluate) if self.state == "window" else tuple(self.evaluate)


def _reference(x: Tensor, filter: ModalFilter, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return long_conv_reference(x, filter.poles, filter.residues, filter.skip, state, reset)


def _without_reset(evaluate: Callable[[Tensor, Any, Tensor], tuple[Tensor, Tensor]]) -> Evaluate:
    return lambda x, filter, state, _: evaluate(x, filter, state)


METHODS: dict[str, Method] = {
    "reference": Method(
        summary="float64 step loop, the oracle of the tests",
        evaluate={ModalFilter: _reference},
        reset=True,
        cost="O(T·N)",
        memory="O(T·N)",
    ),
    "recurrence": Method(
        summary="step loop; decoding",
        evaluate={ModalFilter: long_conv_recurrence, CanonicalFilter: long_conv_canonical},
        reset=True,
        cost="O(T·N)",
        memory="O(N)",
    ),
    "fft": Method(
        summary="zero-padded real FFT",
        evaluate={ModalFilter: _without_reset(long_conv_fft)},
        reset=False,
        cost="O(T log T)",
        memory="O(T)",
    ),
    "blocked": Method(
        summary="Toeplitz products in chunks, a scan between",
        evaluate={ModalFilter: long_conv_blocked},
        reset=True,
        cost="O(T·C)",
        memory="O(T)",
    ),
    "scan": Method(
        summary="associative scan over time",
        evaluate={ModalFilter: long_conv_scan},
        reset=True,
        cost="O(T·N)",
        memory="O(T·N)",
    ),
    "canonical-fft": Method(
        summary="transfer function, divided in float64",
        evaluate={
            ModalFilter: _without_reset(long_conv_canonical_fft),
            CanonicalFilter: _without_reset(long_conv_rational_fft),
        },
        reset=False,
        cost="O(T·(N + log T))",
        memory="O(T)",
    ),
    "truncated": Method(
        summary="the first W taps only; says what that drops",
        evaluate={ExplicitFilter: _without_reset(long_conv_explicit)},
        state="window",
        exact=False,
        reset=False,
        cost="O((T+W) log(T+W))",
        memory="O(T+W)",
    ),
}

SHORT = 16
"""Below this many steps the step loop is cheaper than building a chunk's matrices."""

_LONG_DEFAULT = {ModalFilter: "blocked", CanonicalFilter: "canonical-fft", ExplicitFilter: "truncated"}
_SHORT_DEFAULT = _LONG_DEFAULT | {ModalFilter: "recurrence", CanonicalFilter: "recurrence"}


def resolve_method(method: str, length: int, form: type = ModalFilter) -> str:
    """The method that ``auto`` stands for at this length; any other name is checked and returned."""
    if method == "auto":
        if torch.compiler.is_exporting() and form is ModalFilter:
            return "fft"  # the one whose graph does not depend on the length
        return (_SHORT_DEFAULT if length < SHORT else _LONG_DEFAULT)[form]
    if method not in METHODS:
        raise UnsupportedError(f"unknown long_conv method {method!r}: choose auto, {', '.join(METHODS)}")
    return method


def long_conv(
    x: Tensor,
    filter: Filter,
    state: Tensor | None = None,
    *,
    method: str = "auto",
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve x with a long filter, from a state, to a state.

    Equation, for a modal filter: ``s[t] = p·s[t-1] + x[t]``, ``y[t] = Re Σ_n R_n s_n[t] + skip·x[t]``, which is
    ``y = h * x`` with ``h[t] = skip·δ[t] + Re Σ_n R_n p_n^t`` when the state begins at zero.

    Args:
        x: real [B,T,D], T >= 1, any floating dtype. Arithmetic runs in the precision of the filter's numbers
            (float32 for models), under autocast too.
        filter: the filter, in any of its forms.
        state: what the steps before x left behind; None for nothing. It is complex [B,D,N] for a modal filter, unless
            a truncated evaluation left a window, real [B,D,W-1]: ``auto`` goes on with the same window.
        method: a key of ``METHODS``, or ``"auto"``. ``"truncated"`` without a state cuts the filter as
            ``truncate(filter)`` does.
        reset: bool [B,T]; True forgets everything before that step (the boundary of a packed document).

    Returns:
        y [B,T,D] in the dtype of x, and the state after x.

    Raises:
        InputError: shapes or states that do not fit.
        UnsupportedError: an unknown method, one that cannot reset, one that takes other forms of filters, or a filter
            that cannot be cut.

    Source: Massaroli et al. 2023, "Laughing Hyena Distillery" (modal filters, recurrent and convolutional modes).
    """
    channels = filter[0].shape[0]
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != channels:
        raise InputError(f"long_conv takes x of shape [B, T>=1, D={channels}], and was given {tuple(x.shape)}")
    if method == "auto" and isinstance(filter, ModalFilter) and state is not None and not state.is_complex():
        method = "truncated"
    name = resolve_method(method, x.shape[1], type(filter))
    chosen = METHODS[name]
    if type(filter) not in chosen.forms:
        able = ", ".join(other for other, it in METHODS.items() if type(filter) in it.forms)
        raise UnsupportedError(f"long_conv method {name!r} takes no {type(filter).__name__}: choose {able}")
    if reset is not None and not chosen.reset:
        raise UnsupportedError(f"long_conv method {name!r} cannot reset inside a sequence: use blocked")
    if isinstance(filter, ModalFilter) and chosen.state == "window":
        with torch.autocast(x.device.type, enabled=False):
            filter = cut(filter, choose_window(filter) if state is None else state.shape[-1] + 1)
    size = filter[0].shape[1] - isinstance(filter, ExplicitFilter)
    shape = (x.shape[0], channels, size)
    if state is None:
        state = torch.zeros(shape, dtype=filter[0].dtype, device=x.device)
    else:
        _check_state(state, filter, shape, name)
    numbers = filter[0]
    with torch.autocast(x.device.type, enabled=False):
        y, state = chosen.evaluate[type(filter)](x.to(numbers.real.dtype), filter, state, reset)
    return y.to(x.dtype), state.to(numbers.dtype).contiguous()  # steps that follow run over it again and again


def _check_state(state: Tensor, filter: Filter, shape: tuple[int, ...], method: str) -> None:
    """Refuse a state of another kind or shape."""
    if isinstance(filter, ModalFilter) and not state.is_complex():
        raise InputError(
            f"long_conv method {method!r} was given the window of a truncated filter for a state: go on with "
            "truncated or auto, or begin anew"
        )
    if isinstance(filter, ExplicitFilter) and state.is_complex():
        raise InputError(
            f"long_conv method {method!r} keeps a window of inputs, and was given a state of modes: begin without "
            f"a state, or with a cache that was made for it (make_cache(method={method!r}))"
        )
    if state.shape != shape:
        raise InputError(f"long_conv's state must be {shape}, and is {tuple(state.shape)}")
