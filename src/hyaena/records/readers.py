"""Reads records, texts with names, from files of several formats; one record, or window, at a time is in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

from hyaena import extras
from hyaena.errors import InputError, printable, shown
from hyaena.records.fasta import FASTA_SUFFIXES, read_fasta
from hyaena.records.json_lines import JsonObject, not_utf8, read_json_lines
from hyaena.records.source import BYTE_ORDER_MARK, GZIP, open_source, split_name

_CURE = "check its name and permissions"
_ROWS = 64
"""Rows of a Parquet file that are in memory at a time."""


class Record(NamedTuple):
    """A text with a name.

    Attributes:
        index: its position in the file, from 0.
        name: the first word of a FASTA or FASTQ header, or the value of the name's key or column; where there is none,
            the record's number, from 1.
        text: at least one character.
        place: where it begins, for messages: ``line 7``.
        lowered: letters of a FASTA or FASTQ sequence that are lower case in the file. ``text`` has them in upper case.
        contig, start: of a window, the record that it is cut from, and its own first letter there, from 0.
        before, after: of a window, how many letters of ``text`` at both ends are its neighbours' own.
    """

    index: int
    name: str
    text: str
    place: str
    lowered: int = 0
    contig: str = ""
    start: int = 0
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Source:
    """A file of records and how it is read.

    Attributes:
        path: the file.
        format: one of ``FORMATS``.
        label: what messages call the file.
        text_key: the key or column of the text, in JSON lines and Parquet.
        name_key: the key or column of the name; None takes ``name``, else ``id``, where there is one.
        window: letters of the windows that records are cut into; None for whole records.
        overlap: how many of them belong to the window before.
    """

    path: Path
    format: str
    label: str
    text_key: str = "text"
    name_key: str | None = None
    window: int | None = None
    overlap: int = 0


def find_source(
    path: str | Path,
    *,
    format: str | None = None,
    text_key: str | None = None,
    name_key: str | None = None,
    label: str | None = None,
    window: int | None = None,
    overlap: int = 0,
) -> Source:
    """Decide how a file is read: as ``format``, or as the end of its name says.

    Args:
        path: the file. ``.gz`` or ``.bgz`` may follow the suffix of its format.
        format: one of ``FORMATS``; by default the one that has the suffix.
        text_key: the key (JSON lines) or column (Parquet) of the text, ``text`` by default.
        name_key: that of the name; by default ``name``, or else ``id``.
        label: what messages call the file; by default its path.
        window, overlap: letters of the windows that records are cut into, and how many belong to the window before.

    Raises:
        InputError: the name says no format, or keys are given for a format without keys.
        UnsupportedError: the file is Parquet, and pyarrow is not installed.
    """
    path = Path(path)
    label = printable(str(path)) if label is None else label
    if os.path.isdir(path):
        raise InputError(f"{label} is a folder: name a file of records")
    if format is None:
        suffix = split_name(path)[0]
        format = next((name for name, found in FORMATS.items() if suffix in found.suffixes), None)
        if format is None:
            raise InputError(
                f"the name of {label} does not tell its format: end it in .fa, .fastq, .jsonl, .parquet or .txt, or "
                f"add --format {'|'.join(FORMATS)}"
            )
    elif format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, not {shown(format)}")
    if format not in ("jsonl", "parquet") and (text_key, name_key) != (None, None):
        raise InputError(f"{label} is read as {format}, which has no keys: leave --text-key and --name-key out")
    if format == "parquet":
        extras.require("pyarrow", extra="parquet", purpose="reading Parquet")
    return Source(path, format, label, "text" if text_key is None else text_key, name_key, window, overlap)


def check_readable(source: Source) -> None:
    """Check that a file is there and can be opened, without reading it.

    Raises:
        InputError: it is not there, is a folder, or cannot be opened.
    """
    if source.path.is_dir():
        raise InputError(f"{source.label} is a folder: name a file")
    with open_source(source.path, source.label, compressed=False, cure=_CURE):
        pass


class Piece(NamedTuple):
    """A run of a record's text.

    Attributes:
        text: the run; it may be empty.
        lowered: see ``Record``.
        name: of a record's first piece, the name; None where the format gives none.
        place: of a record's first piece, see ``Record``.
        begins: whether it is a record's first piece.
    """

    text: str
    lowered: int = 0
    name: str | None = None
    place: str = ""
    begins: bool = True


def read_records(source: Source) -> Iterator[Record]:
    """Read the records of a file in their order, or their windows, of which a contig of FASTA holds few in memory.

    Raises:
        InputError: the file is not what its format says, or a record is empty; the message names the place.
    """
    index = 0
    for record, pieces in _in_pieces(source):
        if source.window is None:
            yield _whole(record, pieces)
            continue
        for window in cut(record, pieces, source.window, source.overlap):
            yield window._replace(index=index)
            index += 1


def cut(record: Record, pieces: Iterable[Piece], window: int, overlap: int) -> Iterator[Record]:
    """Cut a record into windows: every letter is one window's own, and stands behind ``overlap`` letters of context.

    The letters of window i are ``i·step`` to ``(i+1)·step - 1``, where ``step = window - overlap``; ``overlap`` letters
    on both sides are with them, fewer at the ends of the record: the other strand has its context behind. The name is
    ``NAME:START-END``, from 0, END exclusive.

    Args:
        record: without its text.
        pieces: its text; those that no further window needs are dropped.
        window, overlap: letters.
    """
    step = window - overlap
    text, first, start, lowered = "", 0, 0, 0  # ``text`` begins at letter ``first`` of the record
    for piece in chain(pieces, [None]):
        if piece is not None:
            text += piece.text
            lowered += piece.lowered
        length = first + len(text)
        while start < length and (piece is None or start + window <= length):
            end = min(start + step, length)
            before = min(start, overlap)
            around = text[start - before - first : end + overlap - first]
            yield record._replace(
                name=f"{record.name}:{start}-{end}",
                text=around,
                lowered=lowered,
                contig=record.name,
                start=start,
                before=before,
                after=len(around) - before - (end - start),
            )
            start, lowered = start + step, 0
        used = max(0, start - overlap - first)
        text, first = text[used:], first + used


def _whole(record: Record, pieces: Iterable[Piece]) -> Record:
    texts, lowered = list[str](), 0
    for piece in pieces:
        texts.append(piece.text)
        lowered += piece.lowered
    return record._replace(text="".join(texts), lowered=lowered)


def _in_pieces(source: Source) -> Iterator[tuple[Record, Iterator[Piece]]]:
    """The records of a file without their texts, and the pieces of each text, which are read as they are taken."""
    number = 0

    def count(piece: Piece) -> int:
        nonlocal number
        number += piece.begins
        return number

    for index, pieces in groupby(FORMATS[source.format].read(source), count):
        first = next(pieces)
        name = str(index) if first.name is None else first.name
        if not name:
            raise InputError(f"{source.label}, {first.place}: the record has no name; give it one")
        record = Record(index - 1, name, "", first.place)
        yield record, _checked(source, record, chain([first], pieces))  # noqa: B031  once for each record
    if number == 0:
        raise InputError(f"{source.label} holds no record")


def _checked(source: Source, record: Record, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces of a record, refused where they are no text together."""
    where = f"{source.label}, {record.place}"
    length = 0
    for piece in pieces:
        for what, value in (("name", record.name), ("text", piece.text)):
            try:
                if not value.isascii():
                    value.encode()
            except UnicodeEncodeError as error:  # JSON can name half a character
                raise InputError(
                    f"{where}, record {shown(record.name)}: an unpaired surrogate at character {error.start} of the "
                    f"{what} is not valid Unicode; correct it"
                ) from error
        length += len(piece.text)
        yield piece
    if not length:
        raise InputError(f"{where}: the record {shown(record.name)} is empty; remove it")


