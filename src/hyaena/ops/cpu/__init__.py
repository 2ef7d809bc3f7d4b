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


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 numbers, which torch uses: AMX, AVX-512 BF16,
    or those of ARM. Others widen every number first, which makes prefill slower than in float32.
    """
    return _has("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


@functools.cache
def multiplies_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 numbers (AMX), which torch's products use."""
    return _has("amx_bf16")


def _has(*names: str) -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return any(capabilities.get(name, False) for name in names)


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None
