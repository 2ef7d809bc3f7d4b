"""The fused kernels of the Hyena operator, in Triton; each names the plain function that it equals.

This package is the only one that imports triton. ``ops.hyena(..., method="triton")`` is the way in; what the kernels
cannot do is said by ``obstacle``, which needs no triton.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from hyaena.errors import InputError, UnsupportedError
from hyaena.ops.long_conv import ModalFilter

MOST_MODES = 16
MOST_TAPS = 8
WIDEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALL = "pip install triton"


@torch.compiler.assume_constant_result
def missing(device: str) -> str | None:
    """What this machine lacks to run the kernels on a device type, or None."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {INSTALL}"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, and Triton needs 8.0 or newer"
    if device == "cpu" and interpreted():
        return None
    return f"the kernels need a CUDA device, and the tensors are on {device!r}"


def interpreted() -> bool:
    """Whether kernels run on Triton's interpreter, on the host."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return knobs.runtime.interpret


def unsupported_reason(
    z: Tensor, short_weight: Tensor, long_filter: ModalFilter, iir: Tensor | None, reset: Tensor | None
) -> str | None:
    """Why the kernels cannot evaluate the operator on these arguments, or None when they can."""
    modes, taps = long_filter.poles.shape[-1], short_weight.shape[-1]
    if reset is not None:
        return "the kernels cannot reset inside a sequence (packed documents): use blocked"
    if iir is not None and not iir.is_complex():
        return "the state is the window of a truncated filter: go on with truncated or auto, or begin anew"
    if z.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {z.dtype}"
    if long_filter.poles.dtype != torch.complex64 or long_filter.residues.dtype != torch.complex64:
        return f"the kernels take complex64 poles and residues, not {long_filter.poles.dtype}"
    if not 1 <= modes <= MOST_MODES or not 1 <= taps <= MOST_TAPS:
        return f"the kernels take 1 to {MOST_MODES} modes and 1 to {MOST_TAPS} taps, not {modes} and {taps}"
    return missing(z.device.type)


def decode_unsupported_reason(dtype: torch.dtype, head_dim: int, device: str) -> str | None:
    """Why the decoding kernels cannot run a model of this dtype and head width, or None when they can."""
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if head_dim > WIDEST_HEAD:
        return f"the kernels take heads of at most {WIDEST_HEAD} channels, not {head_dim}"
    return missing(device)


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may begin before its predecessor ends, see ``ops.triton.overlap``: on Hopper and newer GPUs."""
    if device.type != "cuda" or torch.version.hip is not None or interpreted():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def hyena_triton(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: ModalFilter,
    fir: Tensor | None,
    iir: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equals ``ops.hyena`` by any plain method: y [B,T,D], and fir and iir after z. Differentiable."""
    from hyaena.ops.triton.hyena.register import hyena_operator

    batch, length, width = z.shape
    if length == 0 or (mask is not None and mask.shape != z.shape[:2]):
        raise InputError(
            f"hyena takes z [B, T>=1, 3D] and a mask [B, T], not {tuple(z.shape)} and {getattr(mask, 'shape', None)}"
        )
    shapes = (batch, width, short_weight.shape[-1] - 1), (batch, *long_filter.poles.shape)
    for state, shape in zip((fir, iir), shapes, strict=True):
        if state is not None and state.shape != shape:
            raise InputError(f"hyena's states must be {shapes[0]} and {shapes[1]}, and one is {tuple(state.shape)}")
    poles, residues, skip = long_filter
    pairs = None if iir is None else torch.view_as_real(iir.to(torch.complex64))
    y, window, pairs = hyena_operator(
        z, short_weight, short_bias, torch.view_as_real(poles), torch.view_as_real(residues), skip, fir, pairs, mask
    )
    return y, window, torch.view_as_complex(pairs)


def hyena_step_(
    z: Tensor,
    short_weight: Tensor,
    short_bias: Tensor | None,
    long_filter: ModalFilter,
    fir: Tensor,
    iir: Tensor,
) -> Tensor:
    """One decoding step that writes its states in place: for captured graphs, whose addresses stay.

    Equals ``ops.hyena`` at T = 1. Without gradients.

    Args:
        z: [B,1,3D].
        fir: [B,3D,K-1], contiguous; brought up to date.
        iir: complex64 [B,D,N], contiguous; brought up to date.

    Returns:
        y [B,1,D].

    Raises:
        UnsupportedError: the kernels cannot run here, or on these arguments.
        InputError: more than one step, or states that cannot be written in place.
    """
    from hyaena.ops.triton.hyena.register import hyena_step_operator

    reason = unsupported_reason(z, short_weight, long_filter, iir, None)
    if reason is not None:
        raise UnsupportedError(f"method 'triton' cannot run: {reason}")
    batch, length, width = z.shape
    shapes = (batch, width, short_weight.shape[-1] - 1), (batch, *long_filter.poles.shape)
    if length != 1 or (fir.shape, iir.shape) != shapes or not (fir.is_contiguous() and iir.is_contiguous()):
        raise InputError(f"hyena_step_ takes one step, and contiguous states of shapes {shapes[0]} and {shapes[1]}")
    poles, residues, skip = long_filter
    return hyena_step_operator(
        z,
        short_weight,
        short_bias,
        torch.view_as_real(poles),
        torch.view_as_real(residues),
        skip,
        fir,
        torch.view_as_real(iir),
    )
