"""What a model remembers of the sequences it has read: one state per layer, and how many tokens each row holds.

A cache knows no kind of layer. Every mixer makes states of its own kind (``make_state``), and the cache calls their
verbs. Rows are independent: each has a length of its own, begins at position 0, and costs the memory of its own tokens.

Keys and values may lie in pages of a pool (``ops.PagePool``) that many caches share. Then the cache knows which pages
each row has, and whoever owns the pool decides it.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hyaena.arguments import as_whole
from hyaena.errors import CapacityError, InputError, shown
from hyaena.ops import PAGE, PagePool, pages_for

S = TypeVar("S", bound="State")


class State(Protocol):
    """What one layer remembers of a batch of rows.

    Verbs return a state; the old one must not be used afterwards, unless they copy. ``ops.RowTensors`` implements them
    for tuples of tensors whose first axis is the row, ``ops.KVState`` for keys and values, ``ops.PagedKVState`` for
    those on pages.
    """

    def tensors(self) -> list[Tensor]:
        """All storage, each tensor once."""
        ...

    def select(self: S, rows: Sequence[int], room: int | None = None) -> S:
        """Copy the given rows, in that order, with room for as many tokens as they have or for ``room``."""
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

    def mark(self: S) -> S | None:
        """What ``rewind`` needs beside the state itself to return to this moment: a copy, or nothing."""
        ...

    def rewind(self: S, mark: S | None) -> S:
        """Return to the moment of a mark, which stays usable, after nothing but more tokens have been read."""
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


@dataclass(frozen=True, eq=False)
class StateSnapshot:
    """What all layers remember of one row, its keys and values on pages excepted. It is never changed.

    Attributes:
        states: one per layer.
        length: tokens that the row held.
        owner: the model of the cache that it was taken of.
    """

    states: list[Any]
    length: int
    owner: weakref.ref[Any] | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for state in self.states for t in state.tensors())


_IN_USE = "the cache is in use by another thread: give each thread a cache of its own"


@dataclass(frozen=True)
class Mark:
    """A moment of a cache, to which ``Cache.rewind`` returns.

    Attributes:
        lengths: tokens that each row held.
        parts: for each layer what its state needs to return: a small state of a Hyena layer, None of attention, whose
            keys and values stay where they are.
    """

    lengths: tuple[int, ...]
    parts: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [t for part in self.parts if part is not None for t in part.tensors()]


class Cache:
    """The states of a batch of sequences.

    Attributes:
        states: one per layer.
        lengths: tokens that each row holds, which is also the position of its next token.
        limits: the most tokens of each row, or None for a row that may grow without limit.
        pool: where keys and values lie in pages; None where every row has storage of its own.
        pages: the pages of each row, in order. Rows may share pages that are full.
    """

    def __init__(
        self,
        states: Sequence[Any],
        lengths: Sequence[int],
        limits: Sequence[int | None],
        *,
        owner: object = None,
        pool: PagePool | None = None,
        pages: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.states: list[Any] = list(states)
        self.lengths = list(lengths)
        self.limits = list(limits)
        self.pool = pool
        self.pages = [list(row) for row in pages or [[]] * len(self.lengths)]
        self._owner = None if owner is None else weakref.ref(owner)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        limit = "no limit" if self.max_length is None else f"at most {self.max_length} tokens a row"
        return f"Cache(rows={self.batch_size}, lengths={self.lengths}, {limit}, {self.nbytes:,} bytes)"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a cache that was stored belongs to no model in particular."""
        self._refuse_pages("pickle")
        return {"states": self.states, "lengths": self.lengths, "limits": self.limits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Cache.__init__(self, **state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        self._refuse_pages("deepcopy")
        owner = None if self._owner is None else self._owner()
        return Cache(copy.deepcopy(self.states, memo), self.lengths, self.limits, owner=memo.get(id(owner), owner))

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
        if not self.states:
            raise InputError("the cache holds no rows (they were moved to another cache or decoder)")
        return self.tensors()[0].device if self.pool is None else self.pool.device

    @property
    def nbytes(self) -> int:
        """Bytes of storage, used or reserved; the pages of the rows among them, each once."""
        paged = 0 if self.pool is None else self.pool.page_bytes * len({page for row in self.pages for page in row})
        return paged + sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All storage but pages."""
        return [t for state in self.states for t in state.tensors()]

    # --- for the model -------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, owner: object, rows: int, lengths: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
        """Guard one forward pass of ``owner`` over ``rows`` rows, which adds ``counts`` tokens to their ``lengths``.

        Raises:
            InputError: the cache belongs to another model, holds other rows, or is in use by another thread.
            CapacityError: a row would pass its limit. Nothing has changed.
        """
        self.check_owner(owner)
        if self.batch_size != rows:
            taken = " (they were moved to another cache or decoder)" if self.batch_size == 0 else ""
            raise InputError(f"the cache holds {self.batch_size} rows{taken} and the ids {rows}: make another cache")
        with self._locked():
            if self.lengths != list(lengths):  # since they were read
                raise InputError(_IN_USE)
            self._reserve(counts)
            yield

    def check_owner(self, owner: object) -> None:
        """Raise InputError where the cache is known to be of another model than ``owner``."""
        if self._owner is not None and self._owner() is not owner:
            raise InputError("the cache was made by another model: make one with this model's make_cache")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise InputError(_IN_USE)
        try:
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
        if self.pool is not None:
            for row, need in enumerate(needed):
                _check_room(row, need, self.pages[row])
        if not torch.is_inference_mode_enabled():  # autograd takes no tensors that were made in inference mode
            rows = range(self.batch_size)
            self.states = [state.select(rows) if _is_inference(state) else state for state in self.states]
        self.states = [state.reserve(needed) for state in self.states]

    def commit(self, states: Sequence[Any], counts: Sequence[int]) -> None:
        """Replace all states by those after a finished forward pass, which added ``counts`` tokens to the rows."""
        self.states = list(states)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    # --- verbs ---------------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int] | Tensor, *, max_length: int | None = None) -> Cache:
        """Copy the given rows, in that order; a row may be copied more than once.

        Args:
            rows: their numbers.
            max_length: the limit of the copies, and the tokens that they have room for; those of the rows unless given.

        Raises:
            InputError: keys and values are on pages, of which the cache has none to copy them to. The owner of the pool
                copies pages with ``PagePool.copy``, and states with ``snapshot_states`` and ``restore_states``.
            CapacityError: a row holds more than ``max_length``.
        """
        self._refuse_pages("select")
        index = self._index("select", rows)
        lengths, limits = [self.lengths[row] for row in index], [self.limits[row] for row in index]
        if max_length is not None:
            if max(lengths) > max_length:
                raise CapacityError(f"a row holds {max(lengths)} tokens, more than max_length {max_length}")
            limits = [max_length] * len(index)
        return self._with([state.select(index, max_length) for state in self.states], lengths, limits)

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Drop all rows but these, which are in rising order."""
        index = self._index("keep", rows)
        if index != sorted(set(index)):
            raise InputError(f"keep takes rows in rising order, each once, and was given {index}: use select")
        with self._locked():
            self.states = [state.keep(index) for state in self.states]
            self.lengths = [self.lengths[row] for row in index]
            self.limits = [self.limits[row] for row in index]
            self.pages = [self.pages[row] for row in index]

    def extend(self, others: Sequence[Cache]) -> None:
        """Append all rows of other caches, which are empty afterwards. Keys and values are not copied."""
        if len({id(cache) for cache in (self, *others)}) <= len(others):
            raise InputError("extend was given the same cache twice: append a copy, which snapshot makes")
        self._check_kin("extend", [self, *others])
        with ExitStack() as stack:
            for cache in (self, *others):
                stack.enter_context(cache._locked())
            self.states = [
                state.join([other.states[i] for other in others]) if others else state
                for i, state in enumerate(self.states)
            ]
            for other in others:
                self.lengths += other.lengths
                self.limits += other.limits
                self.pages += other.pages
                other._clear()

    def take(self) -> list[Any]:
        """Hand the states over to the caller; the cache has no rows afterwards."""
        with self._locked():
            return self._clear()

    def _clear(self) -> list[Any]:
        states, self.states, self.lengths, self.limits, self.pages = self.states, [], [], [], []
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
        new = snapshot.snapshot()
        with self._locked():
            self.states, self.lengths, self.limits = new.states, new.lengths, new.limits

    def mark(self) -> Mark:
        """Note this moment, to return to it by ``rewind``. Copies no keys and values."""
        return Mark(tuple(self.lengths), tuple(state.mark() for state in self.states))

    def rewind(self, mark: Mark) -> None:
        """Return to a moment of this cache, or of one that was copied from it since; the mark stays usable.

        Between the two, rows may only have read more tokens. After ``select``, ``keep`` or ``extend`` the rows are
        others, and after rewinding further back the mark is of a moment that never was: use ``snapshot`` and
        ``restore`` there.

        Raises:
            InputError: the rows hold fewer tokens than at the mark, or are others.
        """
        if len(mark.lengths) != self.batch_size or any(
            now < then for now, then in zip(self.lengths, mark.lengths, strict=True)
        ):
            raise InputError(
                f"the rows hold {self.lengths} tokens, and held {list(mark.lengths)} at the mark: rewind to an earlier "
                "moment of the same rows"
            )
        with self._locked():
            self.states = [state.rewind(part) for state, part in zip(self.states, mark.parts, strict=True)]
            self.lengths = list(mark.lengths)

    def reset(self) -> None:
        """Forget everything; keep the storage."""
        with self._locked():
            self.states = [state.reset() for state in self.states]
            self.lengths = [0] * self.batch_size

    # --- rows on pages -------------------------------------------------------------------------------------------

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """Let a row have these pages, in order; its tokens must lie in the first of them.

        Raises:
            InputError: not a cache on pages, no such row, or numbers that are no pages of the pool.
            CapacityError: fewer pages than the row's tokens need.
        """
        pool = self._paged("set_pages")
        [row] = self._index("set_pages", [row])
        with self._locked():
            numbers = pool.check(pages)
            _check_room(row, self.lengths[row], numbers)
            self.pages[row] = numbers

    def with_pages(self, pages: Sequence[Sequence[int]]) -> Cache:
        """Make a cache of empty rows on these pages, in less time than ``make_paged_cache`` takes.

        This cache, of one empty row, says what states and limits the rows have.

        Args:
            pages: of each row.

        Raises:
            InputError: not a cache on pages, not one empty row, no rows, or numbers that are no pages of the pool.
        """
        pool = self._paged("with_pages")
        if self.lengths != [0]:
            raise InputError(f"with_pages takes a cache of one empty row, not one of rows of {self.lengths} tokens")
        if not pages or not all(isinstance(row, Sequence) for row in pages):
            raise InputError("with_pages takes a list of page numbers for each row, of one row at least")
        numbers, rows = [pool.check(row) for row in pages], len(pages)
        owner = None if self._owner is None else self._owner()
        states = [state.blank(rows) for state in self.states]
        return Cache(states, [0] * rows, self.limits * rows, owner=owner, pool=pool, pages=numbers)

    def snapshot_states(self, row: int) -> StateSnapshot:
        """Copy what all layers remember of a row but its pages, which later rows may share as far as they are full."""
        self._paged("snapshot_states")
        index = self._index("snapshot_states", [row])
        with self._locked():
            states = [state.select(index) for state in self.states]
        return StateSnapshot(states, self.lengths[index[0]], self._owner)

    @torch.inference_mode()
    def restore_states(self, row: int, snapshot: StateSnapshot) -> None:
        """Put a row where a snapshot was taken; its pages must hold the tokens before. The snapshot stays usable.

        Raises:
            InputError: not a cache on pages, no such row, or a snapshot of another model or kind of states.
            CapacityError: the pages of the row do not reach so far.
        """
        self._paged("restore_states")
        [row] = self._index("restore_states", [row])
        if self._owner is not None and (snapshot.owner is None or snapshot.owner() is not self._owner()):
            raise InputError("restore_states was given a snapshot of another model: read the tokens again")
        with self._locked():
            _check_room(row, snapshot.length, self.pages[row])
            for mine, theirs in zip(self.states, snapshot.states, strict=True):
                mine.put(row, theirs, 0)
            self.lengths[row] = snapshot.length

    def _paged(self, verb: str) -> PagePool:
        if self.pool is None:
            raise InputError(f"{verb} takes a cache on pages, which make_paged_cache makes; others have snapshot")
        return self.pool

    def _refuse_pages(self, verb: str) -> None:
        if self.pool is not None:
            raise InputError(
                f"{verb}: a cache on pages has none to copy its rows to: make a cache of pages of your own with "
                "make_paged_cache, and use PagePool.copy, snapshot_states and restore_states"
            )

    def _with(self, states: Sequence[Any], lengths: Sequence[int], limits: Sequence[int | None]) -> Cache:
        return Cache(states, lengths, limits, owner=None if self._owner is None else self._owner())

    def _index(self, verb: str, rows: Sequence[int] | Tensor) -> list[int]:
        if self.batch_size == 0:
            raise InputError(f"{verb}: the cache holds no rows (they were moved to another cache or decoder)")
        given = rows.tolist() if isinstance(rows, Tensor) else rows
        index = [as_whole(row) for row in given] if isinstance(given, Iterable) else []
        found = [row for row in index if row is not None and 0 <= row < self.batch_size]
        if not found or len(found) < len(index):
            numbers = f"numbers of rows, 0 … {self.batch_size - 1}"
            raise InputError(f"{verb} takes a list of {numbers}, and was given {shown(rows)}")
        return found

    def _check_kin(self, verb: str, others: Sequence[Cache]) -> None:
        for other in others:
            if other.pool is not self.pool:
                raise InputError(f"{verb} was given caches on different pools of pages: use caches of one pool")
            if other._owner is not self._owner and (
                other._owner is None or self._owner is None or other._owner() is not self._owner()
            ):
                raise InputError(f"{verb} was given a cache of another model: use caches of one model")
            if other.batch_size == 0:
                raise InputError(f"{verb} was given a cache without rows (they were moved elsewhere)")


def _check_room(row: int, length: int, pages: Sequence[int]) -> None:
    if length > PAGE * len(pages):
        raise CapacityError(
            f"row {row} has {len(pages)} pages of {PAGE} tokens and needs room for {length} tokens: give it "
            f"{pages_for(length)} pages"
        )


def _is_inference(state: Any) -> bool:
    return any(t.is_inference() for t in state.tensors())
