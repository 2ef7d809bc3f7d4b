"""Checks the index of a FASTA file against the file.

An index of another file, or of an earlier one, gives letters of another place without an error, and one substitution in
four fits those by chance. So where a contig begins and ends by the index, its header and the next one must stand.
And samtools leaves a contig out of an index if another one has its name: so no other header may stand between two.

Source: faidx(5) of samtools for ``.fai``, bgzip(1) of htslib for ``.gzi``.
"""

from __future__ import annotations

import gzip
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

_AROUND = 1 << 12
"""Bytes that are read before and behind a contig; what a longer header names is not checked."""


_MOST_GAPS = 20_000
"""Contigs with a description before which headers are looked for: each takes up to a millisecond, with bgzip."""


class _Entry(NamedTuple):
    """Letters of a contig, the byte where they begin, and letters and bytes of a line."""

    length: int
    offset: int
    letters: int
    width: int

    @property
    def end(self) -> int:
        """The byte behind the last letter."""
        whole, rest = divmod(max(self.length - 1, 0), max(self.letters, 1))
        return self.offset + (whole * self.width + rest + 1 if self.length else 0)


class FastaIndex:
    """The index of a FASTA file.

    Args:
        fasta: the file.
        index: its ``.fai``.
        blocks: its ``.gzi``, where bgzip compressed it.

    Raises:
        OSError, ValueError: an index cannot be read.
    """

    def __init__(self, fasta: Path, index: Path, blocks: Path | None) -> None:
        self._fasta = fasta
        self._entries: dict[str, _Entry] = {}
        for line in filter(None, index.read_text("utf-8").split("\n")):
            name, *numbers = line.split("\t")
            if len(numbers) < 4:
                raise ValueError("a line has fewer than five columns")
            self._entries.setdefault(name, _Entry(*map(int, numbers[:4])))
        self._blocks = None if blocks is None else _read_blocks(blocks)

    def fits(self, contig: str) -> bool:
        """Whether a contig begins behind its header, and ends before the next one or at the end of the file.

        Raises:
            OSError, EOFError: the file cannot be read.
        """
        length, offset, letters, width = self._entries[contig]
        if length == 0:
            return True
        if min(length, offset, letters, width - letters) <= 0:
            return False
        last = self._entries[contig].end - 1
        first = max(0, offset - _AROUND)
        before, behind = self._read(first, offset - first), self._read(last, _AROUND)
        line, rest = before[:-1].rpartition(b"\n")[2], behind[1:].lstrip()
        header = line.startswith(b">") and line[1:].split(maxsplit=1)[:1] == [contig.encode()]
        return (
            before.endswith(b"\n")
            and (header or len(line) + 1 == _AROUND)
            and behind[:1].isalpha()
            and (len(behind) == 1 or behind[1:2].isspace())
            and (not rest or rest.startswith(b">"))
        )

    def leaves_out(self) -> str | None:
        """The name of a contig that stands between two others, or at an end of the file, and not in the index.

        Raises:
            OSError, EOFError: the file cannot be read.
        """
        entries = sorted(self._entries.items(), key=lambda item: item[1].offset)
        shortest = min((len(name.encode()) for name in self._entries), default=0)
        start, read = 0, 0
        for name, entry in entries:
            gap = entry.offset - start
            # The header of the contig, and another one with its ends of lines.
            if gap >= len(name.encode()) + shortest + 4 and read < _MOST_GAPS:
                read += 1
                headers = _headers(self._read(start, min(gap, _AROUND)))
                if headers and (len(headers) > 1 or headers[0] != name):
                    return headers[0] if headers[0] != name else headers[1]
            start = entry.end
        return next(iter(_headers(self._read(start, _AROUND))), None)

    def _read(self, start: int, count: int) -> bytes:
        """Bytes of the file, decompressed."""
        if self._blocks is None:
            with open(self._fasta, "rb") as file:
                file.seek(start)
                return file.read(count)
        compressed, decompressed = self._blocks
        block = bisect_right(decompressed, start) - 1
        with open(self._fasta, "rb") as file:
            file.seek(compressed[block])
            with gzip.GzipFile(fileobj=file) as blocks:
                blocks.read(start - decompressed[block])
                return blocks.read(count)


def _headers(data: bytes) -> list[str]:
    """The names in the lines of headers."""
    lines = [line for line in data.split(b"\n") if line.startswith(b">")]
    return [b"".join(line[1:].split(maxsplit=1)[:1]).decode(errors="replace") for line in lines]


def _read_blocks(path: Path) -> tuple[array[int], array[int]]:
    """Where blocks begin in the file, and in what is decompressed."""
    numbers = array("Q", path.read_bytes())
    if len(numbers) != 1 + 2 * numbers[0]:
        raise ValueError("not an index of bgzip")
    return array("Q", [0, *numbers[1::2]]), array("Q", [0, *numbers[2::2]])
