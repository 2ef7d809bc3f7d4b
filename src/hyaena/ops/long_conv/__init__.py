"""The long convolution: filters of several kinds, many ways to evaluate each, one contract.

    long_conv(a ++ b, f)  ==  long_conv(a, f) -> s, then long_conv(b, f, s)        for every method and every split

A kind is a class with the attributes of ``Filter``. Those of this package, with their states:

    ModalFilter        complex modes          complex [B,D,N], one number per mode
    RealModalFilter    real modes             real [B,D,N], one number per mode
    CanonicalFilter    a rational function    real [B,D,M], the numerator of the free response
    ExplicitFilter     taps                   real [B,D,W-1], a window of inputs

Each may hold fewer filters than there are channels; neighbouring channels then share one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.long_conv.canonical import CanonicalFilter, to_canonical, to_canonical_state, to_modal
from hyaena.ops.long_conv.explicit import ExplicitFilter
from hyaena.ops.long_conv.filters import (
    Evaluate,
    Filter,
    Stop,
    by_document,
    complex_dtype,
    group_rows,
    group_state,
    group_stops,
    ungroup_rows,
    ungroup_state,
)
from hyaena.ops.long_conv.kept import TableStore
from hyaena.ops.long_conv.modal import ModalFilter, RealModalFilter, taps, truncation_window
from hyaena.ops.long_conv.modes import decay_lengths
from hyaena.ops.long_conv.truncated import TRUNCATION_TOLERANCE, Truncation, choose_window, dropped_energy, truncate

__all__ = [
    "KINDS",
    "METHODS",
    "TRUNCATION_TOLERANCE",
    "CanonicalFilter",
    "Evaluate",
    "ExplicitFilter",
    "Filter",
    "Method",
    "ModalFilter",
    "RealModalFilter",
    "Stop",
    "TableStore",
    "Truncation",
    "by_document",
    "check_channels",
    "choose_window",
    "decay_lengths",
    "dropped_energy",
    "kinds_of",
    "long_conv",
    "long_conv_states",
    "long_conv_with_states",
    "taps",
    "to_canonical",
    "to_canonical_state",
    "to_modal",
    "truncate",
    "truncation_window",
]

KINDS = (ModalFilter, RealModalFilter, CanonicalFilter, ExplicitFilter)
"""The kinds of filters of this package, for tables that describe them; the operators take any ``Filter``."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one way of evaluating a filter can do, whichever of its kinds (``kinds_of``) it is given.

    Attributes:
        summary: one line for people.
        state: what it leaves behind of a filter of modes. Methods that leave modes can be mixed freely.
        exact: it computes the filter's own output, up to rounding.
        reset: it forgets its state inside a sequence (packed documents) in one pass; methods without it are evaluated
            document by document.
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


METHODS: dict[str, Method] = {
    "reference": Method(
        summary="float64 step loop, the oracle of the tests",
        reset=True,
        cost="O(T·N)",
        memory="O(T·N)",
    ),
    "recurrence": Method(
        summary="step loop; decoding",
        reset=True,
        cost="O(T·N)",
        memory="O(N)",
    ),
    "direct": Method(
        summary="sum over taps",
        reset=True,
        cost="O(T·W)",
        memory="O(T)",
    ),
    "fft": Method(
        summary="zero-padded real FFT",
        reset=False,
        cost="O(T log T)",
        memory="O(T)",
    ),
    "blocked": Method(
        summary="Toeplitz products in chunks, a scan between",
        reset=True,
        cost="O(T·C)",
        memory="O(T)",
    ),
    "scan": Method(
        summary="associative scan over time",
        reset=True,
        cost="O(T·N)",
        memory="O(T·N)",
    ),
    "canonical-fft": Method(
        summary="transfer function, divided in float64",
        reset=False,
        cost="O(T·(N + log T))",
        memory="O(T)",
    ),
    "truncated": Method(
        summary="the first W taps only; reports the energy that it drops",
        state="window",
        exact=False,
        reset=False,
        cost="O((T+W) log(T+W))",
        memory="O(T+W)",
    ),
}
"""The methods of this package, described; the functions are in ``Filter.methods`` of each kind."""


