"""Checkpoints and state dicts of the original → a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyaena.checkpoints.files import find, listed
from hyaena.checkpoints.weights import open_weights, plain_names
from hyaena.errors import CheckpointError
from hyaena.formats.evo2 import tensors as evo2
from hyaena.formats.tensors import check_tied
from vortex.model.layers import MHA, TELinear, as_bytes

if TYPE_CHECKING:
    from vortex.model.model import StripedHyena

_EXTRA = "._extra_state"

Source = tuple[tuple[int, ...], Callable[[], Tensor]]
"""The shape of a stored tensor, and what reads it."""


def load_file(model: StripedHyena, path: str | PathLike[str]) -> None:
    """Fill a model from a checkpoint file, or its parts; one tensor of it is in memory at a time.

    Raises:
        CheckpointError: a file that is missing, damaged or unsafe, or of another model.
    """
    parts = Path(f"{path}.part0")
    checkpoint = find(parts if parts.exists() and not Path(path).exists() else path, model.architecture)
    with open_weights(checkpoint) as weights:
        sources = {item.name: (tuple(item.stored.shape), item.read) for item in weights.items}
        fill(model, sources, f"{checkpoint.path}", strict=True, per_head=True)
    checkpoint.check_unchanged()


def load_weights(model: StripedHyena, state: Mapping[str, Any], *, strict: bool) -> None:
    """Fill a model from a state dict; see ``StripedHyena.custom_load_state_dict``."""
    tensors = {key: as_bytes(value) if key.endswith(_EXTRA) else value for key, value in state.items()}
    names = plain_names(list(tensors))
    sources: dict[str, Source] = {
        name: (tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in zip(names, tensors.values(), strict=True)
    }
    fill(model, sources, "the state dict", strict=strict, per_head=not _is_own(state, model))


def _is_own(state: Mapping[str, Any], model: StripedHyena) -> bool:
    """Whether a state dict is of a model of this package, whose ``Wqkv`` has been reordered."""
    metadata = getattr(state, "_metadata", {})
    found = {metadata.get(f"blocks.{i}.inner_mha_cls", {}).get("version") for i in _attention_layers(model)}
    return found == {MHA._version}


def _attention_layers(model: StripedHyena) -> list[int]:
    return [i for i, (kind, _) in enumerate(model.kinds_and_blocks()) if kind == "attention"]


@torch.no_grad()
def fill(model: StripedHyena, sources: Mapping[str, Source], what: str, *, strict: bool, per_head: bool) -> None:
    """Copy stored tensors into the parameters and buffers of a model, in the dtypes of these.

    Args:
        sources: by the original's names.
        what: the name of the whole in messages.
        strict: whether missing and unknown names are errors.
        per_head: rows of ``Wqkv`` are [q | k | v] of each head.
    """
    config = model.architecture
    targets: dict[str, Tensor] = {**dict(model.named_parameters()), **_frequencies(model)}
    head = "unembed.weight" if config.tie_embeddings else ""
    stored = {name: source for name, source in sources.items() if not name.endswith(_EXTRA) and name != head}
    stored = {name: source for name, source in stored.items() if evo2.our_name(name) is not None}
    missing = sorted(targets.keys() - stored.keys() - _frequencies(model).keys()) if strict else []
    unknown = sorted(stored.keys() - targets.keys()) if strict else []
    misshapen = [
        f"{name} is {list(stored[name][0])}, expected {list(target.shape)}"
        for name, target in targets.items()
        if name in stored and stored[name][0] != tuple(target.shape)
    ]
    problems = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if any(problems.values()):
        told = "; ".join(f"{kind} tensors: {listed(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{what} does not fit the configuration, so take that of this checkpoint: {told}")
    if head in sources and "embedding_layer.weight" in stored:
        check_tied(stored["embedding_layer.weight"][1](), sources[head][1]())
    scales = _scales(model, sources)
    for name, target in targets.items():
        if name not in stored:
            if name in _frequencies(model):
                model.get_submodule(name.removesuffix(".inv_freq")).init_weights()  # type: ignore[operator]
            continue
        tensor = stored[name][1]()
        if per_head and ".Wqkv." in name:
            converted = evo2.to_ours(name, tensor, config)
            assert converted is not None
            tensor = converted[1]
        target.copy_(tensor)
    for buffer, values in scales:
        buffer.copy_(values)


def _frequencies(model: StripedHyena) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(".inv_freq")}


def _scales(model: StripedHyena, sources: Mapping[str, Source]) -> list[tuple[Tensor, Tensor]]:
    """The buffers of the FP8 scales of a model, and what they become."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, TELinear):
            name, values = path + _EXTRA, torch.ones(2)
            if name in sources:
                converted = evo2.to_ours(name, sources[name][1](), model.architecture)
                assert converted is not None
                values = converted[1]
            found.append((module.scales, values))
    return found