# --- formats ---------------------------------------------------------------------------------------------------------


def _read_fasta(source: Source) -> Iterator[Piece]:
    with _open(source) as file:
        for piece in read_fasta(file, source.label):
            if piece.header is None:
                yield Piece(piece.sequence.decode("ascii"), piece.lowered, begins=False)
            else:
                yield Piece("", name=_first_word(piece.header), place=f"line {piece.line}")


def _read_fastq(source: Source) -> Iterator[Piece]:
    with _open(source) as file:
        number = 0
        while header := file.readline():
            number += 1
            place = f"line {number}"
            if not (header := header.strip()):
                continue
            sequence, plus, quality = (file.readline().strip() for _ in range(3))
            number += 3
            if not (header.startswith(b"@") and plus.startswith(b"+") and len(sequence) == len(quality)):
                raise InputError(
                    f"{source.label}, {place}: not FASTQ, whose records are four lines: "
                    "'@' and a name, a sequence, '+', and as many qualities"
                )
            if not sequence.isalpha() and sequence:
                raise InputError(f"{source.label}, line {number - 2}: a sequence has letters only")
            text = sequence.decode("ascii")
            yield Piece(text.upper(), sum(map(str.islower, text)), _first_word(header[1:]), place)


def _read_lines(source: Source) -> Iterator[Piece]:
    with _open(source) as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(BYTE_ORDER_MARK if number == 1 else b"")
            try:
                text = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(source.label, number) from error
            yield Piece(text, place=f"line {number}")


