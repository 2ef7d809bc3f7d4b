"""A cache whose tables never move: the memory of decoding steps that are captured in CUDA graphs.

It has places for a fixed number of rows. Rows join with the storage of their keys and values as it is; only states of
constant size are copied. Places without a row use one slot of scratch storage, so that a graph of 16 rows serves 13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyaena.cache import Cache
from hyaena.errors import CapacityError, InputError
from hyaena.model import StripedHyena
from hyaena.ops import rotary_table


class StaticCache:
    """States of up to ``max_rows`` rows, the first ``len(lengths)`` of them in use.

    Attributes:
        states: one per layer, updated in place.
        lengths: tokens of each row in use, as the host counts them.
        limits: the most tokens of each row in use.
        device_lengths, device_limits: int32 [max_rows], the same on the device; 0 and 1 where there is no row.
        rotary: cos and sin of every position that a row may have.
    """

    def __init__(self, model: StripedHyena, max_rows: int) -> None:
        self.model = model
        self.max_rows = max_rows
        self.states: list[Any] = []  # made for the first rows that join
        self.scratch: list[Any] = []
        self.lengths: list[int] = []
        self.limits: list[int] = []
        self.device_lengths = torch.zeros(max_rows, dtype=torch.int32, device=model.device)
        self.device_limits = torch.ones(max_rows, dtype=torch.int32, device=model.device)
        self.rotary = self._rotary(1)

    def _rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        config, device = self.model.config, self.model.device
        steps = torch.arange(positions, device=device)
        theta, factor = config.rope_theta, config.rope_scaling_factor
        return rotary_table(steps, config.head_dim, theta, factor, dtype=self.model.dtype)

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
        if cache.max_length > self.positions:
            self.rotary = self._rotary(1 << (cache.max_length - 1).bit_length())
        if not self.states:
            self.states = [state.blank(self.max_rows) for state in cache.states]
            self.scratch = [state.blank(1) for state in cache.states]
        lengths, limits, start = list(cache.lengths), [limit or 0 for limit in cache.limits], self.rows
        try:
            for mine, theirs in zip(self.states, cache.states, strict=True):
                for i in range(len(lengths)):
                    mine.put(start + i, theirs, i)
        except InputError:
            self._vacate(start, start + len(lengths))
            raise
        cache.take()
        self.lengths += lengths
        self.limits += limits
        self._count(start)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, which are in rising order: they move to the front."""
        before = self.rows
        for state in self.states:
            for place, row in enumerate(rows):
                if place != row:
                    state.put(place, state, row)
        self._vacate(len(rows), before)
        self.lengths = [self.lengths[row] for row in rows]
        self.limits = [self.limits[row] for row in rows]
        self.device_lengths[len(rows) : before] = 0
        self.device_limits[len(rows) : before] = 1
        self._count(0)

    def _vacate(self, start: int, stop: int) -> None:
        """Let places use scratch storage, so that steps of larger buckets write nowhere else."""
        for state, scratch in zip(self.states, self.scratch, strict=True):
            for place in range(start, stop):
                state.put(place, scratch, 0)

    def _count(self, start: int) -> None:
        device = self.device_lengths.device
        self.device_lengths[start : self.rows] = torch.tensor(self.lengths[start:], dtype=torch.int32, device=device)
        self.device_limits[start : self.rows] = torch.tensor(self.limits[start:], dtype=torch.int32, device=device)

    def cache(self) -> Cache:
        """An ordinary cache of the rows in use, over the same storage: valid until the next step."""
        states = [state.first(self.rows) for state in self.states]
        return Cache(states, self.lengths, self.limits, owner=self.model)

    def mutated_tensors(self, places: int) -> list[Tensor]:
        """What a step over the first places changes, and would change again if it ran twice."""
        tensors = [t for state in self.states for t in state.first(places).mutated()]
        return [*tensors, self.device_lengths[:places]]
