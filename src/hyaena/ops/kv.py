"""Keys and values of one attention layer. Every row has a store of its own, filled from its first slot on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.slots import Slots, slots_of


class KVStore(NamedTuple):
    """Storage of rows that were allocated together: slots of keys and of values, each [b,G,capacity,width]."""

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


class Run(NamedTuple):
    """Neighbouring rows of one store that hold equally many tokens.

    Attributes:
        rows: their places in the batch.
        keys, values: [b,G,length,width], the slots that they hold, see ``ops.slots``.
    """

    rows: slice
    keys: Tensor
    values: Tensor

    def read(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b,G,length,head_dim], in the dtype of ``like``."""
        slots = slots_of(self.keys.dtype)
        return slots.decode(self.keys, like), slots.decode(self.values, like)

    def with_newest(self, keys: Tensor, values: Tensor) -> Run:
        """The run with its last tokens taken from keys and values [B,G,T,head_dim] of a pass, with their gradients."""
        past = self.keys.shape[2] - keys.shape[2]
        pairs = ((self.keys, keys[self.rows]), (self.values, values[self.rows]))
        return Run(self.rows, *(torch.cat([old[:, :, :past].to(new), new], dim=2) for old, new in pairs))


class KVState:
    """Keys and values [G,capacity,width] of every row of a batch; see ``hyaena.cache.State`` for the verbs.

    How many tokens a row holds is not kept here: all layers of a cache share those numbers. What a slot of ``width``
    numbers holds is said by the dtype, see ``ops.slots``.

    Attributes:
        rows: for each row its store and its place in that store.
    """

    table: None = None  # of pages

    def __init__(self, rows: list[tuple[KVStore, int]]) -> None:
        self.rows = rows
        self._pointers: tuple[Tensor, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "_pointers": None}  # the storage of a copy has other addresses

    @classmethod
    def allocate(
        cls, batch: int, groups: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVState:
        """Room for ``capacity`` tokens in each of ``batch`` rows."""
        shape = (batch, groups, capacity, slots_of(dtype).width(head_dim))
        with torch.inference_mode(False):  # storage that is made in inference mode could not be written outside of it
            return cls.over(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    @classmethod
    def over(cls, keys: Tensor, values: Tensor) -> KVState:
        """The state whose storage these are, keys and values [B,G,capacity,width]; new tokens are written there."""
        store = KVStore(keys, values)
        return cls([(store, i) for i in range(len(keys))])

    def keys(self, row: int) -> Tensor:
        store, i = self.rows[row]
        return store.keys[i]

    def values(self, row: int) -> Tensor:
        store, i = self.rows[row]
        return store.values[i]

    @property
    def store(self) -> KVStore:
        """The storage of all rows, where they were allocated together.

        Raises:
            InputError: they were not.
        """
        store = self.rows[0][0]
        if any(other is not store or place != row for row, (other, place) in enumerate(self.rows)):
            raise InputError("the rows have storage of their own: copy them together (select)")
        return store

    @property
    def capacities(self) -> list[int]:
        return [store.capacity for store, _ in self.rows]

    @property
    def longest(self) -> int:
        """The most tokens that a row has room for."""
        return max(self.capacities)

    @property
    def groups(self) -> int:
        return self.rows[0][0].keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.slots.head_dim(self.rows[0][0].keys.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        return self.rows[0][0].keys.dtype

    @property
    def slots(self) -> Slots:
        return slots_of(self.dtype)

    def through(self, table: object) -> KVState:
        """The rows of a pass: these, whose storage is their own. Rows on pages are read through the table."""
        return self

    def write(self, keys: Tensor, values: Tensor, lengths: Sequence[int], padding: Sequence[int] | None = None) -> None:
        """Store new tokens behind those that the rows hold, without their autograd history.

        Args:
            keys, values: [B,G,T,head_dim].
            lengths: tokens that each row holds.
            padding: leading positions of each row of the new tokens that are padding and are not stored.
        """
        count = keys.shape[2]
        keys, values = (self.slots.encode(t.detach()) for t in (keys, values))
        if padding is None:
            for run in self.runs(lengths, extra=count):
                run.keys[:, :, -count:] = keys[run.rows]
                run.values[:, :, -count:] = values[run.rows]
            return
        for row, (length, skip) in enumerate(zip(lengths, padding, strict=True)):
            self.keys(row)[:, length : length + count - skip] = keys[row, :, skip:]
            self.values(row)[:, length : length + count - skip] = values[row, :, skip:]

    def write_packed(self, keys: Tensor, values: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Store new tokens [1,G,T,head_dim], ``counts`` of each row, one row after another; see ``write``."""
        pieces = (self.slots.encode(t.detach()).split(list(counts), 2) for t in (keys, values))
        for row, (k, v) in enumerate(zip(*pieces, strict=True)):
            here = slice(lengths[row], lengths[row] + counts[row])
            self.keys(row)[:, here], self.values(row)[:, here] = k[0], v[0]

    def row(self, row: int, length: int) -> Run:
        """A row that holds so many tokens, as a batch of one."""
        return Run(slice(0, 1), self.keys(row)[None, :, :length], self.values(row)[None, :, :length])

    def runs(self, lengths: Sequence[int], extra: int = 0) -> Iterator[Run]:
        """The rows in order, as few runs as there are; ``extra`` more slots than ``lengths`` names are shown."""
        start = 0
        for row in range(1, len(self.rows) + 1):
            store, first = self.rows[start]
            if row < len(self.rows) and lengths[row] == lengths[start]:
                other, place = self.rows[row]
                if other is store and place == first + row - start:
                    continue
            here, stop = slice(first, first + row - start), lengths[start] + extra
            yield Run(slice(start, row), store.keys[here, :, :stop], store.values[here, :, :stop])
            start = row

    # --- the verbs of a state ------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        stores = {id(store): store for store, _ in self.rows}
        return [t for store in stores.values() for t in store]

    def select(self, rows: Sequence[int], room: int | None = None) -> KVState:
        """Copy the given rows, in that order, into storage of their own, as large or with ``room`` slots."""
        return self._copy(rows, self.capacities if room is None else [room] * len(self.rows))

    def keep(self, rows: Sequence[int]) -> KVState:
        """Drop all rows but these. Storage of which at most half is still used is copied, so that it can be freed."""
        kept = KVState([self.rows[row] for row in rows])
        used: dict[int, int] = {}
        for store, _ in kept.rows:
            used[id(store)] = used.get(id(store), 0) + 1
        if any(2 * used[id(store)] <= store.keys.shape[0] for store, _ in kept.rows):
            return kept._copy(range(len(kept.rows)), kept.capacities)
        return kept

    def join(self, others: Sequence[KVState]) -> KVState:
        """Append the rows of other states. The storage is shared: the others must not be used afterwards."""
        self._check_kind(others)
        return KVState(self.rows + [row for other in others for row in other.rows])

    def reset(self) -> KVState:
        """Nothing to do: slots behind a row's length are never read."""
        return self

    def mark(self) -> None:
        """Nothing: slots that later tokens fill lie behind those of this moment."""

    def rewind(self, mark: KVState | None) -> KVState:
        """Nothing to do: slots behind a row's length are never read."""
        return self

    def reserve(self, lengths: Sequence[int]) -> KVState:
        """Make room for so many tokens in each row: copies into storage of twice the size where a row is full."""
        if all(need <= capacity for need, capacity in zip(lengths, self.capacities, strict=True)):
            return self
        capacities = [
            capacity if need <= capacity else max(need, 2 * capacity)
            for need, capacity in zip(lengths, self.capacities, strict=True)
        ]
        return self._copy(range(len(self.rows)), capacities)

    def first(self, count: int) -> KVState:
        """The first rows, over the same storage."""
        state = KVState(self.rows[:count])
        if self._pointers is not None:
            keys, values, capacities = self._pointers
            state._pointers = keys[:count], values[:count], capacities[:count]
        return state

    def blank(self, rows: int) -> KVState:
        """An empty state of this kind, with room for one token in each of so many rows, and with its tables made."""
        state = KVState.allocate(rows, self.groups, 1, self.head_dim, self.dtype, self.keys(0).device)
        state.pointers()  # before rows are captured: a graph can make none
        return state

    def put(self, row: int, source: KVState, source_row: int) -> None:
        """Replace a row's storage by that of a row of another state, which must not be used afterwards."""
        self._check_kind([source])
        self.rows[row] = source.rows[source_row]
        if self._pointers is not None:
            new = self._table([row])
            for old, now in zip(self._pointers, new, strict=True):
                old[row : row + 1].copy_(now)

    def mutated(self) -> list[Tensor]:
        """Nothing: a step that runs twice writes the same numbers to the same slot."""
        return []

    def detach(self) -> KVState:
        """Nothing to do: what is stored has no history."""
        return self

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """What kernels read: addresses of every row's keys and values, int64 [B], and capacities, int32 [B].

        The tables never move, so that a captured graph sees the rows of the moment.
        """
        if self._pointers is None:
            self._pointers = self._table(range(len(self.rows)))
        return self._pointers

    def _check_kind(self, others: Sequence[KVState]) -> None:
        mine = self.rows[0][0].keys
        for store, _ in (row for other in others for row in other.rows):
            theirs = store.keys
            if (theirs.shape[1], theirs.shape[3], theirs.dtype) != (mine.shape[1], mine.shape[3], mine.dtype):
                raise InputError(
                    "keys and values of different sizes or dtypes cannot be joined: make the caches with one dtype"
                )

    def _table(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        device = self.rows[0][0].keys.device
        keys = torch.tensor([self.keys(row).data_ptr() for row in rows], dtype=torch.int64, device=device)
        values = torch.tensor([self.values(row).data_ptr() for row in rows], dtype=torch.int64, device=device)
        capacities = torch.tensor([self.keys(row).shape[1] for row in rows], dtype=torch.int32, device=device)
        return keys, values, capacities

    def _copy(self, rows: Sequence[int], capacities: Sequence[int]) -> KVState:
        """Copies of rows; neighbours of equal capacity share an allocation, so that runs stay long."""
        new: list[tuple[KVStore, int]] = []
        rows = list(rows)
        start = 0
        for end in range(1, len(rows) + 1):
            if end < len(rows) and capacities[rows[end]] == capacities[rows[start]]:
                continue
            room, device = capacities[rows[start]], self.keys(rows[start]).device
            part = KVState.allocate(end - start, self.groups, room, self.head_dim, self.dtype, device)
            for place, row in enumerate(rows[start:end]):
                held = min(self.keys(row).shape[1], capacities[row])
                part.keys(place)[:, :held] = self.keys(row)[:, :held]
                part.values(place)[:, :held] = self.values(row)[:, :held]
            new += part.rows
            start = end
        return KVState(new)
