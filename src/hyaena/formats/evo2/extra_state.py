"""The FP8 scales in a layer's ``_extra_state``, as Transformer Engine 1.x writes it; nothing in it is executed.

Such a state is the bytes of a dictionary that ``torch.save`` wrote. ``scale_fwd`` holds the scales of input, weight and
output, by which numbers are multiplied before they are rounded to e4m3. The rest belongs to training: histories of
largest values, the scales of gradients, settings.

Source: NVIDIA, Transformer Engine 1.13, ``module/base.py``, ``get_extra_state``.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from hyaena.errors import CheckpointError, printable
from hyaena.tensor_files.pickles import read_small

_MAX = 1_000_000
"""Bytes of the largest state that is read; those of Evo 2 have a few kilobytes."""
_LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")
"""What ``torch.save`` began a file with before PyTorch 1.6, in its first pickle."""
_HISTORY = 16
"""Largest values that Evo 2's recipe remembers."""
_BACKWARD = 2
"""Scales of gradients: of the output's and of the input's."""
_MOST_SCALES = 64


def read_scales(content: bytes) -> tuple[float, float]:
    """The scales of a layer's input and of its weight; both are 1 where the state is empty, as of a layer without FP8.

    Args:
        content: of the state.

    Raises:
        CheckpointError: it is damaged, holds no usable scales, names code, or is of Transformer Engine 2.
    """
    if not content:
        return 1.0, 1.0
    if len(content) > _MAX:
        raise CheckpointError(f"has {len(content):,} bytes, more than any FP8 state: download the file again")
    if content.startswith(b"\x80") and _LEGACY not in content[:16]:
        raise CheckpointError(
            "is a pickle, as Transformer Engine 2 writes it, and only states of 1.x are read: save the checkpoint "
            "where 1.x is installed, or take the published one"
        )
    try:
        stored = read_small(content).get("scale_fwd")
        if stored is None:
            raise CheckpointError("holds no scale_fwd: take the file as it was published")
        if stored.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16) or len(stored.shape) != 1:
            raise CheckpointError(f"holds a scale_fwd of {stored.dtype} {list(stored.shape)}, not one float per tensor")
        if not 2 <= stored.shape[0] <= _MOST_SCALES:
            raise CheckpointError(f"holds {stored.shape[0]} scales, not those of input, weight and output")
        input_scale, weight_scale = stored.read().float()[:2].tolist()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle or archive may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"is damaged: download the file again ({printable(why, limit=200)})") from error
    for scale in (input_scale, weight_scale):
        if not 2.0**-126 <= scale <= 2.0**126:  # those whose inverse is a float32, too
            raise CheckpointError(f"holds the scale {scale}, which is none: take the file as it was published")
    return input_scale, weight_scale


def write_scales(input_scale: float, weight_scale: float) -> bytes:
    """A state that Transformer Engine 1.x loads, and :func:`read_scales` reads.

    The largest values seen are those that the scales stand for, ``448 / scale``; gradients have the scale 1.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    forward = torch.tensor([input_scale, weight_scale, 1.0], **options)
    seen = torch.tensor([448 / input_scale, 448 / weight_scale, 0.0], **options)
    backward = torch.ones(_BACKWARD, **options)
    state = {
        "scale_fwd": forward,
        "scale_inv_fwd": 1 / forward,
        "amax_history_fwd": seen.repeat(_HISTORY, 1),
        "scale_bwd": backward,
        "scale_inv_bwd": 1 / backward,
        "amax_history_bwd": torch.zeros(_HISTORY, _BACKWARD, **options),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": 448.0, "fp8_max_bwd": 57344.0},
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
