"""Checks all records of a file before work begins, and cuts them into shards."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from hyaena.errors import InputError, shown
from hyaena.records.readers import Record, Source, read_records

log = logging.getLogger(__name__)

MAX_NAME = 4_096
"""Most characters of a record's name: it may become the name of a member of an archive."""


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``I/N``.

        Raises:
            InputError: it is not a part of a whole.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        shard = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= shard.number <= shard.count:
            raise InputError(f"a shard is I/N with I from 1 to N, such as 1/8 … 8/8, not {shown(text)}")
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Part:
    """Records ``first`` to ``stop`` - 1 of a file, and the sum of their sizes."""

    first: int
    stop: int
    size: int


@dataclass(frozen=True)
class Contents:
    """What a file of records holds.

    Attributes:
        sizes: int64 [records], the size of each text, at least 1.
    """

    sizes: NDArray[np.int64]

    def part(self, shard: Shard) -> Part:
        """Return the records of a shard.

        Shards are runs of neighbouring records: record r belongs to shard ``1 + floor(N·before[r] / S)``, where S is
        the sum of all sizes and ``before[r]`` that of the records before it. So shards are about equally large, and
        their results, one after another, are those of the whole file. A shard may be empty.
        """
        ends = np.cumsum(self.sizes)
        starts = ends - self.sizes
        total = int(ends[-1])
        # The first record whose start is at or after the shard's share; in whole numbers of Python, which do not wrap.
        first, stop = (
            int(np.searchsorted(starts, -(-total * number // shard.count)))
            for number in (shard.number - 1, shard.number)
        )
        return Part(first, stop, int(self.sizes[first:stop].sum()))


def read_contents(source: Source, measure: Callable[[Record], int] = lambda record: len(record.text)) -> Contents:
    """Read a file from end to end and check every record; memory for two whole numbers per record is taken.

    Args:
        source: the file.
        measure: gives the size of a record, by which shards are cut, such as the number of its tokens; raises
            ``InputError`` for one that cannot be used.

    Raises:
        InputError: as ``read_records``; or two records have one name, or a text cannot be used. The message names the
            record and its place.
    """
    sizes, names, lowered = array("q"), array("q"), 0
    for record in read_records(source):
        sizes.append(_check(record, source, measure))
        names.append(hash(record.name))
        lowered += record.lowered
    _check_names(source, np.frombuffer(names, np.int64))
    if lowered:
        log.warning("%s: %s lower-case letters are read as upper case", source.label, f"{lowered:,}")
    return Contents(np.frombuffer(sizes, np.int64))


def read_part(source: Source, part: Part) -> Iterator[Record]:
    """Read the records of a part."""
    return islice(read_records(source), part.first, part.stop)


def _check(record: Record, source: Source, measure: Callable[[Record], int]) -> int:
    where = f"{source.label}, {record.place}, record {shown(record.name)}"
    if len(record.name) > MAX_NAME or "\0" in record.name:
        raise InputError(f"{where}: a name has at most {MAX_NAME:,} characters and no NUL; give it another")
    try:
        return measure(record)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_names(source: Source, hashes: NDArray[np.int64]) -> None:
    """Refuse a name that two records have; only if two hashes are equal, the file is read again to name them."""
    ordered = np.sort(hashes)
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: dict[str, str] = {}
    for record in read_records(source):
        if hash(record.name) in repeated:
            if record.name in seen:
                raise InputError(
                    f"{source.label}: two records are named {shown(record.name)}, {seen[record.name]} and "
                    f"{record.place}; rename one"
                )
            seen[record.name] = record.place
