"""A cache whose tables never move: the memory of decoding steps that are captured in CUDA graphs.

It has places for a fixed number of rows. Rows join with the storage of their keys and values as it is; only states of
constant size are copied. Places without a row use one slot of scratch storage, so that a graph of 16 rows serves 13.

Where keys and values are on pages, a table on the device says which pages each place has. It changes in the order in
which steps are launched: a step sees the pages that its rows had at its launch, and the pages of a row that has left
may be given to others immediately, as long as what they write is launched later, on the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyaena.cache import Cache
from hyaena.decoding.sampler import move_rows, upload
from hyaena.errors import CapacityError, InputError
from hyaena.model import StripedHyena
from hyaena.ops import PAGE, PagePool, RowTensors, pages_for
from hyaena.ops.state import copy_all
from hyaena.tensor_files.memory import Shelf


class StaticCache:
    """States of up to ``max_rows`` rows, the first ``len(lengths)`` of them in use.

    Attributes:
        states: one per layer, updated in place.
        lengths: tokens of each row in use, as the host counts them.
        limits: the most tokens of each row in use.
        rooms: the most tokens that each row may hold now: its limit, or what its pages reach.
        device_lengths, device_limits: int32 [max_rows], the same on the device; 0 and 1 where there is no row.
        rotary: cos and sin of every position that a row may have.
        pool: of the pages of all rows; None where rows have storage of their own.
        pages: of each row in use, as the host counts them.
        device_pages: int32 [max_rows,W], the same on the device, wide enough for every position; None without a pool.
    """

    def __init__(self, model: StripedHyena, max_rows: int) -> None:
        self.model = model
        self.max_rows = max_rows
        self.states: list[Any] = []  # made for the first rows that join
        self.scratch: list[Any] = []
        self.lengths: list[int] = []
        self.limits: list[int] = []
        self.rooms: list[int] = []
        self.device_lengths = torch.zeros(max_rows, dtype=torch.int32, device=model.device)
        self.device_limits = torch.ones(max_rows, dtype=torch.int32, device=model.device)
        self.rotary = self._rotary(1)
        self.pool: PagePool | None = None
        self.pages: list[list[int]] = []
        self.device_pages: Tensor | None = None
        self._changes: dict[tuple[int, int], int] = {}  # (row, place in it) -> page, unknown to the device

    def _rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        return self.model.rotary(torch.arange(positions, device=self.model.device), self.model.dtype)

    def renew_rotary(self) -> None:
        """Make the table again, for a model that was changed."""
        self.rotary = self._rotary(self.positions)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def positions(self) -> int:
        """Positions that the rotary table covers: a power of two."""
        return self.rotary[0].shape[0]

    def add(self, cache: Cache) -> None:
        """Move all rows of a cache behind those that are here; the cache is empty afterwards.

        Raises:
            InputError: a row may grow without limit, or the cache is of another model or kind. It keeps its rows.
            CapacityError: there are not so many places.
        """
        cache.check_owner(self.model)
        if cache.max_length is None:
            raise InputError("static decoding needs a cache of fixed size: make it with max_length")
        if self.rows + cache.batch_size > self.max_rows:
            raise CapacityError(f"the decoder has {self.max_rows} places, and {self.rows} + {cache.batch_size} rows")
        if not self.states:
            shelf, blank = Shelf(), [state.blank(self.max_rows) for state in cache.states]
            self.states = [state.settled(shelf) if isinstance(state, RowTensors) else state for state in blank]
            self.scratch = [state.blank(1) for state in cache.states]
            self.pool = cache.pool
        if cache.pool is not self.pool:
            raise InputError(
                "rows of one decoder must be on pages of one pool, or all on none: make their caches alike"
            )
        lengths, limits, start = list(cache.lengths), [limit or 0 for limit in cache.limits], self.rows
        try:
            pairs = []
            for mine, theirs in zip(self.states, cache.states, strict=True):
                if isinstance(mine, RowTensors):
                    pairs += mine.pairs(start, theirs)
                else:
                    for i in range(len(lengths)):
                        mine.put(start + i, theirs, i)
            copy_all(pairs)
            self._cover(cache.max_length)  # last: steps that were recorded read the tables that it replaces
        except Exception:
            self._vacate(start, start + len(lengths))
            raise
        pages = cache.pages
        cache.take()
        self.lengths += lengths
        self.limits += limits
        self.rooms += limits
        self._count(start)
        self.pages += [[] for _ in lengths]
        for i, numbers in enumerate(pages):
            self.extend(start + i, numbers)

    def _cover(self, length: int) -> None:
        """Make tables for rows of so many tokens, where those that are here are shorter."""
        if length > self.positions:
            self.rotary = self._rotary(1 << (length - 1).bit_length())
        width = pages_for(self.positions)
        if self.pool is not None and (self.device_pages is None or self.device_pages.shape[1] < width):
            shape = self.max_rows, width
            self.device_pages = torch.full(shape, self.pool.scratch, dtype=torch.int32, device=self.pool.device)
            self._changes = {}
            for row, numbers in enumerate(self.pages):
                self._change(row, 0, numbers)

    def extend(self, row: int, pages: Sequence[int]) -> None:
        """Add pages behind those of a row; steps that are launched from now on know them."""
        self._change(row, len(self.pages[row]), pages)
        self.pages[row] += pages
        if self.pool is not None:
            self.rooms[row] = min(self.limits[row], PAGE * len(self.pages[row]))

    def retire(self, row: int) -> None:
        """Let steps that are launched from now on write nothing of a row to pages, which others may have by then."""
        if self.pool is not None:
            self.pages[row] = []
            self.lengths[row] = self.limits[row] = 1
            self.extend(row, [self.pool.scratch])
            self.device_lengths[row] = self.device_limits[row] = 1

    def _change(self, row: int, first: int, pages: Sequence[int]) -> None:
        assert self.device_pages is not None or not pages
        width = 0 if self.device_pages is None else self.device_pages.shape[1]  # pages behind it have no positions
        self._changes |= {(row, place): page for place, page in enumerate(pages, first) if place < width}

    @property
    def uploaded(self) -> bool:
        """Whether the table on the device is up to date."""
        return not self._changes

    def upload_pages(self) -> None:
        """Bring the table on the device up to date, without waiting for the device."""
        if self._changes and self.device_pages is not None:
            changes = torch.tensor([(*place, page) for place, page in self._changes.items()], device="cpu")
            rows, places, pages = upload(changes, self.device_pages.device).unbind(1)
            self.device_pages[rows, places] = pages.int()
            self._changes = {}

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, which are in rising order: they move to the front."""
        before = self.rows
        if self.device_pages is not None:
            self.upload_pages()
            move_rows(self.device_pages, rows)
        if rows != list(range(len(rows))):
            index = upload(torch.tensor(rows, device="cpu"), self.device_lengths.device)
            tensors = []
            for state in self.states:
                if isinstance(state, RowTensors):
                    tensors += state.tensors()
                else:
                    for place, row in enumerate(rows):
                        if place != row:
                            state.put(place, state, row)
            copy_all([(t[: len(rows)], t.index_select(0, index)) for t in tensors])
        self._vacate(len(rows), before)
        self.lengths = [self.lengths[row] for row in rows]
        self.limits = [self.limits[row] for row in rows]
        self.rooms = [self.rooms[row] for row in rows]
        self.pages = [self.pages[row] for row in rows]
        self.device_lengths[len(rows) : before] = 0
        self.device_limits[len(rows) : before] = 1
        self._count(0)

    def _vacate(self, start: int, stop: int) -> None:
        """Let places use scratch storage, so that steps of larger buckets write nowhere else."""
        for state, scratch in zip(self.states, self.scratch, strict=True):
            if isinstance(state, RowTensors):
                for tensor in state.tensors():
                    tensor[start:stop] = 0
            else:
                for place in range(start, stop):
                    state.put(place, scratch, 0)
        if self.device_pages is not None and self.pool is not None:
            self.device_pages[start:stop, 0] = self.pool.scratch

    def _count(self, start: int) -> None:
        counts = torch.tensor([self.lengths[start:], self.limits[start:]], dtype=torch.int32, device="cpu")
        counts = upload(counts, self.device_lengths.device)
        self.device_lengths[start : self.rows], self.device_limits[start : self.rows] = counts[0], counts[1]

    def cache(self) -> Cache:
        """An ordinary cache of the rows in use, over the same storage: valid until the next step."""
        states = [state.first(self.rows) for state in self.states]
        return Cache(states, self.lengths, self.limits, owner=self.model, pool=self.pool, pages=self.pages)

    def mutated_tensors(self, places: int) -> list[Tensor]:
        """What a step over the first places changes, and would change again if it ran twice."""
        tensors = [t for state in self.states for t in state.first(places).mutated()]
        return [*tensors, self.device_lengths[:places]]
