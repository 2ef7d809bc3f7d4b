"""GGUF files, as a storage format for models of this package: no program of llama.cpp runs them.

The container is written and read by gguf-py (extra ``gguf``). It holds our configuration as JSON under the key
``hyaena.config``, and every tensor under our name. A narrow weight of a scheme q8_0 or q4_0 is one tensor of GGUF's
blocks of 32 numbers:

    Q8_0: float16 scale, 32 int8;    Q4_0: float16 scale, 16 bytes, byte j with number j (low) and j + 16 (high)

which are the codes and the scales of the scheme, interleaved. Nothing is rounded in either direction.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks are those of ``ggml-common.h``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hyaena.errors import CheckpointError
from hyaena.extras import require
from hyaena.tensor_files.stored import StoredTensor, section

SUFFIX = ".gguf"
CONFIG_KEY = "hyaena.config"
ARCHITECTURE = "hyaena-stripedhyena"

BLOCKS = {"q8_0": ("Q8_0", 8), "q4_0": ("Q4_0", 4)}
"""Schemes that GGUF has blocks of: the type's name there, and the bits of a number."""

_BLOCK = 32
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_gguf(path: Path, file: IO[bytes]) -> dict[str, StoredTensor]:
    """The tensors of a file; a tensor ``X.weight`` of blocks is ``X.codes`` and ``X.scale``."""
    found: dict[str, StoredTensor] = {}
    size = file.seek(0, os.SEEK_END)
    for tensor in _reader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        begin, nbytes, kind = int(tensor.data_offset), int(tensor.n_bytes), tensor.tensor_type.name
        if begin + nbytes > size:
            raise EOFError(f"{tensor.name} ends after the end of the file")
        where = section(file, begin, nbytes)
        if kind in _DTYPES:
            found[tensor.name] = StoredTensor(_DTYPES[kind], shape, _stride(shape), 0, where)
            continue
        bits = next((bits for name, bits in BLOCKS.values() if name == kind), None)
        if bits is None or len(shape) != 2 or shape[1] % _BLOCK or not tensor.name.endswith(".weight"):
            found[tensor.name] = StoredTensor(kind, shape, _stride(shape), 0, where)  # refused where it is read
            continue
        owner = tensor.name.removesuffix("weight")
        codes, scale = (shape[0], shape[1] * bits // 8), (shape[0], shape[1] // _BLOCK)
        code = torch.int8 if bits == 8 else torch.uint8
        found[f"{owner}codes"] = _BlockPart(code, codes, _stride(codes), 0, where)
        found[f"{owner}scale"] = _BlockPart(torch.float16, scale, _stride(scale), 0, where)
    return found


def read_gguf_config(path: Path) -> str:
    """The configuration in a file, JSON.

    Raises:
        CheckpointError: it is not a GGUF file, or not one of this package.
        UnsupportedError: the package that reads it is missing.
    """
    check_gguf()
    try:
        field = _reader(path).fields.get(CONFIG_KEY)
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(
            f"{path}: is no GGUF file, or is damaged: write it again ({type(error).__name__})"
        ) from error
    if field is None:
        raise CheckpointError(
            f"{path}: holds no configuration of hyaena: name a file that `hyaena convert --layout gguf` wrote"
        )
    return str(field.contents())


def write_gguf(path: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    """Write tensors under our names; those of narrow weights of a scheme of ``BLOCKS`` as blocks."""
    check_gguf()
    import gguf  # pyright: ignore[reportMissingImports]

    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(CONFIG_KEY, config)
    kinds = {dtype: gguf.GGMLQuantizationType[name] for name, dtype in _DTYPES.items()}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "codes":
            blocks, name = _blocks(tensor, tensors[f"{owner}.scale"]), f"{owner}.weight"
            kind = gguf.GGMLQuantizationType["Q8_0" if tensor.dtype == torch.int8 else "Q4_0"]
            writer.add_tensor(name, blocks.numpy(), raw_dtype=kind)
        elif leaf != "scale" or f"{owner}.codes" not in tensors:
            raw = tensor.contiguous().reshape(tensor.shape or (1,))
            writer.add_tensor(name, raw.view(torch.uint8).numpy(), raw_dtype=kinds[tensor.dtype])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes and scales interleaved: uint8 [E,G·(2 + bytes of 32 numbers)]."""
    groups = scale.shape[1]
    parts = (
        scale.contiguous().view(torch.uint8).unflatten(1, (groups, 2)),
        codes.view(torch.uint8).unflatten(1, (groups, -1)),
    )
    return torch.cat(parts, dim=2).flatten(1).contiguous()


@dataclass(frozen=True)
class _BlockPart(StoredTensor):
    """The scales (float16) or the codes (integers) of a tensor of blocks."""

    def read(self) -> Tensor:
        assert isinstance(self.dtype, torch.dtype)
        raw = StoredTensor(torch.uint8, (self.storage.nbytes,), (1,), 0, self.storage).read()
        rows = self.shape[0]
        blocks = raw.view(rows, -1)
        groups = self.shape[1] if self.dtype == torch.float16 else self._groups(blocks.shape[1])
        blocks = blocks.unflatten(1, (groups, -1))
        part = blocks[..., :2] if self.dtype == torch.float16 else blocks[..., 2:]
        return part.flatten(1).contiguous().view(self.dtype)

    def _groups(self, row_bytes: int) -> int:
        return (row_bytes - self.shape[1]) // 2


def check_gguf() -> None:
    """Check that the package is there that reads and writes these files.

    Raises:
        UnsupportedError: it is not.
    """
    require("gguf", extra="gguf", purpose="a GGUF file")


def _reader(path: Path) -> Any:
    check_gguf()
    import gguf  # pyright: ignore[reportMissingImports]

    return gguf.GGUFReader(path)


def _stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())
