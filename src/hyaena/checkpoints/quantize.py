"""A checkpoint -> a checkpoint with narrow weights, tensor by tensor: memory of one shard that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hyaena import files
from hyaena.arguments import as_text_path, kind_of, whole
from hyaena.checkpoints.files import COMPANIONS, INDEX, Checkpoint, files_of_checkpoint
from hyaena.checkpoints.load import Loading, as_dtype, check_scheme
from hyaena.checkpoints.save import (
    WAIT,
    apart,
    check_extra_files,
    check_folder,
    config_text,
    save_failed,
    shard_names,
    write_bytes,
    write_tensors,
)
from hyaena.checkpoints.weights import Weights, open_weights
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, InputError
from hyaena.layers import MIXERS
from hyaena.model import StripedHyena


def quantize_checkpoint(
    checkpoint: Checkpoint,
    folder: str | PathLike[str],
    weights: str,
    *,
    dtype: str | torch.dtype | None = None,
    moments: Mapping[str, Tensor] | None = None,
    max_shard_size: int = 1_000_000_000,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a checkpoint in our layout whose linear layers are narrow. The model is never in memory as a whole.

    Args:
        checkpoint: with weights that are not narrow, in any layout that ``load_model`` reads.
        folder: made if it is not there.
        weights: a scheme of ``schemes.SCHEMES``.
        dtype: of everything else; as it is stored unless given. Poles and residues stay float32.
        moments: second moments of the inputs of linear layers by name, see ``quant.collect_moments``.
        max_shard_size: bytes above which another file is begun; so much is in memory, and one tensor as it is read.
        extra_files: further files that go with the model, name -> content.
        overwrite: whether the folder may hold files already.

    Raises:
        InputError: an unknown scheme, one that does not fit the sizes, or weights that are narrow already.
        CheckpointError: as ``load_model`` and ``save_model``; what lay in the folder is as it was.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise InputError(f"checkpoint must be one that checkpoints.find found, not {kind_of(checkpoint)}")
    if moments is not None and not isinstance(moments, Mapping):
        raise InputError(f"moments must be a mapping from quant.collect_moments, not {kind_of(moments)}")
    folder = as_text_path("the folder", folder, "safetensors")
    limit = whole("max_shard_size", max_shard_size, "a whole number of bytes, 1 or more", 1)
    check_extra_files(extra_files or {})
    check_quantizable(checkpoint, weights)
    config, wanted = replace(checkpoint.config, weights=weights), as_dtype(dtype)

    def fill(stage: Path) -> set[str]:
        check_folder(folder, overwrite)
        with open_weights(checkpoint) as opened:
            writer = _Writer(stage, limit)
            _Stream(checkpoint, opened, wanted, weights, moments or {}, writer).run()
            writer.finish(folder, config, wanted or opened.dtype)
        for name, content in (extra_files or {}).items():
            write_bytes(stage / name, content)
        return files_of_checkpoint(folder) | set(() if extra_files is None else COMPANIONS)

    try:
        files.update_folder(folder, fill, wait=WAIT)
    except (OSError, SafetensorError) as error:
        raise save_failed(folder, error) from error
    except CheckpointError:
        checkpoint.check_unchanged()
        raise
    return folder


def check_quantizable(checkpoint: Checkpoint, weights: str) -> None:
    """Check that a checkpoint can be given narrow weights; none of its own are read.

    Raises:
        InputError: an unknown scheme, one that does not fit the sizes, or weights that are narrow already.
    """
    check_scheme(checkpoint, weights)
    if checkpoint.config.weights is not None:
        raise InputError(f"{checkpoint.path}: has {weights} weights already: there is nothing to do")
    with torch.device("meta"):
        StripedHyena(replace(checkpoint.config, weights=weights))


class _Writer:
    """Tensors into files of a limited size, in the order in which they come."""

    def __init__(self, stage: Path, limit: int) -> None:
        self.stage, self.limit = stage, limit
        self.waiting: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        size = sum(t.nbytes for t in tensors.values())
        if self.waiting and sum(t.nbytes for t in self.waiting.values()) + size > self.limit:
            self._flush()
        self.waiting |= apart(tensors)
        self.total += size

    def _flush(self) -> None:
        write_tensors(self._path(len(self.shards)), self.waiting)
        self.shards.append(list(self.waiting))
        self.waiting = {}

    def _path(self, shard: int) -> Path:
        return self.stage / f"shard-{shard}.safetensors"

    def finish(self, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        """Write what waits, give the files their names, and write configuration and index."""
        self._flush()
        config_file = self.stage / "config.json"
        write_bytes(config_file, config_text(config, "hyaena", dtype).encode())
        names = shard_names(folder, len(self.shards))
        for i, name in enumerate(names):
            self._path(i).rename(self.stage / name)
            shutil.copymode(config_file, self.stage / name)
        if len(names) > 1:
            weight_map = {key: name for name, keys in zip(names, self.shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            write_bytes(self.stage / INDEX, json.dumps(index, indent=1).encode())


class _Stream(Loading):
    """A load whose tensors are written and let go; the embedding and buffers are kept, which it looks at again."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        opened: Weights,
        dtype: torch.dtype | None,
        scheme: str,
        moments: Mapping[str, Tensor],
        writer: _Writer,
    ) -> None:
        super().__init__(checkpoint, opened, torch.device("cpu"), dtype, MIXERS, scheme=scheme, moments=moments)
        self.writer = writer

    def _put(self, name: str, tensor: Tensor) -> None:
        owner = name.rpartition(".")[0]
        if name in self.to_narrow:
            super()._put(name, tensor)
            layer = self.to_narrow[name]
            self.writer.add({f"{owner}.{leaf}": buffer for leaf, buffer in layer.named_buffers()})
            layer.to("meta")
            return
        if name == "embed_tokens.weight" or not isinstance(self.expected[name], torch.nn.Parameter):
            super()._put(name, tensor)
        self.writer.add({name: tensor.detach()})