def kinds_of(method: str) -> tuple[type, ...]:
    """The kinds of filters of this package that a method evaluates."""
    return tuple(kind for kind in KINDS if method in kind.methods)


def choose(filter: Filter, method: str, length: int, state: Tensor | None) -> str:
    """The method that evaluates this call: the filter's choice for ``"auto"``; any other name is checked.

    Raises:
        UnsupportedError: the kind of filter has no such method.
    """
    if method == "auto":
        return filter.choose_method(length, state)
    if method not in filter.methods:
        kind = next((kind for kind in KINDS if isinstance(filter, kind)), type(filter))  # without what a module keeps
        known = f"takes no {kind.__name__}" if method in METHODS else "is unknown"
        raise UnsupportedError(f"long_conv method {method!r} {known}: choose auto, {', '.join(filter.methods)}")
    return method


def check_channels(filter: Filter, channels: int) -> None:
    """Refuse a number of channels that the filter cannot serve, and a skip of another number of channels."""
    if filter.groups < 1 or channels % filter.groups or not channels:
        raise InputError(
            f"{channels} channels cannot share {filter.groups} filters evenly: their number must divide the channels'"
        )
    if filter.skip is not None and filter.skip.shape != (channels,):
        raise InputError(f"the filter's skip must be of shape ({channels},), and is {tuple(filter.skip.shape)}")


