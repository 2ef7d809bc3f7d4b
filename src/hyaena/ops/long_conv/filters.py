"""What a long filter is: the protocol between the operators and the kinds of filters, and what every kind shares.

``long_conv`` and ``hyena`` use a filter through ``Filter`` alone, so a new kind is one class, anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hyaena.errors import InputError

Evaluate = Callable[[Any, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""``(filter, x, state, reset) -> (y, state)``: x real [B,T,F] in ``filter.dtype``, state [B,F,…], reset bool [B,T] or
None. The skip is not part of y. ``by_document`` makes one of a function that cannot reset."""

Stop = int | Tensor
"""A number of steps, 1 … T, or a number for each row, int [B]."""

SHORT = 16
"""Below this many steps the step loop is cheaper than building matrices or spectra."""


class Filter(Protocol):
    """A kind of long filters: F causal filters of one form, each with a state.

    Filter f serves the D/F neighbouring channels ``f·D/F … (f+1)·D/F - 1``; D comes from the input. The channels of a
    group are evaluated as rows of a batch of F channels, so a kind knows of F channels only, and builds its matrices
    or spectra once per group.

    Every method obeys the law of splitting: ``f(a ++ b)`` equals ``f(a)`` to a state, then ``f(b)`` from that state.
    A state is a tensor [B,D,…] that the methods of a filter share (``"truncated"``, see there, is the one exception).
    """

    @property
    def methods(self) -> Mapping[str, Evaluate]:
        """The ways to evaluate the kind, by name: an attribute of the class, of functions that take the filter first.

        The names of ``METHODS`` are described there; a kind may have others.
        """
        ...

    @property
    def groups(self) -> int:
        """F, the number of filters."""
        ...

    @property
    def skip(self) -> Tensor | None:
        """The instantaneous gain that is added to the filter, real [D], or None for none."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the arithmetic and of real states; complex states have the complex dtype that belongs to
        it. float32 or wider."""
        ...

    def initial_state(self, batch: int, channels: int, method: str = "auto") -> Tensor:
        """The state before the first step, zeros [B,D,…] on the filter's device, for this method."""
        ...

    def check_state(self, state: Tensor, batch: int, channels: int, method: str = "auto") -> None:
        """Refuse a state of another kind or shape by an ``InputError``."""
        ...

    def choose_method(self, length: int, state: Tensor | None = None) -> str:
        """Choose the method of ``"auto"`` for T steps after this state, or after none."""
        ...


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The real dtype in which a filter of these numbers is evaluated: theirs, and float32 at least."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.real.dtype if t.is_complex() else t.dtype)
    return dtype


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype of a real one, float32 or float64. torch.compile does not know ``dtype.to_complex()``."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def check_shape(state: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a state of another shape."""
    if state.shape != shape:
        raise InputError(f"long_conv's state must be {shape}, and is {tuple(state.shape)}")


def by_document(evaluate: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Evaluate:
    """Give resets to a method that has none: evaluate the stretches between boundaries one after another.

    A boundary of one row cuts every row; the rows without it continue from their state. Exact, and cheap while
    documents are long: the cost of a method that is at least linear in T does not grow, but for the calls.
    """

    def run(filter: Any, x: Tensor, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        if reset is None:
            return evaluate(filter, x, state)
        inner = reset[:, 1:].any(0).nonzero().flatten() + 1
        outputs = []
        for start, stop in itertools.pairwise([0, *inner.tolist(), x.shape[1]]):
            begins = reset[:, start].view(-1, *[1] * (state.ndim - 1))
            y, state = evaluate(filter, x[:, start:stop], torch.where(begins, torch.zeros_like(state), state))
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return run


def group_rows(x: Tensor, groups: int) -> Tensor:
    """The channels of a group as rows of the batch: [B,T,D] -> [B·D/F,T,F]."""
    if x.shape[2] == groups:
        return x
    return x.unflatten(2, (groups, -1)).permute(0, 3, 1, 2).flatten(0, 1)


def ungroup_rows(x: Tensor, batch: int) -> Tensor:
    """The inverse of ``group_rows``: [B·D/F,T,F] -> [B,T,D]."""
    if x.shape[0] == batch:
        return x
    return x.unflatten(0, (batch, -1)).permute(0, 2, 3, 1).flatten(2)


def group_state(state: Tensor, groups: int) -> Tensor:
    """``group_rows`` of a state: [B,D,…] -> [B·D/F,F,…]."""
    if state.shape[1] == groups:
        return state
    return state.unflatten(1, (groups, -1)).movedim(2, 1).flatten(0, 1)


def ungroup_state(state: Tensor, batch: int) -> Tensor:
    """The inverse of ``group_state``: [B·D/F,F,…] -> [B,D,…]."""
    if state.shape[0] == batch:
        return state
    return state.unflatten(0, (batch, -1)).movedim(1, 2).flatten(1, 2)


def group_stops(stops: Sequence[Stop], channels: int, groups: int) -> list[Stop]:
    """``group_rows`` of numbers of steps."""
    repeats = channels // groups
    return [stop.repeat_interleave(repeats) if isinstance(stop, Tensor) and repeats > 1 else stop for stop in stops]
