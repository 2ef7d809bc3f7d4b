"""Which problems the Triton kernels support, and where. This module needs no triton; the packages below import it.

``ops.triton.hyena`` has the kernels of the Hyena operator, ``ops.triton.decode`` those of a decoding step,
``ops.triton.pointwise`` norm, gate and rotary positions. Each names the plain function that it equals.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from hyaena.ops.long_conv import ExplicitFilter, ModalFilter, RealModalFilter

MOST_MODES = 16
"""Complex modes; of real ones twice as many."""
MOST_SHORT_TAPS = 8
MOST_TAPS = 128
FEW_TAPS = 8
"""Taps of a long filter that are summed in registers."""
NARROWEST_GROUP = 8
WIDEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALL = "pip install triton"


@torch.compiler.assume_constant_result
def device_unsupported_reason(device: str) -> str | None:
    """Return why the kernels cannot run on a device type of this machine, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {INSTALL}"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, and Triton needs 8.0 or newer"
    if device == "cpu" and interpreted():
        return None
    return f"the kernels need a CUDA device, and the tensors are on {device!r}"


def interpreted() -> bool:
    """Return whether kernels run on Triton's interpreter, on the host."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return knobs.runtime.interpret


def unsupported_reason(
    z: Tensor, short_weight: Tensor, long_filter: object, state: Tensor | None, reset: Tensor | None
) -> str | None:
    """Return why the kernels cannot evaluate the Hyena operator on these arguments, or None where they can.

    Args:
        z, short_weight, long_filter, reset: as in ``ops.hyena``; a reset is no reason.
        state: of the long filter, or None.
    """
    if z.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {z.dtype}"
    taps = short_weight.shape[-1]
    if not 1 <= taps <= MOST_SHORT_TAPS:
        return f"the kernels take short filters of 1 to {MOST_SHORT_TAPS} taps, not {taps}"
    if isinstance(long_filter, ExplicitFilter):
        reason = _explicit_reason(long_filter, z.shape[-1] // 3)
    elif isinstance(long_filter, ModalFilter | RealModalFilter):
        reason = _modal_reason(long_filter, z.shape[-1] // 3, state)
    else:
        reason = f"the kernels take filters of modes and of taps, not a {type(long_filter).__name__}"
    return reason or device_unsupported_reason(z.device.type)


def _explicit_reason(filter: ExplicitFilter, channels: int) -> str | None:
    if filter.taps.dtype not in DTYPES:
        return f"the kernels take taps of float32, bfloat16 or float16, not {filter.taps.dtype}"
    groups, count = filter.taps.shape
    if not 1 <= count <= MOST_TAPS:
        return f"the kernels take 1 to {MOST_TAPS} taps, not {count}"
    width = channels // groups
    if count > FEW_TAPS and width < NARROWEST_GROUP:
        return (
            f"more than {FEW_TAPS} taps are matrix products of a group of channels, and the kernels take groups of at "
            f"least {NARROWEST_GROUP}, not {width}"
        )
    return None


def _modal_reason(filter: ModalFilter | RealModalFilter, channels: int, state: Tensor | None) -> str | None:
    poles = filter.poles if isinstance(filter, ModalFilter) else filter.log_poles
    kind = torch.complex64 if isinstance(filter, ModalFilter) else torch.float32
    if poles.dtype != kind or filter.residues.dtype != kind:
        name = str(kind).removeprefix("torch.")
        return f"the kernels take {name} poles and residues for a {type(filter).__name__}, not {poles.dtype}"
    if poles.shape[0] != channels:
        return f"the kernels take one filter of modes per channel, not {poles.shape[0]} filters for {channels} channels"
    if state is not None and (not state.is_complex() if kind.is_complex else state.shape[-1] != poles.shape[1]):
        return (
            "the state is the window of a truncated filter: continue with truncated or auto, or start without a state"
        )
    modes, most = poles.shape[-1], MOST_MODES if kind.is_complex else 2 * MOST_MODES
    return None if 1 <= modes <= most else f"the kernels take 1 to {most} modes of this kind, not {modes}"


def decode_unsupported_reason(dtype: torch.dtype, head_dim: int, device: str) -> str | None:
    """Return why the decoding kernels cannot run a model of this dtype and head width, or None where they can."""
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if head_dim > WIDEST_HEAD:
        return f"the kernels take heads of at most {WIDEST_HEAD} channels, not {head_dim}"
    return device_unsupported_reason(device)


def can_overlap(device: torch.device) -> bool:
    """Return whether programmatic dependent launch works, see ``ops.triton.pdl``: on Hopper and newer GPUs."""
    if device.type != "cuda" or torch.version.hip is not None or interpreted():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def can_stream(device: torch.device) -> bool:
    """Return whether ``ops.triton.decode.streamed`` runs: on Hopper GPUs, whose instructions it is made of."""
    return can_overlap(device) and torch.cuda.get_device_capability(device) == (9, 0)
