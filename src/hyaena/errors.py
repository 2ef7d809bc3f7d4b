"""Errors that a user can act on, and how their messages print what came from outside.

Every message is one line, says what is wrong and names the fix. The command line prints it without a
traceback and exits with status 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence

SCREEN = 1920
"""The most characters of a message: one screen of 24 lines of 80."""

_TOO_LONG = 10_000
"""Characters of a text from a file that are looked at, before it is cut to the length that is printed."""


class HyaenaError(Exception):
    """Base class of the errors that this package raises on purpose.

    Control characters of a message are escaped, and a message is cut to one screen.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, limit=SCREEN))


class ConfigError(HyaenaError, ValueError):
    """A configuration is unknown, incomplete or contradictory."""


class CheckpointError(HyaenaError, ValueError):
    """A checkpoint is missing, truncated, misshapen or unsafe."""


class InputError(HyaenaError, ValueError):
    """A prompt, a token id or an argument cannot be used."""


class CapacityError(HyaenaError, RuntimeError):
    """A cache is full: the sequence would pass the length that was reserved."""


class UnsupportedError(HyaenaError, RuntimeError):
    """A method or backend was named explicitly and does not support the request."""


class OutputError(HyaenaError, RuntimeError):
    """A file cannot be written; what stood in its place is unharmed."""


class NonFiniteError(HyaenaError, ArithmeticError):
    """A computation produced NaN or infinity."""


# --- text of messages ------------------------------------------------------------------------------------------------


def printable(text: str, *, limit: int = 120) -> str:
    """A text with its control characters escaped, cut in the middle to at most ``limit`` characters."""
    if len(text) > _TOO_LONG:
        text = text[: _TOO_LONG // 2] + text[-_TOO_LONG // 2 :]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) > limit:
        head = limit * 2 // 3
        text = f"{text[:head]} … {text[head + 3 - limit :]}"
    return text


def shown(value: object) -> str:
    """A value as Python writes it, on one line, cut to about a hundred characters however large it is."""
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = 60
    writer.maxlong = 40
    try:
        return printable(writer.repr(value))
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` abbreviates, or else the one that is most like it, if any is like it."""
    known = list(known)
    if len(name) > 2 and (longer := [one for one in known if one.startswith(name)]):
        return min(longer, key=len)
    return next(iter(difflib.get_close_matches(name[:100], known, n=1, cutoff=0.66)), None)


def counted(count: int, noun: str) -> str:
    """A number of things: ``1 record``, ``1,200 records``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def joined(problems: Sequence[str], *, most: int = 6) -> str:
    """Several problems as one message; beyond ``most``, their number only."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest:,} more" if rest > 0 else "")


def in_words(message: str, words: Mapping[str, str]) -> str:
    """A message with some of its words replaced, such as our names of fields by those of the file that a user wrote."""
    return re.sub("|".join(rf"\b{word}\b" for word in words), lambda match: words[match[0]], message)
