"""LoRA adapters: small trained updates of a model's linear layers, read, merged, attached, trained and written.

An adapter is a folder in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``). For a linear layer of
weight W [E,D] it holds A [r,D], B [E,r] and a scale: ``y = W·x + scale·B·(A·x)``. There are two ways to use it:

- :func:`merge_adapter` adds it to the weights, in place. Nothing is slower afterwards. The sum is rounded to the dtype
  of the weights, so it cannot be undone exactly: load the model again for the weights without it.
- :func:`with_adapter` gives a second model over the same weights, whose linear layers compute their update beside
  them. One model in memory serves any number of adapters, each a model of its own.

:func:`add_adapter` begins a new one for training, and :func:`save_adapter` writes it.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyaena import files, ops
from hyaena.arguments import as_path
from hyaena.checkpoints.files import has_weights, listed
from hyaena.checkpoints.shards import FLOATING, open_shard
from hyaena.errors import CheckpointError, ConfigError, InputError, UnsupportedError, printable, shown
from hyaena.formats.tensors import format_of
from hyaena.fp8 import FP8Linear
from hyaena.layers import record
from hyaena.mappings import read_mapping
from hyaena.model import StripedHyena
from hyaena.quant import QuantizedLinear, check_wide

TARGETS = ("qkv_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
"""The linear layers of a model by the last part of their names: what LoRA is usually put on."""

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


class LoRALinear(nn.Module):
    """A linear layer and its update: ``base_layer(x) + scale·B·(A·x)``; see ``ops.lora_linear``."""

    def __init__(self, base_layer: nn.Module, update: Update) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(update.a)
        self.lora_B = nn.Parameter(update.b)
        self.scale = update.scale

    def forward(self, x: Tensor) -> Tensor:
        return ops.lora_linear(x, record(self.base_layer), self.lora_A, self.lora_B, self.scale)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scale={self.scale}"


# --- use -------------------------------------------------------------------------------------------------------------


def merge_adapter(model: StripedHyena, adapter: Adapter | str | PathLike[str]) -> None:
    """Add an adapter to the weights of a model, in place: ``W += scale·B·A``, computed in float32 and then rounded.

    A model whose head is tied to its embedding gets a head of its own if the adapter changes the head: the embedding
    stays as it is. An FP8 layer whose largest weight grows gets a smaller scale.

    Raises:
        CheckpointError: the adapter does not fit the model, or a weight would leave the range of its dtype; the model
            is unchanged.
        InputError: the weights are narrow, or the model has an adapter already.
    """
    adapter = _read(adapter)
    updates = _fitting(model, adapter)
    check_wide(
        model,
        "into which no adapter is merged: compute it beside them (with_adapter), or merge it into the "
        "model that was quantized and quantize the result",
    )
    for name, update in updates.items():
        weight = _weight(model, name)
        parts = [float(t.detach().abs().max()) for t in (weight, update.a, update.b)]
        if not parts[0] + abs(update.scale) * len(update.a) * parts[1] * parts[2] <= torch.finfo(weight.dtype).max:
            raise CheckpointError(
                f"{adapter.source}: its update of {name} may leave the range of {weight.dtype}: load the model in a "
                "wider dtype"
            )
    for name, update in updates.items():
        weight = _weight(model, name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = torch.addmm(
            weight.detach().to(wide),
            update.b.detach().to(weight.device, wide),
            update.a.detach().to(weight.device, wide),
            alpha=update.scale,
        ).to(weight.dtype)
        if name == "lm_head" and model.lm_head is None:
            model.lm_head = _linear(merged, None)
            model.config = replace(model.config, tie_embeddings=False)
        else:
            with torch.no_grad():
                weight.copy_(merged)
            if name != "lm_head" and isinstance(layer := model.get_submodule(name), FP8Linear):
                layer.fit_scale()


def with_adapter(model: StripedHyena, adapter: Adapter | str | PathLike[str]) -> StripedHyena:
    """A model that computes with an adapter, over the weights of ``model``, which stays as it is.

    Everything but A and B is shared: n adapters cost n times their own size. Where ``model`` is changed, by training or
    by a merge, all change. Caches belong to the model that made them.

    Raises:
        CheckpointError: the adapter does not fit the model.
    """
    updates = _fitting(model, _read(adapter))
    tables = (v for module in model.modules() for v in vars(module).values() if isinstance(v, ops.TableStore))
    view = copy.deepcopy(model, {id(shared): shared for shared in (*model.parameters(), *model.buffers(), *tables)})
    dtype, device = model.dtype, model.device
    _attach(view, {n: Update(a.to(device, dtype), b.to(device, dtype), scale) for n, (a, b, scale) in updates.items()})
    return view


def add_adapter(
    model: StripedHyena, *, rank: int = 16, alpha: float | None = None, targets: Iterable[str] = TARGETS
) -> list[nn.Parameter]:
    """Put a new adapter on a model, in place, and freeze everything else; its parameters, for an optimizer.

    A is random and B is zero, so the model computes what it did before. Both are float32 in a narrower model.

    Args:
        model: without an adapter.
        rank: r, the columns of B.
        alpha: the scale is ``alpha / rank``; by default twice the rank.
        targets: which linear layers, by full names or last parts of names. The head is one also where it is tied: its
            update then acts on the head alone.

    Raises:
        InputError: a rank, or a target that the model does not have; the model is unchanged.
    """
    _check_free(model)
    if not _is_rank(rank):
        raise InputError(f"rank is {shown(rank)}: choose a whole number from 1 to {MAX_RANK}, such as 16")
    if alpha is not None and not _is_number(alpha):
        raise InputError(f"alpha is {shown(alpha)}: choose a number, such as twice the rank")
    scale = 2.0 if alpha is None else alpha / rank
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    found, chosen = _linears(model), []
    for target in targets:
        names = [name for name in found if name == target or name.endswith("." + target)]
        if not names and target not in TARGETS:
            raise InputError(f"the model has no linear layer {printable(target)}: choose from {', '.join(TARGETS)}")
        chosen += names
    if not chosen:
        raise InputError(f"the model has none of the targets {listed(targets)}: choose from {', '.join(TARGETS)}")
    updates = {}
    for name in dict.fromkeys(chosen):
        outputs, inputs = found[name]
        options: dict[str, Any] = {"dtype": torch.promote_types(model.dtype, torch.float32), "device": model.device}
        a = torch.empty(rank, inputs, **options)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        updates[name] = Update(a, torch.zeros(outputs, rank, **options), scale)
    model.requires_grad_(False)
    _attach(model, updates)
    return [p for p in model.parameters() if p.requires_grad]


def adapter_of(model: StripedHyena) -> Adapter:
    """The adapter that is attached to a model.

    Raises:
        InputError: there is none.
    """
    updates = {
        name: Update(module.lora_A.detach(), module.lora_B.detach(), module.scale)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    if not updates:
        raise InputError("the model has no adapter: put one on it with add_adapter or with_adapter")
    return Adapter("the model", updates)


def remove_adapter(model: StripedHyena) -> None:
    """Take the adapter off a model, in place: its linear layers are again what they were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            tied = name == "lm_head" and model.config.tie_embeddings
            _put(model, name, None if tied else module.base_layer)


