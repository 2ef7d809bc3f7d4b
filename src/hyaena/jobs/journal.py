"""A file to which rows are appended, and which is whole up to its last mark whenever the process is killed.

The file is a row of frames. A frame is a head (kind, lengths and a CRC-32 of what follows), a JSON object and the bytes
of the row's arrays. Rows are appended as they are finished, in any order. A mark then declares all rows since the last
mark kept, once it is on the disk. What follows the last sound mark is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, Any]
"""A row of results: column -> text, whole number, real number or NumPy array."""

_LENGTHS = struct.Struct("<4sIQ")
"""Kind, bytes of the JSON object, bytes of the arrays."""
_HEAD = struct.Struct("<4sIQI")
"""The same, and the checksum of all that the frame holds beside it."""
_ROW, _MARK = b"row\n", b"mark"
_BLOCK = 1 << 24


class _Head(NamedTuple):
    kind: bytes
    text: int
    arrays: int
    checksum: int
    end: int  # the position after the frame


class Mark(NamedTuple):
    """The end of a run of rows that are kept together.

    Attributes:
        rows: how many rows there are since the mark before.
        digest: what identifies their records.
    """

    rows: int
    digest: str


class Journal:
    """Rows on the disk.

    Args:
        path: the file; made if it is not there.

    Attributes:
        marks: those of the file, in order.

    Raises:
        OSError: of every method: the file cannot be read or written. What stands before the last mark is unharmed.
    """

    def __init__(self, path: Path) -> None:
        self.marks: list[Mark] = []
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed by close(); a buffer would outlive an error
        self._pending = 0  # rows since the last mark
        self._recover()

    def close(self) -> None:
        """Close the file; rows since the last mark are lost."""
        with suppress(OSError):  # what is marked is on the disk
            self._file.close()

    @property
    def rows(self) -> int:
        """Number of rows that are kept."""
        return sum(mark.rows for mark in self.marks)

    def append(self, index: int, row: Row) -> None:
        """Append a row; ``index`` gives its place among the rows before the next mark."""
        arrays = {name: np.ascontiguousarray(value) for name, value in row.items() if isinstance(value, np.ndarray)}
        values = {name: value for name, value in row.items() if name not in arrays}
        kinds = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
        self._write(_ROW, {"index": index, "values": values, "arrays": kinds}, [*arrays.values()])
        self._pending += 1

    def mark(self, digest: str) -> None:
        """Keep the rows since the last mark: they are on the disk when this returns."""
        mark = Mark(self._pending, digest)
        self._write(_MARK, mark._asdict(), [])
        os.fsync(self._file.fileno())
        self.marks.append(mark)
        self._pending = 0

    def read(self, columns: Collection[str] | None = None) -> Iterator[Row]:
        """Read the rows that are kept, run by run, each run in the order of its indices.

        Args:
            columns: those to read; all by default.
        """
        position = 0
        for mark in self.marks:
            run = []
            for _ in range(mark.rows):
                head = self._read_head(position)
                run.append((json.loads(self._exactly(head.text))["index"], position))
                position = head.end
            for _, offset in sorted(run):
                yield self._read_row(offset, columns)
            position = self._read_head(position).end

    def _write(self, kind: bytes, header: dict[str, Any], arrays: list[np.ndarray]) -> None:
        text = json.dumps(header).encode()
        payload = [array.reshape(-1).view(np.uint8).data for array in arrays if array.nbytes]
        lengths = _LENGTHS.pack(kind, len(text), sum(map(len, payload)))
        checksum = zlib.crc32(lengths)
        for data in (text, *payload):
            checksum = zlib.crc32(data, checksum)
        head = lengths + checksum.to_bytes(4, "little")
        for data in (memoryview(head + text), *payload):
            while data:
                data = data[self._file.write(data) :]

    def _read_head(self, position: int) -> _Head:
        self._file.seek(position)
        kind, text, arrays, checksum = _HEAD.unpack(self._exactly(_HEAD.size))
        return _Head(kind, text, arrays, checksum, position + _HEAD.size + text + arrays)

    def _read_row(self, position: int, columns: Collection[str] | None) -> Row:
        head = self._read_head(position)
        header = json.loads(self._exactly(head.text))
        row = {name: value for name, value in header["values"].items() if columns is None or name in columns}
        start = head.end - head.arrays
        for name, (code, shape) in header["arrays"].items():
            dtype = np.dtype(code)
            size = math.prod(shape) * dtype.itemsize
            if columns is None or name in columns:
                self._file.seek(start)
                row[name] = np.frombuffer(self._exactly(size), dtype).reshape(shape)
            start += size
        return row

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            read = self._file.readinto(view)
            if not read:
                raise OSError("a file of finished rows was cut short")
            view = view[read:]
        return data

    def _recover(self) -> None:
        """Find the last mark up to which every frame is whole, and cut off what follows it."""
        size = os.fstat(self._file.fileno()).st_size
        position = kept = rows = 0
        while position + _HEAD.size <= size:
            head = self._read_head(position)
            if head.kind not in (_ROW, _MARK) or head.end > size or not self._is_sound(head):
                break
            position = head.end
            if head.kind == _ROW:
                rows += 1
                continue
            self._file.seek(position - head.text)
            mark = Mark(**json.loads(self._exactly(head.text)))
            if mark.rows != rows:
                break
            self.marks.append(mark)
            rows, kept = 0, position
        self._file.truncate(kept)

    def _is_sound(self, head: _Head) -> bool:
        """Whether what follows a head, at the file's position, has its checksum."""
        found, rest = zlib.crc32(_LENGTHS.pack(*head[:3])), head.text + head.arrays
        while rest:
            data = self._exactly(min(_BLOCK, rest))
            found, rest = zlib.crc32(data, found), rest - len(data)
        return found == head.checksum
