"""LoRA on a model: merged into its weights, or computed beside them, attached, trained and saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyaena import ops
from hyaena.adapters.peft import MAX_RANK, Adapter, Update, is_number, is_rank, read_adapter, write_adapter
from hyaena.arguments import as_text_path, each, kind_of
from hyaena.checkpoints.files import listed
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, InputError, printable, shown
from hyaena.formats.tensors import format_of
from hyaena.fp8 import FP8Linear
from hyaena.layers import MIXERS, Mixers, record
from hyaena.model import StripedHyena
from hyaena.quant import QuantizedLinear, check_wide

TARGETS = ("qkv_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
"""The linear layers of a model by the last part of their names: what LoRA is usually put on."""


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
    updates = _mergeable(model, adapter)
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


def check_adapter(config: ModelConfig, adapter: Adapter, *, merged: bool, mixers: Mixers = MIXERS) -> None:
    """Check that an adapter fits models of a configuration, before weights are read.

    Args:
        config: of the model.
        adapter: from ``read_adapter``.
        merged: whether it is to be merged into the weights, which narrow ones do not allow.
        mixers: those of the model, see ``StripedHyena``.

    Raises:
        HyaenaError: as ``merge_adapter`` and ``with_adapter``, as far as no weight counts.
    """
    with torch.device("meta"):
        model = StripedHyena(config, mixers=mixers)
    (_mergeable if merged else _fitting)(model, adapter)


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
    if not is_rank(rank):
        raise InputError(f"rank is {shown(rank)}: choose a whole number from 1 to {MAX_RANK}, such as 16")
    if alpha is not None and not is_number(alpha):
        raise InputError(f"alpha is {shown(alpha)}: choose a number, such as twice the rank")
    if alpha == 0:
        raise InputError("alpha is 0, with which nothing is learned: choose a number, such as twice the rank")
    scale = 2.0 if alpha is None else alpha / rank
    what = f"names of linear layers, such as {', '.join(TARGETS)}"
    wanted = (targets,) if isinstance(targets, str) else tuple(each("targets", targets, what))
    if not wanted:
        raise InputError(f"targets is empty: choose from {', '.join(TARGETS)}, or leave it out for all of them")
    found, chosen = _linears(model), []
    for target in wanted:
        if not isinstance(target, str) or not target:
            raise InputError(f"a target is {shown(target)}: choose from {', '.join(TARGETS)}")
        names = [name for name in found if name == target or name.endswith("." + target)]
        if not names and target not in TARGETS:
            raise InputError(f"the model has no linear layer {printable(target)}: choose from {', '.join(TARGETS)}")
        chosen += names
    if not chosen:
        raise InputError(f"the model has none of the targets {listed(wanted)}: choose from {', '.join(TARGETS)}")
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
    _check_model(model)
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
    _check_model(model)
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


def _check_model(model: StripedHyena) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a model that hyaena.load returned, not {kind_of(model)}")


def _check_free(model: StripedHyena) -> None:
    _check_model(model)
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise InputError("the model has an adapter already: take it off with remove_adapter, or use the model without")


def _mergeable(model: StripedHyena, adapter: Adapter) -> dict[str, Update]:
    updates = _fitting(model, adapter)
    check_wide(
        model,
        "into which no adapter is merged: compute it beside them (with_adapter), or merge it into the "
        "model that was quantized and quantize the result",
    )
    return updates


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
        if copied.shape != weight.shape or not (weight.is_meta or torch.equal(copied.to(weight), weight)):
            raise CheckpointError(
                f"{adapter.source}: holds {name}.weight, which differs from this model's: load the model that it was "
                f"trained on, or, if {name} was trained, merge the adapter with PEFT"
            )
    return updates


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
    folder = as_text_path("the folder", folder, "safetensors")
    write_adapter(adapter_of(model), folder, layers=_linears(model), base=base)
    return folder
