"""Reads documents from files: plain text, JSON lines, JSON arrays and FASTA, each as it is or compressed by gzip.

Documents are read in pieces of bounded size, so that a text of any length takes little memory. Every error names the
file and the line.
"""

from __future__ import annotations

import codecs
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hyaena.errors import InputError
from hyaena.records.fasta import FASTA_SUFFIXES, read_fasta
from hyaena.records.json_lines import JsonObject, not_utf8, parse_json, read_json_lines
from hyaena.records.source import BLOCK, BYTE_ORDER_MARK, open_source, split_name

log = logging.getLogger(__name__)

_OTHER_SEQUENCES = {
    ".fastq": "FASTQ",
    ".fq": "FASTQ",
    ".gb": "GenBank",
    ".gbk": "GenBank",
    ".embl": "EMBL",
}
_KEYS = ("text", "prompt", "completion")


@dataclass(frozen=True)
class Piece:
    """A run of text of one document.

    Attributes:
        text: the characters; the pieces of a document, joined, are its text.
        path: the file, for messages.
        line: the line of the file where the piece begins, from 1.
        begins: this is the first piece of a document.
        learned: the text is predicted; False for a prompt, which is context only.
        verbatim: the text stands in the file as it is, so its line ends are those of the file.
    """

    text: str
    path: str = "the text"
    line: int = 1
    begins: bool = True
    learned: bool = True
    verbatim: bool = False


def find_files(
    sources: Iterable[str | Path], pattern: str = "*", *, without: Callable[[Path], bool] = lambda _: False
) -> list[Path]:
    """List the files of files and folders in a fixed order; a folder is searched recursively and sorted by path.

    Files of a folder for which ``without`` is true are left out.

    Raises:
        InputError: a source is missing, is neither a file nor a folder, or holds no file that matches.
    """
    found = []
    for source in map(Path, sources):
        if os.path.isdir(source):  # pathlib raises for names that are too long, and in folders that are closed to us
            paths = sorted(path for path in source.rglob(pattern) if os.path.isfile(path) and not without(path))
            if not paths:
                wanted = "" if pattern == "*" else f" that matches {pattern!r}; change the pattern, or"
                raise InputError(f"the folder {source} holds no file{wanted or ':'} name another")
            found += paths
        elif not os.path.exists(source):
            raise InputError(f"cannot read {source}: no such file or folder; check its name")
        elif not os.path.isfile(source):
            raise InputError(f"cannot read {source}: not a regular file; name a file or a folder")
        else:
            found.append(source)
    return found


def read_documents(
    sources: Iterable[str | Path], pattern: str = "*", *, without: Callable[[Path], bool] = lambda _: False
) -> Iterator[Piece]:
    """Read the documents of files and folders in the order of ``find_files``.

    The end of a file's name, in any letter case, says how it is read; ``.gz`` or ``.bgz`` may follow it:

    - ``.jsonl``, ``.ndjson``: an object per line, with a string ``text``, or with ``prompt`` and ``completion``;
    - ``.json``: an array of such objects, or such objects one after another;
    - ``.fa``, ``.fasta``, ``.fna``, ``.ffn``, ``.faa``: FASTA. Every record is a document of its sequence, without
      header and line ends. Lower case, which marks repeats, is read as upper case (and logged); N stays N;
    - every other file is one UTF-8 document.

    A byte order mark at the beginning of a file is dropped. Text of an empty document is never yielded.

    Raises:
        InputError: a file cannot be read as what its name says; the message names the file and the line.
    """
    lower: Counter[Path] = Counter()
    for path in find_files(sources, pattern, without=without):
        yield from _pieces_of(path, lower)
    if lower:
        log.warning(
            "%s%s: %s lower-case letters (marked repeats) are read as upper case",
            next(iter(lower)),
            f" and {len(lower) - 1} more FASTA files" if len(lower) > 1 else "",
            f"{lower.total():,}",
        )


