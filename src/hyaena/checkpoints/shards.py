"""One weights file: the names, dtypes and shapes of its tensors, and the tensors one at a time.

Opening a file reads its table of contents only.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from hyaena.checkpoints.parts import JoinedFile, whole_name
from hyaena.errors import CheckpointError, UnsupportedError, printable
from hyaena.tensor_files.gguf_file import SUFFIX as GGUF
from hyaena.tensor_files.gguf_file import read_gguf
from hyaena.tensor_files.pickles import read_legacy, read_zip
from hyaena.tensor_files.safetensors_file import read_safetensors
from hyaena.tensor_files.stored import StoredTensor, open_regular

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a model's weights may have."""


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
                tensors = read_safetensors(file)[0]
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
