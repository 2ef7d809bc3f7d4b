"""Runs the decoder one step ahead, so that the device never waits for the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hyaena.cache import Cache, StateSnapshot
from hyaena.decoding.decoder import Decoder
from hyaena.decoding.sampler import StepOutput
from hyaena.errors import InputError
from hyaena.sampling import SamplingParams

K = TypeVar("K", bound=Hashable)


class PipelinedDecoder(Generic[K]):
    """A decoder whose next step already runs while the outputs of one are looked at.

    Rows have keys, by which outputs name them. A row that leaves is one step late: what the device computed for it in
    between is dropped. Its place is freed when rows join, or when half of the rows have left; its pages immediately.

    Rows on pages need them one step earlier than their tokens are seen. Before every ``next``, whoever owns the pool
    gives each row of ``missing_pages`` what it lacks, with ``extend``, or removes the row.

    Args:
        decoder: whose rows are read; nobody else may launch or fetch.
        under_way: steps that have been launched when one is looked at: the one, and those that run meanwhile. Where a
            launch is the work itself, as in compiled decoding, 1 shows each token as soon as it is there.
    """

    def __init__(self, decoder: Decoder, *, under_way: int = 2) -> None:
        self.decoder = decoder
        self.under_way = under_way
        self.keys: list[K] = []  # of the decoder's rows, in order
        self.left: dict[K, int] = {}  # steps that a row still needs, of rows that have not left
        self.fetched: deque[tuple[list[K], StepOutput]] = deque()

    def add(
        self,
        keys: Sequence[K],
        steps: Sequence[int],
        cache: Cache,
        ids: Tensor,
        params: Sequence[SamplingParams],
        generators: Sequence[torch.Generator],
        *,
        seen: Tensor | None = None,
    ) -> None:
        """Add rows, see ``Decoder.add``; ``steps`` is the most that each needs.

        A row that left and joins again needs another key while outputs of its former life are to be read.
        """
        self.wait()
        self._compact()
        late = {key for former, _ in self.fetched for key in former} - {*self.keys}
        if late & {*keys}:
            raise InputError("a row joins under a key of which outputs are still to be read: give it a key of its own")
        if len({*self.keys, *keys}) != len(self.keys) + len(keys) or not len(keys) == len(steps) == cache.batch_size:
            raise InputError(f"give {cache.batch_size} rows as many steps and as many keys that no other row has")
        self.decoder.add(cache, ids, params, generators, seen=seen)
        self.keys += keys
        self.left |= dict(zip(keys, steps, strict=True))

    def next(self) -> tuple[list[K], StepOutput]:
        """The outputs of one more step, and the keys of its rows; rows that have left may be among them.

        Raises:
            CapacityError: a row lacks pages, see ``missing_pages``. No output is lost.
        """
        for _ in range(self._steps_ahead()):
            self._launch()
        return self.fetched.popleft() if self.fetched else self._fetch()

    def _steps_ahead(self) -> int:
        """How many steps ``next`` will launch, so that enough are under way while one is looked at."""
        missing = self.under_way - len(self.fetched) - len(self.decoder.pending)
        return min(max(0, missing), max(self.left.values(), default=0))

    def missing_pages(self) -> dict[K, int]:
        """How many pages each row lacks for the next call of ``next``; rows that lack none are left out."""
        steps = self._steps_ahead()
        lacking = {
            key: self.decoder.missing_pages(row, min(steps, self.left.get(key, 0))) for row, key in enumerate(self.keys)
        }
        return {key: count for key, count in lacking.items() if count}

    def extend(self, key: K, pages: Sequence[int]) -> None:
        """Add pages behind those of a row."""
        self.decoder.extend(self.keys.index(key), pages)

    def snapshot_states(self, key: K) -> StateSnapshot:
        """Copy the states of a row behind all launched steps, its pages excepted; see ``Cache.snapshot_states``."""
        return self.decoder.snapshot_states(self.keys.index(key))

    def remove(self, keys: Sequence[K]) -> None:
        """Drop rows."""
        for key in keys:
            del self.left[key]
            self.decoder.retire(self.keys.index(key))
        if self.left and 2 * len(self.left) <= len(self.keys):
            self.wait()
            self._compact()

    @property
    def top(self) -> int:
        """How many of the most probable tokens the next steps report."""
        return self.decoder.sampler.top

    @top.setter
    def top(self, value: int) -> None:
        self.decoder.sampler.top = value

    @property
    def lengths(self) -> dict[K, int]:
        """Tokens that the states of each row hold, those of launched steps included; without rows that have left."""
        lengths = zip(self.keys, self.decoder.lengths, strict=True)
        return {key: length for key, length in lengths if key in self.left}

    def wait(self) -> None:
        """Fetch what was launched: afterwards the device no longer works on this decoder's memory."""
        while self.decoder.pending:
            self.fetched.append(self._fetch())

    def _launch(self) -> None:
        for row, key in enumerate(self.keys):
            if not self.left.get(key) and row not in self.decoder.retired:
                self.decoder.retire(row)
        self.decoder.launch()
        self.left = {key: steps - 1 if steps else 0 for key, steps in self.left.items()}

    def _fetch(self) -> tuple[list[K], StepOutput]:
        return list(self.keys), self.decoder.fetch()

    def _compact(self) -> None:
        rows = [row for row, key in enumerate(self.keys) if key in self.left]
        if len(rows) < len(self.keys):
            self.decoder.keep(rows)
            self.keys = [self.keys[row] for row in rows]
