"""A model -> a folder that holds a whole checkpoint at every moment.

Everything is first written into a temporary folder inside the target and flushed to the disk; only then are files
moved into place. The last move is the one that makes the new weights the folder's weights (the index of a sharded
checkpoint, the file of a single one), so a full disk or a lost machine leaves the previous checkpoint.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hyaena.checkpoints.load import dtype_of
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError
from hyaena.formats.stripedhyena import tensors as original
from hyaena.formats.stripedhyena.config import write_config
from hyaena.model import StripedHyena

Layout = Literal["hyaena", "original"]
CONFIG_NAMES: dict[Layout, str] = {"hyaena": "config.json", "original": "config.yml"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_UNFINISHED = ".unfinished-"


def save_model(
    model: StripedHyena,
    folder: str | PathLike[str],
    *,
    layout: Layout = "hyaena",
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5_000_000_000,
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a model as a folder that ``load_model`` reads, replacing the checkpoint that was there, if any.

    Args:
        model: its weights may lie on any device.
        folder: made if it is not there; files of other names in it are left alone.
        layout: ``"hyaena"`` (``config.json``, our names) or ``"original"`` (``config.yml``, the original's names).
        dtype: cast the weights on the way; poles and residues stay float32.
        max_shard_size: bytes above which the weights are split over several files.
        extra_files: more files to write with it, such as ``tokenizer.json``.

    Raises:
        CheckpointError: it could not be written; the previous checkpoint is as it was.
    """
    folder = Path(folder)
    if layout not in CONFIG_NAMES:
        raise CheckpointError(f"layout {layout!r} is unknown: choose one of {', '.join(CONFIG_NAMES)}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError("the model is on the meta device and has no weights to save: load them first")
    shards = _split(model, layout, dtype, max_shard_size)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_UNFINISHED}*"):  # of a process that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as temporary:
            _write(Path(temporary), folder, shards, model, layout, dtype, extra_files or {})
    except (OSError, SafetensorError) as error:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: could not save ({reason}); nothing there is lost: free some space or choose another folder"
        ) from error
    return folder


def _split(model: StripedHyena, layout: Layout, dtype: torch.dtype | None, limit: int) -> list[list[str]]:
    """Our names, in order, cut into runs of at most ``limit`` bytes (a larger tensor has a shard of its own)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in model.state_dict().items():
        nbytes = tensor.numel() * _dtype_of(name, tensor, dtype).itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _dtype_of(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return tensor.dtype if dtype is None else dtype_of(name, dtype)


def _write(
    temporary: Path,
    folder: Path,
    shards: list[list[str]],
    model: StripedHyena,
    layout: Layout,
    dtype: torch.dtype | None,
    extra_files: Mapping[str, bytes],
) -> None:
    config, state = model.config, model.state_dict()
    names = _shard_names(folder, len(shards))
    weight_map: dict[str, str] = {}
    total = 0
    for file, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].to("cpu", _dtype_of(key, state[key], dtype)) for key in keys}
        if layout == "original":
            tensors = dict(original.to_theirs(key, tensor, config) for key, tensor in tensors.items())
            if file == names[-1]:
                name, embedding = "embed_tokens.weight", state["embed_tokens.weight"]
                embedding = embedding.to("cpu", _dtype_of(name, embedding, dtype))
                tensors |= original.extra_tensors({name: embedding}, config)
        tensors = {key: _alone(tensor) for key, tensor in tensors.items()}
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        _write_tensors(temporary / file, tensors)
    _write_bytes(temporary / CONFIG_NAMES[layout], _config_text(config, layout).encode())
    for name, content in extra_files.items():
        _write_bytes(temporary / name, content)
    sharded = len(shards) > 1
    if sharded:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_bytes(temporary / INDEX, json.dumps(index, indent=1).encode())
    for file in names:  # safetensors makes its files private; these are as readable as the others
        shutil.copymode(temporary / CONFIG_NAMES[layout], temporary / file)

    # From here on, nothing needs space. The decisive move comes last.
    decisive = INDEX if sharded else SINGLE
    for file in [*(names if sharded else []), *extra_files, CONFIG_NAMES[layout], decisive]:
        os.replace(temporary / file, folder / file)
    _flush_folder(folder)
    # An index, which would win over a single file, goes before the shards that it names.
    other_config = CONFIG_NAMES["original" if layout == "hyaena" else "hyaena"]
    old_shards = sorted(file.name for file in folder.glob("model*-of-*.safetensors") if file.name not in names)
    for name in [SINGLE if sharded else INDEX, other_config, *old_shards]:
        (folder / name).unlink(missing_ok=True)
    _flush_folder(folder)


def _shard_names(folder: Path, count: int) -> list[str]:
    """Names that no file in the folder has, so that the shards of the previous checkpoint stay until the end."""
    if count == 1:
        return [SINGLE]
    stems = itertools.chain(["model"], (f"model{i}" for i in itertools.count(2)))
    stem = next(stem for stem in stems if not any(folder.glob(f"{stem}-*-of-*.safetensors")))
    return [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _config_text(config: ModelConfig, layout: Layout) -> str:
    if layout == "hyaena":
        return json.dumps(config.to_dict(), indent=2) + "\n"
    import yaml

    return yaml.safe_dump(write_config(config), sort_keys=False, default_flow_style=None, width=120)


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, and without a larger storage behind it, as safetensors wants it."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as file:  # a file that was cut short cannot be opened
        assert set(file.keys()) == set(tensors)
    _flush(path)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _flush(path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
