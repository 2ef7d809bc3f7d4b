"""Reads FASTA in pieces of bounded size."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from hyaena.errors import InputError
from hyaena.records.source import BLOCK, BYTE_ORDER_MARK

FASTA_SUFFIXES = frozenset((".fa", ".fasta", ".fna", ".ffn", ".faa"))

_LOWER = string.ascii_lowercase.encode()
_SEQUENCE = string.ascii_letters.encode() + b"*-"


class FastaPiece(NamedTuple):
    """A header, or a run of the sequence that follows it.

    Attributes:
        line: the line of the file where the piece begins, from 1.
        header: the header that begins a record, without ``>``; None for a run of sequence.
        sequence: upper-case letters, ``*`` and ``-``; empty beside a header.
        lowered: how many of the letters are lower case in the file.
    """

    line: int
    header: bytes | None = None
    sequence: bytes = b""
    lowered: int = 0


def read_fasta(file: IO[bytes], label: str | Path, *, block: int = BLOCK) -> Iterator[FastaPiece]:
    """Read the records of a FASTA file: a header each, then its sequence in runs of about ``block`` letters.

    Lower case, which marks repeats, is read as upper case; N stays N. Lines end with LF or CRLF. Blank lines and
    comments (``;``) are left out, and so is a byte order mark.

    Args:
        file: opened for bytes.
        label: what messages call the file.
        block: bytes that are read at a time; of a longer header, the rest is left out.

    Raises:
        InputError: it is not FASTA; the message names the line.
    """
    line, line_begins, skipping, in_record = 0, True, False, False
    held: list[bytes] = []
    held_line = held_bytes = 0

    def join() -> FastaPiece:
        nonlocal held_bytes
        sequence = b"".join(held)
        held.clear()
        held_bytes = 0
        lowered = len(sequence) - len(sequence.translate(None, _LOWER))
        return FastaPiece(held_line, None, sequence.upper(), lowered)

    while raw := file.readline(block):  # a line of any length is read in parts
        begins = False
        if line_begins:
            line += 1
            raw = raw.removeprefix(BYTE_ORDER_MARK if line == 1 else b"")
            begins = raw.startswith(b">")
            skipping = begins or raw.startswith(b";")  # a header, or a comment of the oldest files
        line_begins = raw.endswith(b"\n")
        if b"\r" in raw.rstrip(b"\r\n"):
            raise InputError(f"{label}, line {line}: lines end with a bare CR; convert the file to LF or CRLF")
        if begins:
            if held:
                yield join()
            in_record = True
            yield FastaPiece(line, raw[1:].strip())
        sequence = raw.strip()
        if skipping or not sequence:
            continue
        if not in_record:
            raise InputError(f"{label}, line {line}: a sequence before the first header; a record begins with '>'")
        if wrong := sequence.translate(None, _SEQUENCE):
            raise InputError(f"{label}, line {line}: {chr(wrong[0])!r} is no letter of a sequence")
        if not held:
            held_line = line
        held.append(sequence)
        held_bytes += len(sequence)
        if held_bytes >= block:
            yield join()
    if held:
        yield join()
