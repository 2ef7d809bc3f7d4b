"""Which versions of transformers ``hyaena.hf`` works with."""

from __future__ import annotations

import re

from hyaena import extras
from hyaena.errors import UnsupportedError

OLDEST, BELOW = (5, 15, 1), (6,)
"""The oldest version that is supported, and the first one that is not any more."""


def check_versions() -> None:
    """Check that transformers is installed and of a supported version.

    Raises:
        UnsupportedError: it is missing, or its version is out of range.
    """
    extras.require("transformers", extra="hf", purpose="hyaena.hf")
    import transformers

    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3])
    if not OLDEST <= found < BELOW:
        oldest, below = (".".join(map(str, version)) for version in (OLDEST, BELOW))
        raise UnsupportedError(
            f"hyaena.hf works with transformers {oldest} and newer, below {below}, and found "
            f"{transformers.__version__}: pip install 'transformers>={oldest},<{below}'"
        )
