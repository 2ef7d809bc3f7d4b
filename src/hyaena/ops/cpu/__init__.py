"""Kernels of a decoding step for CPUs, compiled by numba: one to a few rows, at the bandwidth of memory."""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels take."""


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot decode for a model of this dtype on a CPU, or None. Does not import numba."""
    if dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not _has_numba():
        return "numba, which compiles the kernels, is missing: pip install 'hyaena[cpu]'"
    return None


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None
