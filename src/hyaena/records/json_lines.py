"""Parses JSON objects, and names the line where one is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hyaena.errors import InputError
from hyaena.records.source import BYTE_ORDER_MARK


class JsonObject(dict[str, Any]):
    """A JSON object that remembers which keys it was given twice."""

    repeated: frozenset[str] = frozenset()


def read_json_lines(file: IO[bytes], label: str | Path) -> Iterator[tuple[int, Any]]:
    """Read the JSON value of each line that is not blank, with the line's number, from 1.

    Raises:
        InputError: a line is not UTF-8, or not one JSON value.
    """
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(label, number) from error
        if line := line.strip():
            value, end = parse_json(line, 0, label, number)
            if end < len(line):
                raise InputError(f"{label}, line {number}: more than one JSON value; write one object per line")
            yield number, value


def parse_json(text: str, position: int, label: str | Path, line: int) -> tuple[Any, int]:
    """Parse the JSON value at a position of a text; objects are ``JsonObject``.

    Args:
        line: the line of ``position``.

    Returns:
        The value, and the position after it.

    Raises:
        InputError: there is none; the message names the line.
    """
    try:
        return _decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        line += text.count("\n", position, error.pos)
        raise InputError(f"{label}, line {line}: {error.msg}; every document must be one JSON object") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; brackets nested too deep
        raise InputError(f"{label}, line {line}: JSON that is too large or nested too deep") from error


def not_utf8(label: str | Path, line: int) -> InputError:
    """The error of a line that is not UTF-8."""
    return InputError(f"{label}, line {line}: {Path(label).name} is not UTF-8 text; convert it")


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    row = JsonObject(pairs)
    if len(row) < len(pairs):
        row.repeated = frozenset(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_object)
