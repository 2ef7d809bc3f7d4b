"""Which files make up a checkpoint."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from hyaena import files
from hyaena.arguments import as_path
from hyaena.checkpoints.known import recognise
from hyaena.checkpoints.parts import grouped, parts_of, whole_name
from hyaena.checkpoints.shards import open_parts
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError, printable
from hyaena.formats import config_from_dict, read_config
from hyaena.tensor_files.gguf_file import SUFFIX as GGUF
from hyaena.tensor_files.gguf_file import read_gguf_config
from hyaena.tensor_files.safetensors_file import unique_keys
from hyaena.tensor_files.stored import open_regular

INDEX_SUFFIX = ".index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (
    INDEX,
    SINGLE,
    "pytorch_model.bin.index.json",
    "pytorch-model.bin.index.json",
    "pytorch-model.bin",
    "pytorch_model.bin",
    "model.pt",
    "model.gguf",
)
"""Names under which programs write the weights of a model; a folder may have one of them."""

CONFIGS = ("config.json", "config.yml", "config.yaml")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that go with a model's weights and configuration."""

_MAX_INDEX = 4_000_000
_PART = re.compile(r".*-\d+-of-\d+\.\w+")
_EMBEDDINGS = (b"embed_tokens.weight", b"embedding_layer.weight")
_RUN_STATE, _RUN_METRICS = "last.pt", "metrics.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """A configuration and the files that its weights are in.

    Attributes:
        path: what the user named; it begins every message.
        config: the architecture.
        shards: the weights files, read one after another; where one is split, its parts.
        weight_map: where the files have an index: tensor -> file name, as it says.
    """

    path: Path
    config: ModelConfig
    shards: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = field(default=None, repr=False, compare=False)
    state: frozenset[tuple[str, int, int, int]] = field(default=frozenset(), repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """Where the weights are; tokenizer files are looked for here."""
        return self.shards[0].parent

    def check_unchanged(self) -> None:
        """Refuse a checkpoint whose files were replaced since it was found: old and new ones may have been read.

        Raises:
            CheckpointError: they were.
        """
        if self.state != _state(self.folder, self.shards):
            raise CheckpointError(f"{self.path}: was replaced while it was being read: load it again")


def find(path: str | PathLike[str], config: ModelConfig | str | PathLike[str] | None = None) -> Checkpoint:
    """The checkpoint in a folder, or the one that a weights file (or the index of a sharded one) belongs to.

    Args:
        path: a folder, a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, a part of one (``….pt.part0``), or a
            ``….index.json``.
        config: a configuration or the path of one; by default, the configuration that lies beside the weights.

    Raises:
        CheckpointError: there are no weights there, or more than one candidate, or shards are missing.
        ConfigError: there is no configuration, or it cannot be used.
    """
    path = as_path("the model", path)
    is_folder = _is_folder(path)
    folder = path if is_folder else path.parent
    files.finish_update(folder)
    weights = _weights_in(path) if is_folder else path.with_name(whole_name(path.name))
    weight_map = None
    shards = _files_of(weights)
    if weights.name.endswith(INDEX_SUFFIX):
        weight_map = read_index(weights)
        shards = _shards_of(weights, weight_map)
    elif weights.suffix not in (".safetensors", GGUF, *TORCH_SUFFIXES):
        raise CheckpointError(
            f"{path}: not a weights file: name a folder, or a .safetensors, .bin, .pt, .pth or .gguf file"
        )
    elif is_run(weights):
        raise CheckpointError(_run_message(folder))
    state = _state(folder, shards)
    if not isinstance(config, ModelConfig):
        config = read_config(config) if config is not None else _config_beside(folder, shards)
    return Checkpoint(path, config, shards, weight_map, state)


def _files_of(weights: Path) -> tuple[Path, ...]:
    """A weights file, or its parts where it is split."""
    names = _names(weights.parent)
    return (weights,) if weights.name in names else parts_of(weights, names) or (weights,)


def _config_beside(folder: Path, shards: Sequence[Path]) -> ModelConfig:
    """The configuration in a folder, or in a GGUF file, or that of the published model that the weights are of."""
    if shards[0].suffix == GGUF:
        return _config_inside(shards[0])
    if len(grouped(shards)) == 1 and not _configs(folder):
        return recognise(shards)
    return read_config(find_config(folder))


def _config_inside(path: Path) -> ModelConfig:
    """The configuration in a GGUF file."""
    open_regular(path).close()
    try:
        values = json.loads(read_gguf_config(path), object_pairs_hook=unique_keys)
        if not isinstance(values, dict):
            raise ConfigError("it is no mapping of keys to values")
        return config_from_dict(values)
    except (ValueError, RecursionError, AttributeError, ConfigError) as error:
        raise ConfigError(f"{path}: its configuration cannot be used: {printable(str(error), limit=200)}") from None


def find_config(folder: Path) -> Path:
    """The configuration in a folder: ``config.json``, ``config.yml``, or the only YAML file there is.

    Raises:
        ConfigError: there is none, or there are several that differ.
    """
    files.finish_update(folder)
    found = _configs(folder)
    if not found:
        raise ConfigError(f"{folder}: no config.json and no config.yml beside the weights: name one with config=")
    if len(found) > 1:
        shown = listed(found, most=6)
        try:
            different = len({repr(read_config(folder / name)) for name in found}) > 1
        except ConfigError as error:
            raise ConfigError(f"{folder}: several configurations ({shown}): name one with config= ({error})") from None
        if different:
            raise ConfigError(f"{folder}: several configurations ({shown}), which differ: name one with config=")
    return folder / found[0]


def _configs(folder: Path) -> list[str]:
    """Names of configurations in a folder: those that have a usual name, or else all YAML files."""
    names = _names(folder)
    found = [name for name in CONFIGS if name in names]
    return found or [name for name in names if name.endswith((".yml", ".yaml")) and (folder / name).is_file()]


def has_weights(folder: Path) -> bool:
    """Whether anything in a folder looks like weights, or like the index of some."""
    suffixes = (".safetensors", *TORCH_SUFFIXES, INDEX_SUFFIX, GGUF)
    return any(whole_name(name).endswith(suffixes) for name in _names(folder))


def files_of_checkpoint(folder: Path) -> set[str]:
    """The names of the files in a folder that make up its checkpoint: configurations, weights, and their shards."""
    names = _names(folder)
    found = {name for name in (*CONFIGS, *WEIGHTS) if name in names}
    for index in found & {name for name in WEIGHTS if name.endswith(INDEX_SUFFIX)}:
        try:
            shards = {path.name for path in _shards_of(folder / index, read_index(folder / index))}
        except CheckpointError:  # damaged: nobody can tell what belonged to it
            continue
        found |= shards
    return found


def other_models(folder: Path) -> list[str]:
    """Names of files in a folder that hold a model or an adapter, and do not belong to its checkpoint."""
    own = files_of_checkpoint(folder)
    return [name for name in _weights_files(folder) if name not in own and _is_model(folder / name)] + _adapters(folder)


def _weights_in(folder: Path) -> Path:
    """The weights file in a folder, or the index of its shards; refuses to choose between several."""
    names = _names(folder)
    usual = [name for name in WEIGHTS if name in names]
    if usual and usual[0].endswith(INDEX_SUFFIX):
        shards = read_index(folder / usual[0]).values()
        usual = [name for name in usual if name not in shards]
    others = _weights_files(folder)
    adapters = _adapters(folder)
    if usual:
        models = [*usual, *other_models(folder)]
        if len(models) > 1:
            what = "an adapter beside the model" if adapters and len(usual) == 1 else "several sets of weights"
            cure = "merge it, or move it away" if adapters else "name the file that is meant, or move the others away"
            raise CheckpointError(f"{folder}: {what} ({listed(models, most=6)}): {cure}")
        return folder / usual[0]
    if is_run(folder):
        raise CheckpointError(_run_message(folder))
    if adapters and not set(others) - set(adapters):
        raise CheckpointError(f"{folder}: an adapter without its model: name the model, and this folder as its adapter")
    for suffixes in ((".safetensors",), TORCH_SUFFIXES, (GGUF,)):
        found = [name for name in others if name.endswith(suffixes)]
        models = [name for name in found if _is_model(folder / name)] if len(found) > 1 else found
        if len(models) == 1:
            return folder / models[0]
        if found:
            shown = listed(found, most=6)
            raise CheckpointError(f"{folder}: several weights files and no index ({shown}): name one of them")
    if any(map(_PART.fullmatch, names)):
        raise CheckpointError(f"{folder}: parts of a sharded checkpoint without their index: download {INDEX}, too")
    raise CheckpointError(f"{folder}: no weights here: expected model.safetensors or pytorch-model.bin")


def _weights_files(folder: Path) -> list[str]:
    """Names of weights files that are no parts of sharded checkpoints: without an index, a part is of no use.

    A file that was cut into parts has one name, without a number.
    """
    suffixes = (".safetensors", *TORCH_SUFFIXES, GGUF)
    found = [name for name in _names(folder) if name.endswith(suffixes) and not _PART.fullmatch(name)]
    parts = {whole_name(name) for name in _names(folder)} - {*_names(folder)}
    return [name for name in found if not (folder / name).is_dir()] + sorted(
        name for name in parts if name.endswith(suffixes)
    )


def _is_model(path: Path) -> bool:
    """Whether a weights file has the embedding of a StripedHyena model in its table of contents."""
    try:
        with open_parts(*_files_of(path)) as file:
            head = file.read(1_000_000)
            if head.startswith(b"PK"):
                with zipfile.ZipFile(file) as archive:
                    names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                    head = archive.open(names[0]).read(4_000_000) if names else b""
    except (OSError, CheckpointError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError):
        return False
    return any(name in head for name in _EMBEDDINGS)


def _adapters(folder: Path) -> list[str]:
    return [name for name in _names(folder) if is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Whether a file of this name belongs to an adapter, with which a model is no longer what its own files say."""
    return re.fullmatch(r"adapter_(model\.(safetensors|bin)|config\.json)", name) is not None