def _read_json_lines(source: Source) -> Iterator[Piece]:
    with _open(source) as file:
        for number, row in read_json_lines(file, source.label):
            place = f"line {number}"
            if not isinstance(row, JsonObject):
                raise InputError(f"{source.label}, {place}: expected a JSON object, not {type(row).__name__}")
            name_key = _name_key(row, source)
            for key in (source.text_key, name_key):
                if key in row.repeated:
                    raise InputError(f"{source.label}, {place}: the key {shown(key)} stands there twice; keep one")
            if source.text_key not in row:
                raise InputError(
                    f"{source.label}, {place}: no key {shown(source.text_key)}; name the text's with --text-key"
                )
            if source.name_key is not None and source.name_key not in row:
                raise InputError(f"{source.label}, {place}: no key {shown(source.name_key)}, which --name-key names")
            name = _name(row.get(name_key), source, place)
            yield Piece(_text(row[source.text_key], source, place), name=name, place=place)


def _read_parquet(source: Source) -> Iterator[Piece]:
    import pyarrow
    from pyarrow import parquet

    if not source.path.exists():  # pyarrow's own message is long
        raise InputError(f"cannot read {source.label}: no such file; {_CURE}")
    try:
        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            name_key = _name_key(dict.fromkeys(names), source)
            columns = [source.text_key]
            if source.name_key is not None or name_key in names:
                columns.append(name_key)
            if missing := [name for name in columns if name not in names]:
                raise InputError(
                    f"{source.label}: no column {shown(missing[0])}; it has {printable(', '.join(names))}: "
                    "name them with --text-key and --name-key"
                )
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                texts = batch.column(source.text_key)
                given = batch.column(name_key) if name_key in columns else None
                for row in range(batch.num_rows):
                    number += 1
                    place = f"row {number}"
                    name = None if given is None else _name(given[row].as_py(), source, place)
                    yield Piece(_text(texts[row].as_py(), source, place), name=name, place=place)
    except (pyarrow.ArrowException, OSError) as error:
        reason = printable(" ".join(str(error).split()), limit=200)
        raise InputError(f"{source.label}: not a Parquet file that can be read ({reason}); write it again") from error


def _open(source: Source) -> Any:
    with open_source(source.path, source.label, compressed=False, cure=_CURE) as file:
        compressed = file.read(2) == GZIP or split_name(source.path)[1]
    return open_source(source.path, source.label, compressed=compressed, cure=_CURE)


def _first_word(header: bytes) -> str:
    words = header.split(maxsplit=1)
    return words[0].decode("utf-8", errors="replace") if words else ""


def _name_key(row: dict[str, Any], source: Source) -> str:
    if source.name_key is not None:
        return source.name_key
    return next((key for key in ("name", "id") if key in row and key != source.text_key), "name")


def _name(value: Any, source: Source, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{source.label}, {place}: a name must be a string or a whole number, not {shown(value)}")


def _text(value: Any, source: Source, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{source.label}, {place}: {shown(source.text_key)} must be a string, not {type(value).__name__}"
        )
    return value


class _Format(NamedTuple):
    suffixes: frozenset[str]
    read: Callable[[Source], Iterator[Piece]]


FORMATS: dict[str, _Format] = {
    "fasta": _Format(FASTA_SUFFIXES, _read_fasta),
    "fastq": _Format(frozenset((".fastq", ".fq")), _read_fastq),
    "jsonl": _Format(frozenset((".jsonl", ".ndjson")), _read_json_lines),
    "parquet": _Format(frozenset((".parquet", ".pq")), _read_parquet),
    "lines": _Format(frozenset((".txt",)), _read_lines),
}
"""Formats of records by name: the suffixes of their files, and the reader."""