def _attach(model: StripedHyena, updates: Mapping[str, Update]) -> None:
    for name, update in updates.items():
        tied = name == "lm_head" and model.lm_head is None
        base = _linear(model.embed_tokens.weight, None) if tied else model.get_submodule(name)
        _put(model, name, LoRALinear(base, update))


def _put(model: nn.Module, name: str, module: nn.Module | None) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with these very parameters."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return layer


# --- does it fit? ----------------------------------------------------------------------------------------------------


def _read(adapter: Adapter | str | PathLike[str]) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else read_adapter(adapter)


def _linears(model: StripedHyena) -> dict[str, tuple[int, ...]]:
    """Names of the layers that an adapter may change or has changed, and the shapes of their weights."""
    found = {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
    }
    return found | {"lm_head": tuple(model.embed_tokens.weight.shape)}


def _weight(model: StripedHyena, name: str) -> Tensor:
    if name == "lm_head" and model.lm_head is None:
        return model.embed_tokens.weight
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _check_free(model: StripedHyena) -> None:
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise InputError("the model has an adapter already: take it off with remove_adapter, or use the model without")


def _fitting(model: StripedHyena, adapter: Adapter) -> dict[str, Update]:
    """The updates of an adapter under our names and in our layout, if all of them fit a model.

    Raises:
        CheckpointError: one does not.
        InputError: the model has an adapter already.
    """
    _check_free(model)
    shapes, unknown, misshapen, updates = _linears(model), [], [], {}
    original = format_of(model.config)
    for theirs, update in adapter.updates.items():
        key = f"{theirs}.weight"
        name = (original.our_name(key) or key).removesuffix(".weight")
        if name not in shapes:
            unknown.append(theirs)
            continue
        rows, columns = shapes[name]
        if (update.a.shape[1], len(update.b)) != (columns, rows):
            misshapen.append(f"{theirs} is {[len(update.b), update.a.shape[1]]}, expected {[rows, columns]}")
            continue
        _, b = original.to_ours(key, update.b, model.config) or (key, update.b)
        updates[name] = update._replace(b=b)
    if unknown:
        raise CheckpointError(
            f"{adapter.source}: changes layers that this model does not have ({listed(unknown, most=3)}): load the "
            "model that it was trained on"
        )
    if misshapen:
        raise CheckpointError(
            f"{adapter.source}: is for a model of another shape ({listed(misshapen, most=3)}): load the model that it "
            "was trained on"
        )
    for name, copied in adapter.copies.items():
        weight = _weight(model, name).detach()
        if copied.shape != weight.shape or not torch.equal(copied.to(weight), weight):
            raise CheckpointError(
                f"{adapter.source}: holds {name}.weight, which differs from this model's: load the model that it was "
                f"trained on, or, if {name} was trained, merge the adapter with PEFT"
            )
    return updates


# --- files -----------------------------------------------------------------------------------------------------------


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
            if default == "r" and not _is_rank(value):
                what = f"a whole number from 1 to {MAX_RANK}"
                raise CheckpointError(f"{path}: {printable(key)} is {shown(value)}: it should be {what}")
            if default != "r" and not _is_number(value):
                raise CheckpointError(f"{path}: {printable(key)} is {shown(value)}: it should be a number")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a scale may have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9  # NaN is not


def save_adapter(model: StripedHyena, folder: str | PathLike[str], *, base: str | None = None) -> Path:
    """Write the adapter that is on a model, in PEFT's format and with the names of ``hyaena.hf``.

    Args:
        model: with an adapter.
        folder: made if it is not there; an adapter in it is replaced.
        base: the name or folder of the model that it belongs to, for people and for PEFT.

    Raises:
        InputError: the model has no adapter.
        CheckpointError: a number is not finite, or the files could not be written; what was there is as it was.
    """
    folder, adapter = Path(folder), adapter_of(model)
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
    all_of_them = ranks.keys() == {name for name in _linears(model) if name.rpartition(".")[2] in leaves}
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
    except OSError as error:
        raise CheckpointError(
            f"{folder}: could not save ({files.reason(error)}); nothing there is lost: {files.cure(error)}"
        ) from error
    return folder
