"""One weights file: the names, dtypes and shapes of its tensors, and the tensors one at a time.

Opening a file reads its table of contents only.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hyaena.checkpoints.parts import JoinedFile, whole_name
from hyaena.errors import CheckpointError, UnsupportedError, printable
from hyaena.tensor_files.gguf_file import SUFFIX as GGUF
from hyaena.tensor_files.gguf_file import read_gguf
from hyaena.tensor_files.pickles import read_legacy, read_zip
from hyaena.tensor_files.stored import StoredTensor, section

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a model's weights may have."""

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
"""Bytes of the largest header of a safetensors file that is read: some forty thousand tensors."""


class Shard:
    """An open weights file.

    Attributes:
        path: of the file; where it is split, the name of the whole.
        tensors: name -> what the file says about the tensor, in the file's order.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path, self.tensors = path, tensors

    def read(self, key: str) -> Tensor:
        """A tensor on the CPU, as it is stored.

        Raises:
            CheckpointError: the file is damaged there.
        """
        with _reading(self.path):
            return self.tensors[key].read()


@contextmanager
def open_shard(path: Path, *parts: Path) -> Iterator[Shard]:
    """Open a ``.safetensors`` or ``.gguf`` file or one written by ``torch.save``; no code in it is ever run.

    Args:
        path: of the file, or of its first part.
        parts: the paths of its other parts, in order.

    Raises:
        CheckpointError: the file is not a regular one, is truncated or corrupt, would run code, or has no tensors.
    """
    with open_parts(path, *parts) as file:
        path = path.with_name(whole_name(path.name))
        with _reading(path):
            if path.suffix == ".safetensors":
                tensors = _read_safetensors(file)
            elif path.suffix == GGUF:
                tensors = read_gguf(path, file)
            elif zipfile.is_zipfile(file):
                tensors = read_zip(file)
            else:  # from before PyTorch 1.6
                file.seek(0)
                tensors = read_legacy(file)
        yield Shard(path, tensors)


def open_parts(path: Path, *parts: Path) -> IO[bytes]:
    """Open a regular file for reading, or several as one; see ``open_regular``."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_regular(part)) for part in (path, *parts)]
        stack.pop_all()
    return files[0] if len(files) == 1 else io.BufferedReader(JoinedFile(files))


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; anything else is refused before it is opened, which could wait for ever.

    Raises:
        CheckpointError: it is not there, cannot be read, or is a folder, a device, a FIFO or a socket.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file: name a weights file or a folder")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into one line."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except UnsupportedError:  # a package that reads such files is missing
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle or archive may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        if not path.exists():
            raise CheckpointError(
                f"{path}: its parts are cut short, damaged, or not all there: download them again "
                f"({printable(why, limit=200)})"
            ) from error
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    f"{path}: is a pointer of git-lfs, not the weights themselves: run `git lfs pull` there"
                ) from None
        raise CheckpointError(
            f"{path}: truncated or corrupt: download or write it again ({printable(why, limit=200)})"
        ) from error


# --- safetensors -----------------------------------------------------------------------------------------------------


def _read_safetensors(file: IO[bytes]) -> dict[str, StoredTensor]:
    """The header of a safetensors file: 8 bytes of length, then JSON; the tensors follow without gaps.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise EOFError(f"its header would have {length:,} bytes, and the file has {size:,}")
    if length > MAX_HEADER:
        raise CheckpointError(f"its header has {length / 1e6:.0f} MB, more than any model needs: write it again")
    header = json.loads(file.read(length), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    header.pop("__metadata__", None)
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
    return tensors


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of a JSON object, in which no name may be written twice: one of the two would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is written twice in it")
    return values


def contiguous_stride(shape: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Strides of a tensor that is stored in the order of its indices."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
