"""Opens the files that documents and records are read from, as they are or compressed by gzip."""

from __future__ import annotations

import codecs
import gzip
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
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            yield cast("IO[bytes]", file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{label}: not a whole gzip file ({error}); copy or compress it again") from error
    except OSError as error:
        raise InputError(f"cannot read {label}: {error.strerror or error}; {cure}") from error
