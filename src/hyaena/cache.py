"""What a model remembers of the sequences it has read: one state per layer, and how many tokens each row holds.

A cache knows no kind of layer. Every mixer makes states of its own kind (``make_state``), and the cache calls their
verbs. Rows are independent: each has a length of its own, begins at position 0, and costs the memory of its own tokens.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hyaena.errors import CapacityError, InputError

S = TypeVar("S", bound="State")


class State(Protocol):
    """What one layer remembers of a batch of rows.

    Verbs return a state; the old one must not be used afterwards, unless they copy. ``ops.RowTensors`` implements them
    for tuples of tensors whose first axis is the row, ``ops.KVState`` for keys and values.
    """

    def tensors(self) -> list[Tensor]:
        """All storage, each tensor once."""
        ...

    def select(self: S, rows: Sequence[int]) -> S:
        """Copy the given rows, in that order."""
        ...

    def keep(self: S, rows: Sequence[int]) -> S:
        """Drop all rows but these, which are in rising order; free what nothing uses any more."""
        ...

    def join(self: S, others: Sequence[S]) -> S:
        """Append the rows of other states. Raises InputError where they are of another kind."""
        ...

    def reset(self: S) -> S:
        """Forget everything."""
        ...

    def reserve(self: S, lengths: Sequence[int]) -> S:
        """Make room for so many tokens in each row."""
        ...

    def first(self: S, count: int) -> S:
        """The first rows, over the same storage."""
        ...

    def blank(self: S, rows: int) -> S:
        """An empty state of this kind for so many rows, as small as possible."""
        ...

    def put(self: S, row: int, source: S, source_row: int) -> None:
        """Replace a row, in place, by a row of another state, which must not be used afterwards."""
        ...

    def mutated(self) -> list[Tensor]:
        """What a decoding step changes, and would change again if it ran twice for the same token."""
        ...

    def detach(self: S) -> S:
        """The same numbers without their autograd history."""
        ...


class Cache:
    """The states of a batch of sequences.

    Attributes:
        states: one per layer.
        lengths: tokens that each row holds, which is also the position of its next token.
        limits: the most tokens of each row, or None for a row that may grow without limit.
    """

    def __init__(
        self, states: Sequence[Any], lengths: Sequence[int], limits: Sequence[int | None], *, owner: object = None
    ) -> None:
        self.states: list[Any] = list(states)
        self.lengths = list(lengths)
        self.limits = list(limits)
        self._owner = None if owner is None else weakref.ref(owner)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        limit = "no limit" if self.max_length is None else f"at most {self.max_length} tokens a row"
        return f"Cache(rows={self.batch_size}, lengths={self.lengths}, {limit}, {self.nbytes:,} bytes)"

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def max_length(self) -> int | None:
        """The largest limit of a row; None where a row may grow without limit."""
        limits = [limit for limit in self.limits if limit is not None]
        return max(limits) if limits and len(limits) == len(self.limits) else None

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of storage, used or reserved."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for state in self.states for t in state.tensors()]

    # --- for the model -------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, owner: object, rows: int, counts: Sequence[int]) -> Iterator[None]:
        """Guard one forward pass of ``owner`` over ``rows`` rows, which adds ``counts`` tokens to them.

        Raises:
            InputError: the cache belongs to another model, holds other rows, or is in use by another thread.
            CapacityError: a row would pass its limit. Nothing has changed.
        """
        if self._owner is not None and self._owner() is not owner:
            raise InputError("the cache was made by another model: make one with this model's make_cache")
        if self.batch_size != rows:
            taken = " (they were moved to another cache or decoder)" if self.batch_size == 0 else ""
            raise InputError(f"the cache holds {self.batch_size} rows{taken} and the ids {rows}: make another cache")
        if not self._lock.acquire(blocking=False):
            raise InputError("the cache is in use by another thread: give each thread a cache of its own")
        try:
            self._reserve(counts)
            yield
        finally:
            self._lock.release()

    def _reserve(self, counts: Sequence[int]) -> None:
        needed = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        for have, need, limit in zip(self.lengths, needed, self.limits, strict=True):
            if limit is not None and need > limit:
                raise CapacityError(
                    f"the cache holds {have} of at most {limit} tokens and was given {need - have} more: "
                    "make it with a larger max_length, or shorten the prompt"
                )
        self.states = [state.reserve(needed) for state in self.states]

    def commit(self, states: Sequence[Any], counts: Sequence[int]) -> None:
        """Replace all states by those after a finished forward pass, which added ``counts`` tokens to the rows."""
        self.states = list(states)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    # --- verbs ---------------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int] | Tensor) -> Cache:
        """Copy the given rows, in that order."""
        index = self._index("select", rows)
        return self._with(
            [state.select(index) for state in self.states],
            [self.lengths[row] for row in index],
            [self.limits[row] for row in index],
        )

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Drop all rows but these, which are in rising order."""
        index = self._index("keep", rows)
        if index != sorted(set(index)):
            raise InputError(f"keep takes rows in rising order, each once, and was given {index}: use select")
        self.states = [state.keep(index) for state in self.states]
        self.lengths = [self.lengths[row] for row in index]
        self.limits = [self.limits[row] for row in index]

    def extend(self, others: Sequence[Cache]) -> None:
        """Append all rows of other caches, which are empty afterwards. Keys and values are not copied."""
        self._check_kin("extend", others)
        self.states = [
            state.join([other.states[i] for other in others]) if others else state
            for i, state in enumerate(self.states)
        ]
        for other in others:
            self.lengths += other.lengths
            self.limits += other.limits
            other.take()

    def take(self) -> list[Any]:
        """Hand the states over to the caller; the cache has no rows afterwards."""
        states, self.states, self.lengths, self.limits = self.states, [], [], []
        return states

    @staticmethod
    def merge(caches: Sequence[Cache]) -> Cache:
        """One cache of copies of all rows of all caches, in that order."""
        if not caches:
            raise InputError("merge takes at least one cache")
        caches[0]._check_kin("merge", caches[1:])
        merged, *others = [cache.snapshot() for cache in caches]
        merged.extend(others)
        return merged

    def snapshot(self) -> Cache:
        """An independent copy: what happens to either leaves the other unchanged."""
        return self.select(range(self.batch_size))

    def restore(self, snapshot: Cache) -> None:
        """Return to what ``snapshot`` holds; the snapshot stays usable.

        Raises:
            InputError: the snapshot is of a cache of another model.
        """
        self._check_kin("restore", [snapshot])
        copy = snapshot.snapshot()
        self.states, self.lengths, self.limits = copy.states, copy.lengths, copy.limits

    def reset(self) -> None:
        """Forget everything; keep the storage."""
        self.states = [state.reset() for state in self.states]
        self.lengths = [0] * self.batch_size

    def _with(self, states: Sequence[Any], lengths: Sequence[int], limits: Sequence[int | None]) -> Cache:
        return Cache(states, lengths, limits, owner=None if self._owner is None else self._owner())

    def _index(self, verb: str, rows: Sequence[int] | Tensor) -> list[int]:
        index = torch.as_tensor(rows).tolist() if isinstance(rows, Tensor) else list(rows)
        if not index or not all(isinstance(row, int) and 0 <= row < self.batch_size for row in index):
            raise InputError(f"{verb} takes rows of 0 … {self.batch_size - 1}, and was given {index}")
        return index

    def _check_kin(self, verb: str, others: Sequence[Cache]) -> None:
        for other in others:
            if other._owner is not self._owner and (
                other._owner is None or self._owner is None or other._owner() is not self._owner()
            ):
                raise InputError(f"{verb} was given a cache of another model: use caches of one model")
            if other.batch_size == 0:
                raise InputError(f"{verb} was given a cache without rows (they were moved elsewhere)")