def long_conv(
    x: Tensor,
    filter: Filter,
    state: Tensor | None = None,
    *,
    method: str = "auto",
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve x with long filters, from a state, to a state.

    Equation: ``y[t] = Σ_{k<=t} h[k]·x[t-k] + skip·x[t]``, h the impulse response of the channel's filter, when the
    state before is None. A filter of modes is the recurrence ``s[t] = p·s[t-1] + x[t]``, ``y[t] = Re Σ_n R_n s_n[t] +
    skip·x[t]``.

    Args:
        x: real [B,T,D], T >= 1, any floating dtype. Arithmetic runs in the precision of the filter's numbers
            (float32 for models), under autocast too.
        filter: F filters of one kind; F divides D, and filter f serves the channels ``f·D/F … (f+1)·D/F - 1``.
        state: the state that the steps before x left, [B,D,…]; None for nothing.
        method: a key of ``filter.methods`` (those of this package are described in ``METHODS``), or ``"auto"``.
            ``"truncated"`` without a state cuts a filter of modes as ``truncate(filter)`` does.
        reset: bool [B,T]; True forgets everything before that step (the boundary of a packed document).

    Returns:
        y [B,T,D] in the dtype of x, and the state after x.

    Raises:
        InputError: shapes or states that do not fit.
        UnsupportedError: a method that the kind of filter does not have, or a filter that cannot be cut.

    Source: Massaroli et al. 2023, "Laughing Hyena Distillery" (modal filters, recurrent and convolutional modes);
    Ku et al. 2025, "Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale" (groups).
    """
    return _apply(x, filter, state, method, reset, ())[:2]


def long_conv_with_states(
    x: Tensor, filter: Filter, state: Tensor | None, stops: Sequence[Stop], *, method: str = "auto"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``long_conv`` and ``long_conv_states``.

    They share their work in the method ``blocked`` of a kind of filter with ``blocked_with_states(x, state, stops)``.

    Args:
        x, filter, state, method: see ``long_conv``.
        stops: see ``long_conv_states``.

    Returns:
        y, the state after x, and the states at the stops.
    """
    y, after, states = _apply(x, filter, state, method, None, stops)
    return y, after, states or long_conv_states(x, filter, state, stops)


def _apply(
    x: Tensor, filter: Filter, state: Tensor | None, method: str, reset: Tensor | None, stops: Sequence[Stop]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See ``long_conv``; the states at the stops where the method computes them by the way, else none."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise InputError(f"long_conv takes x of shape [B, T>=1, D], and was given {tuple(x.shape)}")
    batch, length, channels = x.shape
    check_channels(filter, channels)
    if reset is not None and reset.shape != (batch, length):
        raise InputError(f"long_conv takes a reset of shape {(batch, length)}, and was given {tuple(reset.shape)}")
    name = choose(filter, method, length, state)
    groups = filter.groups
    with torch.autocast(x.device.type, enabled=False):
        if state is None:
            state = filter.initial_state(batch, channels, name)
        else:
            filter.check_state(state, batch, channels, name)
        dtype = complex_dtype(filter.dtype) if state.is_complex() else filter.dtype
        if batch == 0:  # transforms and products of nothing are errors of torch
            return x.clone(), state.to(dtype), [state.to(dtype) for _ in stops]
        wide = x.to(filter.dtype)
        if reset is not None and groups != channels:
            reset = reset.repeat_interleave(channels // groups, dim=0)
        rows = group_rows(wide, groups), group_state(state.to(dtype), groups)
        together = getattr(filter, "blocked_with_states", None) if stops and name == "blocked" else None
        if together is None:
            y, *after = filter.methods[name](filter, *rows, reset)
        else:
            y, last, states = together(*rows, group_stops(stops, channels, groups))
            after = [last, *states]
        y, after = ungroup_rows(y, batch), [ungroup_state(one, batch) for one in after]
        if filter.skip is not None:
            y = torch.addcmul(y, filter.skip.to(y.dtype), wide.to(y.dtype))
    last, *states = (one.to(dtype).contiguous() for one in after)  # the steps that follow read it again and again
    return y.to(x.dtype), last, states


def long_conv_states(x: Tensor, filter: Filter, state: Tensor | None, stops: Sequence[Stop]) -> list[Tensor]:
    """The states of ``long_conv`` after the first steps of x, without the outputs.

    A kind of filter with a method ``states(x, state, stops)`` computes all of them together; where it has none, or the
    method returns None for this kind of state, x is convolved piece by piece.

    Args:
        x, filter, state: see ``long_conv``.
        stops: numbers of steps, 1 … T, in rising order, or tensors int [B] of a number for each row.

    Returns:
        A state [B,D,…] for every stop.
    """
    batch, _, channels = x.shape
    groups = filter.groups
    together = getattr(filter, "states", None)
    with torch.autocast(x.device.type, enabled=False):
        before = filter.initial_state(batch, channels) if state is None else state
        dtype = complex_dtype(filter.dtype) if before.is_complex() else filter.dtype
        if batch == 0:
            return [before.to(dtype) for _ in stops]
        rows = group_rows(x.to(filter.dtype), groups), group_state(before.to(dtype), groups)
        found = None if together is None else together(*rows, group_stops(stops, channels, groups))
        if found is not None:
            return [ungroup_state(one, batch).to(dtype).contiguous() for one in found]
    if any(isinstance(stop, Tensor) for stop in stops):
        return [_state_by_rows(x, filter, before, stop) for stop in stops]
    states = []
    for start, stop in itertools.pairwise([0, *stops]):
        _, state = long_conv(x[:, start:stop], filter, state)
        states.append(state)
    return states


def _state_by_rows(x: Tensor, filter: Filter, state: Tensor, stop: Stop) -> Tensor:
    """The state of each row after its own number of steps, one row after another."""
    counts = stop.tolist() if isinstance(stop, Tensor) else [stop] * len(x)
    rows = [slice(row, row + 1) for row in range(len(x))]
    return torch.cat([long_conv(x[row, :n], filter, state[row])[1] for row, n in zip(rows, counts, strict=True)])
