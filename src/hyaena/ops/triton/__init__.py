"""Which problems the Triton kernels support, and where. This module needs no triton; the packages below import it.

``ops.triton.hyena`` has the kernels of the Hyena operator, ``ops.triton.decode`` those of a decoding step,
``ops.triton.pointwise`` norm, gate and rotary positions. Each names the plain function that it equals.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from hyaena.ops.long_conv import ModalFilter

MOST_MODES = 16
MOST_TAPS = 8
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
    if not (isinstance(long_filter, ModalFilter) and long_filter.poles.is_complex()):
        return f"the kernels take a filter of complex modes, one per channel, not a {type(long_filter).__name__}"
    if 3 * long_filter.poles.shape[0] != z.shape[-1]:
        count = long_filter.poles.shape[0]
        return f"the kernels take one filter per channel, not {count} filters for {z.shape[-1] // 3} channels"
    modes, taps = long_filter.poles.shape[-1], short_weight.shape[-1]
    if state is not None and not state.is_complex():
        return (
            "the state is the window of a truncated filter: continue with truncated or auto, or start without a state"
        )
    if z.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {z.dtype}"
    if long_filter.poles.dtype != torch.complex64 or long_filter.residues.dtype != torch.complex64:
        return f"the kernels take complex64 poles and residues, not {long_filter.poles.dtype}"
    if not 1 <= modes <= MOST_MODES or not 1 <= taps <= MOST_TAPS:
        return f"the kernels take 1 to {MOST_MODES} modes and 1 to {MOST_TAPS} taps, not {modes} and {taps}"
    return device_unsupported_reason(z.device.type)


def decode_unsupported_reason(dtype: torch.dtype, head_dim: int, device: str) -> str | None:
    """Return why the decoding kernels cannot run a model of this dtype and head width, or None where they can."""
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if head_dim > WIDEST_HEAD:
        return f"the kernels take heads of at most {WIDEST_HEAD} channels, not {head_dim}"
    return device_unsupported_reason(device)


def can_overlap(device: torch.device) -> bool:
    """Return whether programmatic dependent launch works, see ``ops.triton.decode.pdl``: on Hopper and newer GPUs."""
    if device.type != "cuda" or torch.version.hip is not None or interpreted():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
