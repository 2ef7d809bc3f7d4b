"""Which files make up a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError
from hyaena.formats import read_config

INDEX_SUFFIX = ".index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_PREFERRED = (
    "model.safetensors.index.json",  # before the single file: a save replaces the index last (see save.py)
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch-model.bin",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Checkpoint:
    """A configuration and the files that hold its weights.

    Attributes:
        path: what the user named; it begins every message.
        config: the architecture.
        shards: the weights files, read one after another.
    """

    path: Path
    config: ModelConfig
    shards: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where the weights lie; tokenizer files are looked for here."""
        return self.shards[0].parent


def find(path: str | PathLike[str], config: ModelConfig | str | PathLike[str] | None = None) -> Checkpoint:
    """The checkpoint in a folder, or the one that a weights file (or the index of a sharded one) belongs to.

    Args:
        path: a folder, a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, or a ``….index.json``.
        config: a configuration or the path of one; by default, the configuration that lies beside the weights.

    Raises:
        CheckpointError: there are no weights there, or more than one candidate, or shards are missing.
        ConfigError: there is no configuration, or it cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder: check the path")
    weights = _weights_in(path) if path.is_dir() else path
    if weights.name.endswith(INDEX_SUFFIX):
        shards = _shards_of(weights)
    elif weights.suffix == ".safetensors" or weights.suffix in TORCH_SUFFIXES:
        shards = (weights,)
    else:
        raise CheckpointError(f"{path}: not a weights file: name a folder, or a .safetensors, .bin, .pt or .pth file")
    if not isinstance(config, ModelConfig):
        config = read_config(config if config is not None else find_config(weights.parent))
    return Checkpoint(path, config, shards)


def find_config(folder: Path) -> Path:
    """The configuration in a folder: ``config.json``, ``config.yml``, or the only YAML file there is."""
    for name in ("config.json", "config.yml", "config.yaml"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in (".yml", ".yaml") and file.is_file())
    if not found:
        raise ConfigError(f"{folder}: no config.json and no config.yml beside the weights: name one with config=")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigError(f"{folder}: several configurations ({names}): name one with config=")
    return found[0]


def has_weights(folder: Path) -> bool:
    """Whether anything in a folder looks like weights, or like the index of some."""
    suffixes = (".safetensors", *TORCH_SUFFIXES, INDEX_SUFFIX)
    return any(file.name.endswith(suffixes) for file in folder.iterdir())


def _weights_in(folder: Path) -> Path:
    for name in _PREFERRED:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        found = [file for file in files if file.suffix in suffixes]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{folder}: several weights files and no index ({names}): name one of them")
    raise CheckpointError(f"{folder}: no weights here: expected model.safetensors or pytorch-model.bin")


def _shards_of(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: not an index of shards, or truncated: download it again") from None
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: names shards outside its own folder, or none: download it again")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: shards are missing ({', '.join(missing)}): download them")
    return tuple(index.parent / name for name in names)
