"""Optional packages: which of hyaena's extras brings them, and one error where one is missing."""

from __future__ import annotations

import importlib.util

from hyaena.errors import UnsupportedError


def require(*packages: str, extra: str, purpose: str) -> None:
    """Check that optional packages are installed, without importing them.

    Args:
        packages: their import names.
        extra: the extra of hyaena that installs them.
        purpose: what needs them, as the subject of the message: ``"the picture"``.

    Raises:
        UnsupportedError: one of them is missing; the message has the install command.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UnsupportedError(f"{purpose} needs {' and '.join(missing)}: pip install 'hyaena[{extra}]'")
