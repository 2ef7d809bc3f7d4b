"""One weights file: its names, and its tensors one at a time.

Both kinds are memory-mapped, so that opening a file costs nothing and a tensor that is not asked for is never read.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hyaena.errors import CheckpointError

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Names under which training programs put the weights beside an optimiser's state."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Shard(Protocol):
    """What can be asked of an open weights file."""

    def keys(self) -> list[str]:
        """Names of its tensors, in the file's order."""
        ...

    def dtype(self, key: str) -> torch.dtype | None:
        """The stored dtype, without reading the tensor; None if it is not a floating-point one."""
        ...

    def tensor(self, key: str) -> Tensor:
        """A tensor on the CPU; it may lie in the mapped file, so copy what is to be kept."""
        ...


class _Safetensors:
    def __init__(self, file: Any) -> None:
        self._file = file

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def dtype(self, key: str) -> torch.dtype | None:
        return _DTYPES.get(self._file.get_slice(key).get_dtype())

    def tensor(self, key: str) -> Tensor:
        return self._file.get_tensor(key)


class _Torch:
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def keys(self) -> list[str]:
        return list(self._state)

    def dtype(self, key: str) -> torch.dtype | None:
        dtype = self._state[key].dtype
        return dtype if dtype in _DTYPES.values() else None

    def tensor(self, key: str) -> Tensor:
        return self._state[key]


@contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """Open a ``.safetensors`` file or one written by ``torch.save``; no code in it is ever run.

    Raises:
        CheckpointError: the file is truncated or corrupt, wants to run code, or holds no tensors. Also when reading
            a tensor inside the ``with`` block fails.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                yield _Safetensors(file)
        else:
            yield _Torch(_torch_state(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error


def _torch_state(path: Path) -> dict[str, Tensor]:
    mapped = zipfile.is_zipfile(path)  # files from before PyTorch 1.6 are not, and cannot be mapped
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # what `_extra_state` entries are made of
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle may raise anything
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error
        raise CheckpointError(
            f"{path}: wants to run code ({wanted[1]}), and only plain tensors are loaded: "
            "save it again as a state dict, or as safetensors"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    state = {str(key): value for key, value in loaded.items() if not str(key).endswith("_extra_state")}
    if strange := [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: not tensors: {', '.join(strange)}: save model.state_dict() alone")
    return state


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the weights themselves: run `git lfs pull` there"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"truncated or corrupt: download or write it again ({reason[:200]})"
