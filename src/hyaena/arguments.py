"""Checks of arguments: numbers, switches and what a value is, as one line of an error names it."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hyaena.errors import InputError, printable, shown


def as_whole(value: Any) -> int | None:
    """The whole number that a value is, or None: booleans, floats, texts and arrays with dimensions are none.

    Integers of numpy and tensors without dimensions count as whole numbers.
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises the latter two for tensors without a value
        return None


def whole(name: str, value: Any, wanted: str, low: int, high: int | None = None) -> int:
    """Check that an argument is a whole number from ``low`` to ``high``.

    Raises:
        InputError: "``name`` must be ``wanted``, not …".
    """
    number = as_whole(value)
    if number is None or number < low or (high is not None and number > high):
        raise InputError(f"{name} must be {wanted}, not {shown(value)}")
    return number


def real(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> float:
    """Check that an argument is a finite number for which ``holds`` is true; integers count, booleans do not.

    Raises:
        InputError: "``name`` must be ``wanted``, not …".
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number) or not holds(number):
        raise InputError(f"{name} must be {wanted}, not {shown(value)}")
    return number


def each(name: str, values: Any, wanted: str) -> Iterator[Any]:
    """What an argument holds, one after another; a text or a mapping is none of several.

    Raises:
        InputError: "``name`` must be ``wanted``, not …".
    """
    try:
        if not isinstance(values, str | bytes | bytearray | Mapping):
            return iter(values)
    except TypeError:
        pass
    raise InputError(f"{name} must be {wanted}, not {kind_of(values)}")


def require_ids(ids: Iterable[int], size: int, where: str = "") -> None:
    """Check that token ids are those of a vocabulary of ``size`` tokens.

    Raises:
        InputError: one of them is not; ``where`` is in front of the message.
    """
    outside = next((token for token in ids if not 0 <= token < size), None)
    if outside is not None:
        raise InputError(f"{where}token id {shown(outside)} is outside the vocabulary 0..{size - 1} of the model")


def switch(name: str, value: Any) -> bool:
    """Check that an argument is True or False; a text such as ``"false"`` would otherwise count as true.

    Raises:
        InputError: it is something else.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # Python's and numpy's
        raise InputError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def as_path(name: str, value: Any) -> Path:
    """Check that an argument is a path, as text or as a ``PathLike``; bytes are not accepted.

    Raises:
        InputError: it is something else, a text with a NUL character, which names nothing, or an empty one, which would
            name the current folder.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str):
        raise InputError(f"{name} must be a path, not {kind_of(value)}")
    if not text:
        raise InputError(f"{name} is empty: name a path, or . for the current folder")
    if "\0" in text:
        raise InputError(f"{name} must be a path, and {shown(text)} has a NUL character in it")
    return Path(text)


def as_text_path(name: str, value: Any, library: str) -> Path:
    """Check that an argument is a path whose name is UTF-8, as a library needs that takes names as text.

    Raises:
        InputError: see ``as_path``; or other bytes, which Python shows as surrogates, are in it.
    """
    path = as_path(name, value)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{printable(str(path))}: the name is not UTF-8, which {library} needs: choose another"
        ) from None
    return path


def kind_of(value: Any) -> str:
    """What a value is, in a few words for a message: ``a dict``, ``None``, ``a float32 Tensor of shape [2, 3]``."""
    if value is None:
        return "None"
    name = type(value).__name__[:60]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        name = f"{str(value.dtype).rsplit('.', 1)[-1]} {name} of shape {list(value.shape)}"
    return f"{'an' if name[0] in 'aeiouAEIOU' and not name.startswith('u') else 'a'} {name}"
