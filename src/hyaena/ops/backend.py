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
from torch import Tensor

from hyaena.errors import UnsupportedError
from hyaena.ops import triton

VARIABLE = "HYAENA_BACKEND"
CHOICES = ("auto", "triton", "plain")
OPERATOR = "the Hyena operator runs in"
POINTWISE = "norms, gates and rotary positions run in"

logger = logging.getLogger(__name__)


@functools.cache
def log_once(what: str, choice: str) -> None:
    """Log a choice the first time that it is made."""
    logger.info("%s %s", what, choice)


def use_triton(method: str, obstacle: Callable[[], str | None], device: torch.device, what: str = OPERATOR) -> bool:
    """Whether a fused kernel evaluates this call.

    Args:
        method: what the caller asked for.
        obstacle: why the kernel cannot, or None when it can.
        device: where the tensors are; ``auto`` takes the kernel on CUDA only.
        what: what is being chosen for, as the log is to say it.

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
        log_once(what, "the fused kernels" if reason is None else f"plain torch, not the fused kernels: {reason}")
    return reason is None


def use_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether the pointwise kernels (norm, gate, rotary positions) evaluate a call on these tensors.

    They serve inference. Where a gradient is wanted the plain functions run, which have one, whatever the environment
    says; so they do inside torch.compile, whose compiler fuses them with their neighbours.

    Raises:
        UnsupportedError: the environment asks for the kernels by name, and they cannot run.
    """
    if torch.compiler.is_compiling() or wants_gradients(x, *others):
        return False
    return use_triton("auto", lambda: _pointwise_obstacle(x), x.device, POINTWISE)


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of a function of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _pointwise_obstacle(x: Tensor) -> str | None:
    if x.dtype not in triton.DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {x.dtype}"
    return triton.device_unsupported_reason(x.device.type)