def _pieces_of(path: Path, lower: Counter[Path]) -> Iterator[Piece]:
    suffix, compressed = split_name(path)
    if suffix in _OTHER_SEQUENCES:
        raise InputError(f"{path}: {_OTHER_SEQUENCES[suffix]} is not supported; convert it to FASTA")
    with open_source(path, path, compressed=compressed, cure="check its name and permissions") as file:
        if suffix in FASTA_SUFFIXES:
            yield from _read_fasta(file, path, lower)
        else:
            yield from _READERS.get(suffix, _read_text)(file, path)


def _read_text(file: IO[bytes], path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, begins, block = 1, True, b"-"
    while block:
        block = file.read(BLOCK)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise InputError(
                f"{path}, line {line}: {path.name} is not UTF-8 text; convert it, or leave it out"
            ) from error
        if text:
            yield Piece(text, str(path), line, begins=begins, verbatim=True)
            line, begins = line + text.count("\n"), False


def _read_json_lines(file: IO[bytes], path: Path) -> Iterator[Piece]:
    for line, row in read_json_lines(file, path):
        yield from _document(row, path, line)


def _read_json(file: IO[bytes], path: Path) -> Iterator[Piece]:
    raw = file.read().removeprefix(BYTE_ORDER_MARK)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, 1 + raw[: error.start].count(b"\n")) from error
    del raw
    line, counted = 1, 0  # the line of position `counted`

    def skip(position: int, what: str = " \t\r\n") -> int:
        nonlocal line, counted
        while position < len(text) and text[position] in what:
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        return position

    position = skip(0)
    array = text.startswith("[", position)
    position = skip(position + array)
    while position < len(text) and not (array and text[position] == "]"):
        row, position = parse_json(text, position, path, line)
        yield from _document(row, path, line)
        position = skip(position)
        if array and not text.startswith("]", position):
            if not text.startswith(",", position):
                raise InputError(f"{path}, line {line}: expected ',' or ']' after an object of the array")
            position = skip(position + 1)
            if text.startswith("]", position):
                raise InputError(f"{path}, line {line}: a comma before the end of the array")
    if array:
        if position == len(text):
            raise InputError(f"{path}, line {line}: the array does not end; the file is cut short")
        if skip(position + 1) < len(text):
            raise InputError(f"{path}, line {line}: text after the end of the array")


def _document(row: Any, path: Path, line: int) -> Iterator[Piece]:
    where = f"{path}, line {line}"
    if not isinstance(row, JsonObject):
        raise InputError(f"{where}: expected an object whose `text` is a string, not {type(row).__name__}")
    for key in _KEYS:
        if key in row.repeated:
            raise InputError(f"{where}: the key `{key}` stands there twice; keep one")
    given = [key for key in _KEYS if key in row]
    if given not in (["text"], ["prompt", "completion"]):
        found = f"found {' and '.join(f'`{key}`' for key in given)}" if given else "found none of them"
        raise InputError(f"{where}: expected an object whose `text` is a string, or `prompt` and `completion`; {found}")
    for key in given:
        if not isinstance(row[key], str):
            raise InputError(f"{where}: `{key}` must be a string, not {type(row[key]).__name__}")
    if given == ["text"]:
        yield Piece(row["text"], str(path), line)
        return
    if not row["completion"]:
        raise InputError(f"{where}: the completion is empty, so there is nothing to learn; remove the line")
    yield Piece(row["prompt"], str(path), line, learned=False)
    yield Piece(row["completion"], str(path), line, begins=False)


def _read_fasta(file: IO[bytes], path: Path, lower: Counter[Path]) -> Iterator[Piece]:
    begins = True
    for piece in read_fasta(file, path, block=BLOCK):
        if piece.header is not None:
            begins = True
            continue
        if piece.lowered:
            lower[path] += piece.lowered
        yield Piece(piece.sequence.decode("ascii"), str(path), piece.line, begins=begins)
        begins = False


_READERS: dict[str, Callable[[IO[bytes], Path], Iterator[Piece]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
}
