"""Which implementation runs, the fused kernels or plain torch: explicit argument > environment > automatic.

``resolve_backend`` decides once per forward pass, and its record is handed to the operators; an operator that is
called alone, with a string, resolves it by itself. ``HYAENA_BACKEND`` decides for calls with ``backend="auto"``.
What ``auto`` chose is logged once; what was chosen by name runs or raises.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops import triton

VARIABLE = "HYAENA_BACKEND"
CHOICES = ("auto", "triton", "plain")

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """What evaluates the operators of one forward pass.

    Attributes:
        hyena: the fused kernel evaluates the Hyena operator, where it takes the arguments (``method="auto"`` only).
        pointwise: kernels evaluate norms, gates and rotary positions. They have no gradients.
        required_by: the argument or the variable that names the kernels, so that arguments that they do not take are
            an error and not a reason for plain torch; None where nobody did.
    """

    hyena: bool
    pointwise: bool
    required_by: str | None = None


PLAIN = Backend(hyena=False, pointwise=False)


@functools.cache
def log_once(what: str, choice: str) -> None:
    """Log a choice the first time that it is made."""
    logger.info("%s %s", what, choice)


def resolve_backend(
    choice: str = "auto", *, device: torch.device, dtype: torch.dtype, gradients: bool = False
) -> Backend:
    """Choose the backend of a forward pass.

    Args:
        choice: ``"auto"``, the environment's choice, or else the kernels on CUDA devices that have them; ``"triton"``,
            the kernels, or an error; ``"plain"``, plain torch.
        device: of the tensors.
        dtype: of the activations.
        gradients: autograd will differentiate the pass. Norms, gates and rotary positions are plain then, and inside
            torch.compile, whose compiler fuses them with their neighbours.

    Raises:
        InputError: an unknown choice.
        UnsupportedError: the kernels were chosen by name, here or in the environment, and cannot run.
    """
    if choice not in CHOICES:
        raise InputError(f"the backend is {choice!r}: choose one of {', '.join(CHOICES)}")
    source = f"backend={choice!r}"
    if choice == "auto":
        choice = os.environ.get(VARIABLE, "auto")
        source = f"{VARIABLE}={choice}"
        if choice not in CHOICES:
            raise UnsupportedError(f"{VARIABLE} is {choice!r}: set it to one of {', '.join(CHOICES)}, or unset it")
    if choice == "plain":
        return PLAIN
    compiling = torch.compiler.is_compiling()
    if choice == "auto" and device.type != "cuda":
        reason = f"they need a CUDA device, and the tensors are on {device.type!r}"
    else:
        reason = unsupported_reason(device, dtype)
    if choice == "triton":
        if reason is not None:
            raise UnsupportedError(f"{source} cannot run: {reason}")
        return Backend(hyena=True, pointwise=not (gradients or compiling), required_by=source)
    if not compiling:
        log_once("the Hyena operator, norms, gates and rotary positions run in", _words(reason))
    return Backend(hyena=True, pointwise=not (gradients or compiling)) if reason is None else PLAIN


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel can run on tensors of this device and dtype, or None."""
    if dtype not in triton.DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    return triton.device_unsupported_reason(device.type)


def use_fused_hyena(
    backend: Backend | str,
    method: str,
    z: Tensor,
    short_weight: Tensor,
    long_filter: object,
    state: Tensor | None,
    reset: Tensor | None,
) -> bool:
    """Whether the fused kernel evaluates this call of ``ops.hyena``; the arguments are its own.

    Raises:
        InputError: the kernels were chosen by an argument, and a method of plain torch beside them.
        UnsupportedError: the kernels were chosen by name, and do not take these arguments.
    """
    if isinstance(backend, str):
        if method != "auto" and backend == "auto":
            return False
        backend = resolve_backend(backend, device=z.device, dtype=z.dtype)
    if method != "auto":
        if backend.required_by is not None and VARIABLE not in backend.required_by:
            raise InputError(
                f"{backend.required_by} and method={method!r} exclude each other: the kernels have a method of their "
                "own, leave one of the two out"
            )
        return False
    if not backend.hyena:
        return False
    reason = triton.unsupported_reason(z, short_weight, long_filter, state, reset)
    if reason is not None and backend.required_by is not None:
        raise UnsupportedError(f"{backend.required_by} cannot run: {reason}")
    if reason is not None and not torch.compiler.is_compiling():
        log_once("a Hyena operator runs in", _words(reason))
    return reason is None


def use_pointwise(backend: Backend | str, x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels of norm, gate and rotary positions evaluate a call on these tensors.

    A record decides; a string is resolved here, and the plain functions run where a gradient is wanted.
    """
    if isinstance(backend, str):
        gradients = wants_gradients(x, *others)
        backend = resolve_backend(backend, device=x.device, dtype=x.dtype, gradients=gradients)
    return backend.pointwise


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of a function of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _words(reason: str | None) -> str:
    return "the fused kernels" if reason is None else f"plain torch, not the fused kernels: {reason}"
