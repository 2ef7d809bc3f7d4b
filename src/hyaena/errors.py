"""Errors that a user can act on.

Every message is one line, says what is wrong and names the fix. The command line prints it without a
traceback and exits with status 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations


class HyaenaError(Exception):
    """Base class of the errors that this package raises on purpose."""


class ConfigError(HyaenaError, ValueError):
    """A configuration is unknown, incomplete or contradictory."""


class CheckpointError(HyaenaError, ValueError):
    """A checkpoint is missing, truncated, misshapen or unsafe."""


class InputError(HyaenaError, ValueError):
    """A prompt, a token id or an argument cannot be used."""


class CapacityError(HyaenaError, RuntimeError):
    """A cache is full: the sequence would pass the length that was reserved."""


class UnsupportedError(HyaenaError, RuntimeError):
    """A method or backend was asked for by name and cannot do what was asked."""


class OutputError(HyaenaError, RuntimeError):
    """A file cannot be written; what stood in its place is unharmed."""


class NonFiniteError(HyaenaError, ArithmeticError):
    """A computation produced NaN or infinity."""