def is_run(path: str | PathLike[str]) -> bool:
    """Whether a path is the folder of a training run that has saved its state, or that state (``last.pt``)."""
    path = Path(path)
    folder = path.parent if path.name == _RUN_STATE else path
    return (folder / _RUN_STATE).is_file() and (folder / _RUN_METRICS).is_file()


def _run_message(folder: Path) -> str:
    models = [str(folder / name) for name in ("best", "final") if _has_config(folder / name)]
    loadable = f"load {' or '.join(models)}, or " if models else ""
    return f"{folder}: a training run, not a model: {loadable}write its newest model with `hyaena convert {folder} OUT`"


def _has_config(folder: Path) -> bool:
    """Whether a folder exists and has a configuration of a usual name."""
    return any((folder / name).is_file() for name in CONFIGS)


def read_index(index: Path) -> dict[str, str]:
    """The index of a sharded checkpoint: tensor -> name of the file that it is in, in the index's own folder.

    Raises:
        CheckpointError: it is not an index, or names files outside its folder.
    """
    with open_regular(index) as file:
        content = file.read(_MAX_INDEX + 1)
    if len(content) > _MAX_INDEX:
        raise CheckpointError(f"{index}: larger than {_MAX_INDEX / 1e6:g} MB, so not an index of shards")
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # without a byte order mark
        weight_map = json.loads(text, object_pairs_hook=unique_keys)["weight_map"]
        names = list(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: not an index of shards, or truncated: download it again") from None
    if not names or any(not isinstance(name, str) or not _is_plain(name) for name in names):
        raise CheckpointError(f"{index}: names shards outside its own folder, or none: download it again")
    return weight_map


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and name.endswith((".safetensors", *TORCH_SUFFIXES))


def _shards_of(index: Path, weight_map: Mapping[str, str]) -> tuple[Path, ...]:
    names = sorted(set(weight_map.values()))
    here = set(_names(index.parent))
    if missing := [name for name in names if name not in here]:
        raise CheckpointError(f"{index}: shards are missing ({listed(missing, most=6)}): download them")
    return tuple(index.parent / name for name in names)


def listed(names: Iterable[str], *, most: int = 10) -> str:
    """Names for a message: the first ones, escaped and cut, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + rest


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted; what they name can be looked at, if not read."""
    try:
        os.stat(f"{folder}/.")  # the right to enter it, which listing it does not need
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None


def _is_folder(path: Path) -> bool:
    """Whether a path is that of a folder; it must exist."""
    try:
        os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file or folder: check the path") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return path.is_dir()


def _state(folder: Path, shards: Iterable[Path]) -> frozenset[tuple[str, int, int, int]]:
    """What tells the files of a checkpoint from those that replace them: name, inode, size and time of change."""
    found = set()
    for name in {*CONFIGS, *WEIGHTS, *COMPANIONS, files.JOURNAL, *(shard.name for shard in shards)}:
        try:
            entry = os.stat(folder / name)
        except OSError:
            continue
        found.add((name, entry.st_ino, entry.st_size, entry.st_mtime_ns))
    return frozenset(found)
