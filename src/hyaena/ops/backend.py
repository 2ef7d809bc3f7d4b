"""Which implementation runs: explicit argument > environment > automatic; said once in the log, never silent.

``HYAENA_BACKEND`` speaks for every call that leaves the choice open (``method="auto"``): ``triton`` is asking for the
kernels by name, ``plain`` keeps to plain torch, ``auto`` is the default.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

from hyaena.errors import UnsupportedError

VARIABLE = "HYAENA_BACKEND"
CHOICES = ("auto", "triton", "plain")

logger = logging.getLogger(__name__)


def use_triton(method: str, obstacle: Callable[[], str | None], device: torch.device) -> bool:
    """Whether the fused kernel evaluates this call of ``ops.hyena``.

    Args:
        method: what the caller asked for.
        obstacle: why the kernel cannot, or None when it can.
        device: where the tensors are; ``auto`` takes the kernel on CUDA only.

    Raises:
        UnsupportedError: the kernel was asked for by name, here or in the environment, and cannot run.
    """
    wish = method
    if method == "auto":
        wish = os.environ.get(VARIABLE, "auto")
        if wish not in CHOICES:
            raise UnsupportedError(f"{VARIABLE} is {wish!r}: set it to one of {', '.join(CHOICES)}, or unset it")
    if wish == "triton":
        reason = obstacle()
        if reason is not None:
            asked = "method 'triton'" if method == "triton" else f"{VARIABLE}=triton"
            raise UnsupportedError(f"{asked} cannot run: {reason}")
        return True
    if wish != "auto":
        return False
    reason = obstacle() if device.type == "cuda" else f"they need a CUDA device, and the tensors are on {device.type!r}"
    if not torch.compiler.is_compiling():
        _say("the fused kernels" if reason is None else f"plain torch, not the fused kernels: {reason}")
    return reason is None


@functools.cache
def _say(choice: str) -> None:
    """Log a choice the first time that it is made."""
    logger.info("the Hyena operator runs in %s", choice)
