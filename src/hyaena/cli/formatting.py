"""Sizes as people write and read them, and JSON as programs do."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from hyaena.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes from a size such as ``5GB``, ``500MB``, ``2GiB`` or ``100000``.

    Raises:
        InputError: it is not a positive size.
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) *([KMG]I?)?B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise InputError(f"size {text!r} is not understood: write one such as 5GB, 500MB or 2GiB")
    return size


def decimal_bytes(count: float) -> str:
    """Bytes in powers of 1000, as file sizes are given: ``15.29 GB``."""
    return _scaled(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), " bytes")


def binary_bytes(count: float) -> str:
    """Bytes in powers of 1024, as memory is given: ``64.00 KiB``."""
    return _scaled(count, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")), " bytes")


def short_count(count: float) -> str:
    """A count in powers of 1000: ``7.65 B``."""
    return _scaled(count, ((1e9, "B"), (1e6, "M"), (1e3, "k")), "")


def json_text(document: Any) -> str:
    """A document as JSON, indented. Numbers that JSON lacks (infinities, NaN) are written as null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def json_file(document: Any) -> bytes:
    """A document as the content of a JSON file, indented, in UTF-8.

    Surrogates, by which Python shows bytes that are no UTF-8, are escaped as JSON escapes them.
    """
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scaled(count: float, units: tuple[tuple[float, str], ...], rest: str) -> str:
    for size, unit in units:
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}{rest}"
