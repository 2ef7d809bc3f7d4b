"""Opens the files that documents and records are read from, as they are or compressed by gzip."""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from hyaena.errors import InputError

BLOCK = 1 << 20
"""Bytes that are read at a time."""

BYTE_ORDER_MARK = codecs.BOM_UTF8

_COMPRESSED = (".gz", ".bgz")

GZIP = b"\x1f\x8b"
"""The first bytes of a file of gzip."""

_BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The last block of a file of bgzip, which holds nothing (SAM 1.6, section 4.1.2)."""


def split_name(path: Path) -> tuple[str, bool]:
    """Return the suffix that names a file's format, in lower case, and whether its name says that gzip compressed it.

    ``genes.fa.gz`` gives ``(".fa", True)``.
    """
    compressed = path.suffix.lower() in _COMPRESSED
    return (path.with_suffix("") if compressed else path).suffix.lower(), compressed


@contextmanager
def open_source(path: Path, label: str | Path, *, compressed: bool, cure: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed.

    Args:
        path: the file.
        label: what messages call it.
        compressed: whether gzip compressed it.
        cure: what a user can check if it cannot be read.

    Raises:
        InputError: the file cannot be opened, or, at any later read, it is cut short or damaged.
    """
    try:
        if compressed:
            _check_end(path, label)
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            yield cast("IO[bytes]", file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{label}: not a whole gzip file ({error}); copy or compress it again") from error
    except OSError as error:
        raise InputError(f"cannot read {label}: {error.strerror or error}; {cure}") from error


def is_bgzip(head: bytes) -> bool:
    """Whether the first 18 bytes of a file are those of bgzip: members of gzip that name their own size."""
    return head.startswith(GZIP) and len(head) == 18 and bool(head[3] & 4) and head[12:14] == b"BC"


def _check_end(path: Path, label: str | Path) -> None:
    """Refuse a file of bgzip without its last block: cut off between two blocks, it would be a shorter file of gzip.

    Raises:
        InputError: the block is not there.
    """
    with open(path, "rb") as file:
        if not file.seekable() or not is_bgzip(file.read(18)):
            return
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_BGZIP_END)))
        if file.read() != _BGZIP_END:
            raise InputError(f"{label}: not a whole file of bgzip (its end is missing); copy or compress it again")
