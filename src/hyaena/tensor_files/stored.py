"""A tensor as a weights file describes it, and how its numbers are read.

Numbers are read with plain reads, never mapped: a tensor is in memory of its own, and a file that shrinks meanwhile is
an error, not a crash.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from hyaena.errors import CheckpointError
from hyaena.tensor_files import memory

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Storage:
    """A run of bytes in a weights file, which one or more tensors are made of.

    Attributes:
        nbytes: its length.
        open: opens it; reading it to its end checks it, where the format has checksums.
    """

    nbytes: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class StoredTensor:
    """What a file says about a tensor.

    Attributes:
        dtype: as it is stored; text where torch has no such dtype.
        shape: its sizes.
        stride: elements from one index to the next, per dimension.
        offset: elements of the storage before the first.
        storage: where its numbers are.
    """

    dtype: torch.dtype | str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers; 0 for a dtype that torch has not."""
        return math.prod(self.shape) * self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 0

    def read(self) -> Tensor:
        """The tensor itself, contiguous and in memory of its own."""
        assert isinstance(self.dtype, torch.dtype)
        buffer = memory.empty((self.storage.nbytes // self.dtype.itemsize * self.dtype.itemsize,), torch.uint8)
        content = memoryview(buffer.numpy())  # type: ignore[arg-type]
        with self.storage.open() as file:
            for start in range(0, len(content), _CHUNK):
                part = content[start : start + _CHUNK]
                if file.readinto(part) != len(part):  # type: ignore[attr-defined]
                    raise EOFError("it is shorter than its table of contents says")
        flat = buffer.view(self.dtype)
        tensor = flat.as_strided(self.shape, self.stride, self.offset)
        return tensor if tensor.is_contiguous() and tensor.numel() == flat.numel() else tensor.contiguous().clone()


def section(file: IO[bytes], start: int, nbytes: int) -> Storage:
    """``nbytes`` bytes of an open file, from ``start`` on."""

    def opened() -> IO[bytes]:
        file.seek(start)
        return _Borrowed(file)  # type: ignore[return-value]

    return Storage(nbytes, opened)


class _Borrowed:
    """An open file that stays open after ``with``."""

    def __init__(self, file: IO[bytes]) -> None:
        self.readinto = file.readinto  # type: ignore[attr-defined]

    def __enter__(self) -> _Borrowed:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_regular(path: Path, wanted: str = "a weights file or a folder") -> IO[bytes]:
    """Open a regular file for reading; anything else is refused before it is opened, which could wait for ever.

    Raises:
        CheckpointError: it is not there, cannot be read, or is a folder, a device, a FIFO or a socket.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file: name {wanted}")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
