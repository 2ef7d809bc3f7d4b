"""Writes rows of results as Parquet, JSON lines, tables of text, FASTA, bedGraph or an npz archive."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from hyaena import extras
from hyaena.errors import InputError, printable
from hyaena.files import write_atomically
from hyaena.jobs.journal import Row
from hyaena.records.fasta import FASTA_SUFFIXES

Kind = Literal["text", "integer", "real", "integers", "reals", "vector", "matrix"]


class Column(NamedTuple):
    """A column of results.

    Attributes:
        name: of the column.
        kind: ``text``, ``integer`` or ``real``; or an array, int64 [T] (``integers``) or float32 [T] (``reals``) with a
            length of its own in every row, float32 [D] (``vector``), or float32 [T,D] (``matrix``).
    """

    name: str
    kind: Kind


Rows = Callable[[Collection[str] | None], Iterator[Row]]
"""Reads all rows from the first, with these columns or with all."""

_GROUP_ROWS = 16_384
_GROUP_BYTES = 1 << 26
"""Most rows, and about the most bytes, of a row group in Parquet."""


def check_output(path: Path) -> None:
    """Check that the suffix of an output names a format, before anything is computed.

    Raises:
        InputError: it names none.
        UnsupportedError: it is Parquet, and pyarrow is not installed.
    """
    if path.suffix.lower() not in OUTPUT_FORMATS:
        raise InputError(
            f"the output {printable(str(path))} must end in one of {', '.join(OUTPUT_FORMATS)}, which says its format"
        )
    if path.suffix.lower() == ".parquet":
        extras.require("pyarrow", extra="parquet", purpose="writing Parquet")


def check_columns(path: Path, columns: Sequence[Column]) -> None:
    """Check that the format of an output has a place for all columns.

    Raises:
        InputError: it has not.
    """
    problem = OUTPUT_FORMATS[path.suffix.lower()].problem(columns)
    if problem is not None:
        raise InputError(f"the output {printable(str(path))}: {problem}")


def check_contig(path: Path, name: str) -> None:
    """Check that the format of an output has a place for the name of a contig.

    Raises:
        InputError: it has not.
    """
    if path.suffix.lower() == ".bedgraph" and any(map(str.isspace, name)):
        raise InputError("bedGraph has no place for white space in a name: rename it, or end the output in .parquet")


def write_results(path: Path, columns: Sequence[Column], rows: Rows) -> None:
    """Write all rows into one file, in the format of its suffix; equal rows give equal bytes.

    - ``.jsonl``, ``.ndjson``: an object per row; arrays are lists; NaN and infinities are null.
    - ``.parquet``: a column per column; arrays are lists.
    - ``.csv``, ``.tsv``: a line per row and a header; NaN and infinities are empty.
    - ``.bedgraph``: a line per number of the column of reals, with the place that ``contig``, ``start``, ``end`` and
      ``step`` give; NaN is left out.
    - ``.fa``, ``.fasta``, …: a record per row. The first column is its name, ``text`` its sequence, the others words of
      its header, ``seed=7``.
    - ``.npz``: an array per column, ``NAME`` [rows] or [rows,D]. Arrays whose length differs from row to row are
      members of their own, ``COLUMN/NAME`` with the row's name, which is its first column.

    Raises:
        OutputError: the file cannot be written; what stood at ``path`` is untouched.
    """
    write = OUTPUT_FORMATS[path.suffix.lower()].write
    write_atomically(path, lambda file: write(file, columns, rows))


def _write_json_lines(file: IO[bytes], columns: Sequence[Column], rows: Rows) -> None:
    for row in rows(None):
        values = {column.name: _jsonable(row[column.name]) for column in columns}
        file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f" or np.isfinite(value).all():
            return value.tolist()
        known = value.astype(object)
        known[~np.isfinite(value)] = None
        return known.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_parquet(file: IO[bytes], columns: Sequence[Column], rows: Rows) -> None:
    import pyarrow
    from pyarrow import parquet

    reals, integers = pyarrow.list_(pyarrow.float32()), pyarrow.list_(pyarrow.int64())
    types = {
        "text": pyarrow.string(),
        "integer": pyarrow.int64(),
        "real": pyarrow.float64(),
        "integers": integers,
        "reals": reals,
        "vector": reals,
        "matrix": pyarrow.large_list(pyarrow.large_list(pyarrow.float32())),
    }
    schema = pyarrow.schema([(column.name, types[column.kind]) for column in columns])
    texts = [column.name for column in columns if column.kind == "text"]  # a dictionary of real numbers is of no use
    with parquet.ParquetWriter(file, schema, use_dictionary=texts) as writer:  # pyright: ignore[reportArgumentType]
        for group in _groups(rows(None)):
            arrays = [
                _arrow([row[column.name] for row in group], type)
                for column, type in zip(columns, schema.types, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))
        if len(group) == _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _arrow(values: list[Any], type: Any) -> Any:
    """A list of values as an Arrow array; arrays are not taken apart into numbers of Python."""
    import pyarrow
    from pyarrow import types

    if types.is_large_list(type):
        lengths = [width for value in values for width in [value.shape[1]] * len(value)]
        items = _lists(lengths, [value.reshape(-1) for value in values], type.value_type)
        return pyarrow.LargeListArray.from_arrays(_offsets(map(len, values), pyarrow.int64()), items)
    if types.is_list(type):
        return _lists(map(len, values), values, type)
    return pyarrow.array(values, type)


def _lists(lengths: Iterable[int], values: list[np.ndarray], type: Any) -> Any:
    import pyarrow

    items = pyarrow.array(np.concatenate(values), type.value_type)
    if pyarrow.types.is_large_list(type):
        return pyarrow.LargeListArray.from_arrays(_offsets(lengths, pyarrow.int64()), items)
    return pyarrow.ListArray.from_arrays(_offsets(lengths, pyarrow.int32()), items)


def _offsets(lengths: Iterable[int], type: Any) -> Any:
    import pyarrow

    return pyarrow.array(np.cumsum([0, *lengths], dtype=np.int64), type)


_SCALARS = {"integer": np.int64, "real": np.float64}


def _write_npz(file: IO[bytes], columns: Sequence[Column], rows: Rows) -> None:
    name = columns[0].name
    with _archive(file) as archive:
        for column in columns:
            if column.kind in ("integers", "reals", "matrix"):
                for row in rows((name, column.name)):
                    _add(archive, f"{column.name}/{row[name]}", row[column.name])
            elif column.kind == "vector":
                _add_matrix(archive, column.name, rows)
            elif column.kind == "text":
                _add_texts(archive, column.name, rows)
            else:
                values = (row[column.name] for row in rows((column.name,)))
                _add(archive, column.name, np.fromiter(values, _SCALARS[column.kind]))


@contextmanager
def _archive(file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    """A new archive, which is closed unless it was broken off: zipfile would raise an error of its own, in place of the
    signal, where a member is open.
    """
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
    try:
        yield archive
        archive.close()
    except BaseException:
        archive.fp = None  # closed, to its eyes
        raise


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _add_texts(archive: zipfile.ZipFile, name: str, rows: Rows) -> None:
    """Add the texts of all rows as one array, in which each takes the room of the longest, a row at a time."""
    lengths = [len(row[name]) for row in rows((name,))]
    dtype = np.dtype(f"<U{max([1, *lengths])}")
    texts = (np.array(row[name], dtype) for row in rows((name,)))
    _add_rows(archive, name, dtype.str, (len(lengths),), texts)


def _add_matrix(archive: zipfile.ZipFile, name: str, rows: Rows) -> None:
    """Add the vectors of all rows as one array, without having them all in memory."""
    count = sum(1 for _ in rows(()))
    first = next(rows((name,)), None)
    shape = count, 0 if first is None else len(first[name])
    _add_rows(archive, name, "<f4", shape, (row[name] for row in rows((name,))))


def _add_rows(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], values: Iterable[np.ndarray]
) -> None:
    header = io.BytesIO()
    description = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        member.write(header.getvalue())
        for value in values:
            member.write(np.ascontiguousarray(value, dtype).tobytes())


def _write_table(file: IO[bytes], columns: Sequence[Column], rows: Rows, *, delimiter: str) -> None:
    names = [column.name for column in columns]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")

    def write(values: Iterable[Any]) -> None:
        writer.writerow(values)
        file.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()

    write(names)
    for row in rows(None):
        write(_jsonable(row[name]) for name in names)


def _scalars_only(columns: Sequence[Column]) -> str | None:
    arrays = [column.name for column in columns if column.kind not in ("text", "integer", "real")]
    if not arrays:
        return None
    return f"a table of text has no place for the column {arrays[0]}, which is a list: end it in .parquet or .jsonl"


_TRACK = ("contig", "start", "end", "step")


def _write_bedgraph(file: IO[bytes], columns: Sequence[Column], rows: Rows) -> None:
    values = next(column.name for column in columns if column.kind == "reals")
    for row in rows((*_TRACK, values)):
        contig, start, end, step = (row[name] for name in _TRACK)
        places = zip(range(start, end, step), row[values].tolist(), strict=True)
        lines = (f"{contig}\t{a}\t{min(a + step, end)}\t{x:.6g}\n" for a, x in places if math.isfinite(x))
        file.write("".join(lines).encode())


def _track_only(columns: Sequence[Column]) -> str | None:
    kinds = {column.name: column.kind for column in columns}
    if kinds.keys() >= set(_TRACK) and [*kinds.values()].count("reals") == 1:
        return None
    return "bedGraph has one number per position of a contig: it comes from `hyaena score --window`"


_WIDTH = 60
"""Letters of a line of FASTA."""


def _write_fasta(file: IO[bytes], columns: Sequence[Column], rows: Rows) -> None:
    name, *labels = (column.name for column in columns if column.name != "text")
    for row in rows(None):
        words = [f">{row[name]}", *(f"{label}={_word(row[label])}" for label in labels)]
        sequence = row["text"]
        lines = [" ".join(words), *(sequence[i : i + _WIDTH] for i in range(0, len(sequence), _WIDTH)), ""]
        file.write("\n".join(lines).encode())


def _word(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value), limit=100)


def _sequences_only(columns: Sequence[Column]) -> str | None:
    if Column("text", "text") in columns:
        return None
    return "FASTA holds sequences: it comes from `hyaena generate`; end it in .parquet or .jsonl"


class _Format(NamedTuple):
    """A format: its writer, and what says why it cannot hold some columns."""

    write: Callable[[IO[bytes], Sequence[Column], Rows], None]
    problem: Callable[[Sequence[Column]], str | None] = lambda columns: None


OUTPUT_FORMATS: dict[str, _Format] = {
    ".parquet": _Format(_write_parquet),
    ".jsonl": _Format(_write_json_lines),
    ".ndjson": _Format(_write_json_lines),
    ".csv": _Format(partial(_write_table, delimiter=","), _scalars_only),
    ".tsv": _Format(partial(_write_table, delimiter="\t"), _scalars_only),
    ".bedgraph": _Format(_write_bedgraph, _track_only),
    ".npz": _Format(_write_npz),
    **{suffix: _Format(_write_fasta, _sequences_only) for suffix in sorted(FASTA_SUFFIXES)},
}
"""Suffixes of outputs, and what writes each."""
