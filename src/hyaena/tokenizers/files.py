"""Reads the JSON files of a tokenizer, within bounds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from hyaena.errors import CheckpointError, printable

MAX_BYTES = 64 * 2**20
"""Size of the largest file that is read; vocabularies of 262,144 tokens take about half of it."""
MAX_VALUES = 4_000_000
"""Most values in a file, each of which takes some 70 bytes of memory, counted by their commas and brackets."""


def read_object(path: Path) -> tuple[dict[str, Any], str]:
    """Read a JSON object: its content, and its text without a byte order mark.

    Raises:
        CheckpointError: the file is missing, not a regular file, too large, not UTF-8, or not a JSON object.
    """
    try:
        mode = os.stat(path).st_mode  # before opening: opening a FIFO waits, and a device may never end
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_BYTES // 2**20} MiB: not a tokenizer's file")
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MAX_VALUES:
        raise CheckpointError(f"{path} has more than {MAX_VALUES:,} values: not a tokenizer's file")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 (byte {error.start:,}): download it again") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise CheckpointError(f"{path} is not a usable {path.name}: not readable JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    return value, text


def read_beside(path: Path) -> dict[str, Any]:
    """The JSON object in a file that need not exist; without it, an empty one.

    Raises:
        CheckpointError: as ``read_object``.
    """
    return read_object(path)[0] if os.path.lexists(path) else {}


def one_line(error: BaseException) -> str:
    """What an error of another library says, on one line, cut."""
    return printable(" ".join(str(error)[:2000].split()), limit=200) or type(error).__name__
