"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hyaena import files
from hyaena.arguments import as_path
from hyaena.checkpoints.files import has_weights, listed
from hyaena.checkpoints.shards import FLOATING, open_shard
from hyaena.errors import CheckpointError, ConfigError, UnsupportedError, printable, shown
from hyaena.mappings import read_mapping

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 1024

_KEY = re.compile(r"base_model\.model\.(?:model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_COPY = re.compile(r"base_model\.model\.(?:model\.)?(embed_tokens|lm_head)(?:\.base_layer)?\.weight")
_PLAIN_PATTERN = re.compile(r"[\w.]+")
_READ = {"r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "peft_type"}
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config"),
}
"""Keys of a PEFT configuration that say how an adapter was trained, and not what it computes."""
_CHANGES_NOTHING = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to initialise an adapter that leave the weights of the model as they are."""


class Update(NamedTuple):
    """What an adapter adds to one linear layer: ``scale·b·a``, a [r,D], b [E,r]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        source: the folder that it was read from; it begins every message.
        updates: the name of a linear layer, such as ``layers.0.mixer.in_proj``, as the file has it -> its update.
        copies: weights of the model itself, ``embed_tokens`` or ``lm_head``, which PEFT writes beside an adapter of the
            head. They must be those of the model that the adapter is put on.
    """

    source: str
    updates: Mapping[str, Update]
    copies: Mapping[str, Tensor] = field(default_factory=dict)


def read_adapter(folder: str | PathLike[str]) -> Adapter:
    """Read an adapter in PEFT's format; nothing in its files is executed.

    Layers have the names of ``hyaena.hf``, of the native model or of the original. Ranks and alphas may differ from
    layer to layer (``rank_pattern``, ``alpha_pattern`` with plain names), and may be rank-stabilised.

    Raises:
        CheckpointError: there is no adapter, or its files are damaged, contradictory or of unreasonable size.
        UnsupportedError: it is of another kind, or more than an update of linear layers.
    """
    path = as_path("the adapter", folder)
    config = _read_config(path)
    weights = path / WEIGHTS
    if not weights.exists():
        pickled = (path / "adapter_model.bin").exists()
        cure = "save it again with safe_serialization=True" if pickled else "copy it there"
        raise CheckpointError(f"{path}: no {WEIGHTS} beside {CONFIG}: {cure}")
    factors: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    with open_shard(weights) as shard:
        for key, stored in shard.tensors.items():
            match, copied = _KEY.fullmatch(key), _COPY.fullmatch(key)
            if match is None and copied is None:
                raise UnsupportedError(
                    f"{weights}: {printable(key)} is no factor of a linear layer: merge the adapter with PEFT "
                    "(merge_and_unload), and load the model that it saves"
                )
            if stored.dtype not in FLOATING or len(stored.shape) != 2:
                kind = str(stored.dtype).removeprefix("torch.")
                shape = printable(str(list(stored.shape)))
                raise CheckpointError(f"{weights}: {printable(key)} is {kind} {shape}: write a matrix of real numbers")
            tensor = shard.read(key)
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{weights}: {printable(key)} is not finite: go back to an adapter that is")
            if copied is not None:
                copies[copied[1]] = tensor
            elif match is not None:
                factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise CheckpointError(f"{weights}: holds no adapter: write it again")
    updates = {name: _update(weights, config, name, pair) for name, pair in factors.items()}
    return Adapter(str(path), updates, copies)


def _update(path: Path, config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> Update:
    """The two factors of a layer with the scale that the configuration gives it."""
    if len(pair) < 2:
        missing = ({"A", "B"} - pair.keys()).pop()
        raise CheckpointError(f"{path}: {printable(name)} has no lora_{missing}: write the adapter again")
    a, b = pair["A"], pair["B"]
    rank = _for_layer(config.get("rank_pattern"), name, config["r"])
    alpha = _for_layer(config.get("alpha_pattern"), name, config["lora_alpha"])
    if not len(a) == b.shape[1] == rank:
        raise CheckpointError(
            f"{path}: the factors of {printable(name)} have ranks {len(a)} and {b.shape[1]}, and the configuration "
            f"says {rank}: take both files from one adapter"
        )
    return Update(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _for_layer(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first entry whose key is the name, or its end after a dot."""
    found = (value for key, value in (pattern or {}).items() if f".model.{name}".endswith(f".{key}"))
    return next(found, default)


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter, if it is one that can be computed here."""
    path = folder / CONFIG
    if not path.exists():
        if not folder.exists():
            raise CheckpointError(f"{folder}: no such folder: check the path of the adapter")
        if (folder / WEIGHTS).exists():
            raise CheckpointError(f"{folder}: an adapter without its {CONFIG}: copy that there, too")
        what = "a model, not an adapter" if folder.is_dir() and has_weights(folder) else f"no {CONFIG} here"
        raise CheckpointError(f"{folder}: {what}: name the folder of a LoRA adapter that PEFT or hyaena saved")
    try:
        config = read_mapping(path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: is an adapter of type {shown(kind)}, and only LORA can be read: {_BY_PEFT}")
    if config.get("use_dora"):
        raise UnsupportedError(f"{path}: is a DoRA adapter, which is more than an update of low rank: {_BY_PEFT}")
    if trained := config.get("modules_to_save"):
        raise UnsupportedError(f"{path}: also holds whole modules ({shown(trained)}): {_BY_PEFT}")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{path}: also holds biases (bias: {shown(config['bias'])}): {_BY_PEFT}")
    if config.get("init_lora_weights", True) not in _CHANGES_NOTHING:
        how = shown(config["init_lora_weights"])
        raise UnsupportedError(f"{path}: was begun with {how}, which changed the model's weights, too: {_BY_PEFT}")
    known = (
        _READ | _WITHOUT_EFFECT | {"use_dora", "modules_to_save", "bias", "init_lora_weights", "ensure_weight_tying"}
    )
    if others := [key for key, value in config.items() if value and key not in known]:
        raise UnsupportedError(f"{path}: uses {listed(others, most=3)}, which is unknown here: {_BY_PEFT}")
    _check_numbers(path, config)
    return config


_BY_PEFT = "merge it with PEFT (merge_and_unload), and load the model that it saves"


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse ranks and alphas that are no usable numbers, and patterns that are more than names."""
    for default, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        table = config.get(pattern) or {}
        if not isinstance(table, dict):
            raise CheckpointError(f"{path}: {pattern} is {shown(table)}: write names of layers with numbers")
        if odd := [key for key in table if not _PLAIN_PATTERN.fullmatch(key)]:
            raise UnsupportedError(f"{path}: {pattern} has a regular expression ({printable(odd[0])}): {_BY_PEFT}")
        for key, value in ((default, config.get(default)), *table.items()):
            if default == "r" and not is_rank(value):
                what = f"a whole number from 1 to {MAX_RANK}"
                raise CheckpointError(f"{path}: {printable(key)} is {shown(value)}: it should be {what}")
            if default != "r" and not is_number(value):
                raise CheckpointError(f"{path}: {printable(key)} is {shown(value)}: it should be a number")


def is_rank(value: Any) -> bool:
    """Whether a value is a rank that an adapter may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def is_number(value: Any) -> bool:
    """Whether a value is a number that a scale may have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9  # NaN is not


def write_adapter(adapter: Adapter, folder: Path, *, layers: Iterable[str], base: str | None) -> None:
    """Write an adapter; one that is there is replaced.

    Args:
        adapter: its layers have the names of ``hyaena.hf``.
        folder: made if it is not there.
        layers: names of all layers that an adapter may change.
        base: the name or folder of the model that it belongs to.

    Raises:
        CheckpointError: a number is not finite, or the files could not be written; what was there is as it was.
    """
    ranks = {name: len(update.a) for name, update in adapter.updates.items()}
    alphas = {name: update.scale * len(update.a) for name, update in adapter.updates.items()}
    tensors = {}
    for name, update in adapter.updates.items():
        key = f"base_model.model.{'' if name == 'lm_head' else 'model.'}{name}"
        for factor, tensor in (("A", update.a), ("B", update.b)):
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"the adapter is not finite ({name}): go back to one that is")
            tensors[f"{key}.lora_{factor}.weight"] = tensor.cpu().contiguous()
    first, leaves = next(iter(ranks)), {name.rpartition(".")[2] for name in ranks}
    all_of_them = ranks.keys() == {name for name in layers if name.rpartition(".")[2] in leaves}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": sorted(leaves if all_of_them else ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }

    def fill(stage: Path) -> set[str]:
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
        for name in (CONFIG, WEIGHTS):
            files.flush(stage / name)
        return {"adapter_model.bin"}

    try:
        files.update_folder(folder, fill)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: could not save ({files.reason(error)}); nothing there is lost: {files.cure(error)}"
        ) from error
