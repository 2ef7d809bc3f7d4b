"""safetensors files: 8 bytes of length, a header of JSON, and the tensors without gaps.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import IO, Any

import torch

from hyaena.errors import CheckpointError
from hyaena.tensor_files.stored import StoredTensor, section

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

MAX_HEADER = 4_000_000
"""Bytes of the largest header of a model's file that is read: some forty thousand tensors."""

MOST_HEADER = 100_000_000
"""Bytes of the largest header of any file, which its writer has, too."""


def read_safetensors(
    file: IO[bytes], *, max_header: int = MAX_HEADER
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors of a file, and the metadata beside them: what stands there, unchecked.

    Raises:
        Exception: of many kinds; the file is damaged.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise EOFError(f"its header would have {length:,} bytes, and the file has {size:,}")
    if length > max_header:
        raise CheckpointError(f"its header has {length / 1e6:.0f} MB, more than any model needs: write it again")
    header = json.loads(file.read(length), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    metadata = header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError(f"its entry for {name} is not one of a tensor")
        known = SAFETENSORS_DTYPES.get(dtype, dtype)
        if isinstance(known, torch.dtype) and math.prod(shape) * known.itemsize != end - begin:
            raise ValueError(f"the shape of {name} does not fit its {end - begin} bytes")
        spans.append((begin, end))
        tensors[name] = StoredTensor(
            known, tuple(shape), contiguous_stride(shape), 0, section(file, 8 + length + begin, end - begin)
        )
    position = 0
    for begin, end in sorted(spans):
        if begin != position or end < begin:
            raise ValueError("its tensors overlap, or leave gaps")
        position = end
    if position != size - 8 - length:
        raise ValueError(f"its tensors have {position:,} bytes, and {size - 8 - length:,} are there")
    return tensors, metadata if isinstance(metadata, dict) else {}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of a JSON object, in which no name may be written twice: one of the two would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is written twice in it")
    return values


def contiguous_stride(shape: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Strides of a tensor that is stored in the order of its indices."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
