"""Files that were cut into parts, ``NAME.part0``, ``NAME.part1``, …, read as one file without joining them on disk."""

from __future__ import annotations

import bisect
import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from hyaena.errors import CheckpointError

_PART = re.compile(r"(?P<whole>.+)\.part(?P<number>\d+)")


def whole_name(name: str) -> str:
    """The name of the file that a part belongs to; other names unchanged."""
    part = _PART.fullmatch(name)
    return name if part is None else part["whole"]


def parts_of(path: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """The parts of a file, in order; none where it is whole.

    Args:
        path: of the whole file, or of one of its parts.
        names: of the files in its folder.

    Raises:
        CheckpointError: one before the last that is there is missing.
    """
    whole = whole_name(path.name)
    found = {int(part["number"]): name for name in names if (part := _PART.fullmatch(name)) and part["whole"] == whole}
    if not found:
        return ()
    for number in range(max(found)):
        if number not in found:
            raise CheckpointError(
                f"{path.with_name(whole)}: part {number} of it is missing ({whole}.part{number}): download it"
            )
    return tuple(path.with_name(found[number]) for number in range(len(found)))


def grouped(files: Sequence[Path]) -> list[list[Path]]:
    """Weights files, with the parts of a file together."""
    return [list(group) for _, group in itertools.groupby(files, lambda path: path.with_name(whole_name(path.name)))]


class JoinedFile(io.RawIOBase):
    """Open files, one after another, as one that can be read and searched.

    Args:
        files: open for reading in binary; closed with this one.
    """

    def __init__(self, files: Sequence[IO[bytes]]) -> None:
        self._files = files
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        self._ends = list(itertools.accumulate(sizes))
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._ends[-1]}[whence]
        if start + offset < 0:
            raise ValueError("a place before the beginning of a file")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of a part."""
        index = bisect.bisect_right(self._ends, self._place)
        if index == len(self._files):
            return 0
        file, end = self._files[index], self._ends[index]
        file.seek(self._place - (self._ends[index - 1] if index else 0))
        count = file.readinto(memoryview(buffer).cast("B")[: end - self._place])  # type: ignore[attr-defined]
        self._place += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
