"""Collects vectors of places while a model reads, pooled chunk by chunk, so that memory stays flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hyaena.arguments import as_whole
from hyaena.errors import InputError, shown
from hyaena.scoring.reader import Span
from hyaena.scoring.records import NonFiniteRecordError, Record, RecordError
from hyaena.tokenizers.base import as_list

Pool = Literal["mean", "last", "none"]
POOLS = ("mean", "last", "none")


def parse_pool(pool: Pool | Sequence[int]) -> str | tuple[int, ...]:
    """A name of ``POOLS``, or positions as a tuple.

    Raises:
        InputError: anything else.
    """
    problem = "pool must be mean, last, none or a list of positions, not "
    if isinstance(pool, str):
        if pool not in POOLS:
            raise InputError(problem + shown(pool))
        return pool
    positions = [as_whole(position) for position in as_list(pool, problem)]
    if not positions or None in positions:
        raise InputError(problem + shown(pool))
    return tuple(position for position in positions if position is not None)


class Collector:
    """Observes places, and keeps of each record what the pooling needs.

    Positions are those of the text: BOS in front of it is not pooled.

    Args:
        names: of the places.
        pool: of ``parse_pool``.
        remedy: what helps against vectors that are not finite, in words.
    """

    def __init__(self, names: Sequence[str], pool: str | tuple[int, ...], remedy: str) -> None:
        self.names = names
        self.pool = pool
        self.remedy = remedy
        self._kept: dict[tuple[Record, str], Tensor] = {}

    def positions(self, record: Record) -> list[int]:
        """The positions to take, from 0, of this strand.

        Raises:
            RecordError: the text is too short for one of them.
        """
        length, found = len(record.tokens), []
        for position in self.pool:
            if not isinstance(position, int) or not -length <= position < length:
                raise RecordError(record.index, f"position {position} is outside its {length:,} tokens")
            place = position % length
            found.append(length - 1 - place if record.reverse else place)
        return found

    def observe(self, name: str, x: Tensor, spans: Sequence[Span]) -> None:
        """Take x [1,t,…], what the place holds at the tokens of ``spans``."""
        for span in spans:
            record, skip = span.record, max(0, span.record.context - span.start)
            start = span.start + skip - record.context  # the position in the text of the first row that is taken
            rows = x[0, span.rows.start + skip : span.rows.stop]
            if len(rows):
                self._keep((record, name), rows, start)

    def _keep(self, key: tuple[Record, str], rows: Tensor, start: int) -> None:
        record, length = key[0], len(key[0].tokens)
        if self.pool == "mean":
            total = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
            self._kept[key] = self._kept[key].add_(total) if key in self._kept else total
        elif self.pool == "last":
            if start + len(rows) == length:
                self._kept[key] = rows[-1].float()
        elif self.pool == "none":
            if key not in self._kept:
                self._kept[key] = torch.empty(length, *rows.shape[1:], dtype=torch.float32, device="cpu")
            self._kept[key][start : start + len(rows)] = rows
        else:
            wanted = self.positions(record)
            if key not in self._kept:
                self._kept[key] = rows.new_zeros(len(wanted), *rows.shape[1:], dtype=torch.float32)
            for place, position in enumerate(wanted):
                if start <= position < start + len(rows):
                    self._kept[key][place] = rows[position - start]

    def take(self, record: Record) -> list[Tensor]:
        """The vectors of a record that was read, float32 on the host, in the order of the places.

        Raises:
            InputError: the model did not call one of the modules.
            NonFiniteRecordError: there is NaN or infinity among them.
        """
        vectors = []
        for name in self.names:
            if (record, name) not in self._kept:
                raise InputError(f"the model does not call {name}: take a module that it calls, such as its layer")
            x = self._kept.pop((record, name))
            x = (x / len(record.tokens) if self.pool == "mean" else x).float().cpu()
            if not bool(torch.isfinite(x).all()):
                raise NonFiniteRecordError(record.index, f"the vectors of {name} are not finite: {self.remedy}")
            vectors.append(x)
        return vectors


def mean_of_strands(one: Tensor, other: Tensor, pool: str | tuple[int, ...]) -> Tensor:
    """The mean of what the two strands of a text gave; without pooling, of each position and its complement."""
    return (one + (other.flip(0) if pool == "none" else other)) / 2
