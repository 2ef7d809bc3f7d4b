"""The tensors of the original implementations' checkpoints, to and from ours: which format a model's are in.

``formats.stripedhyena.tensors`` and ``formats.evo2.tensors`` convert one tensor at a time; here are the functions of
whole state dicts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor

from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError
from hyaena.formats.evo2 import tensors as evo2
from hyaena.formats.evo2.config import is_of as is_evo2
from hyaena.formats.names import matches_tensors, part
from hyaena.formats.stripedhyena import tensors as stripedhyena

__all__ = [
    "OPTIONAL",
    "REPEATED",
    "SCALES",
    "TensorFormat",
    "check_repeated",
    "check_tied",
    "format_of",
    "matches_tensors",
    "state_to_ours",
    "state_to_theirs",
]

REPEATED = frozenset({evo2.FREQUENCIES})
"""Our names of tensors that an original's files may hold several times, always the same numbers."""

OPTIONAL = frozenset({evo2.FREQUENCIES})
"""Our names of tensors that are computed where a file has none."""

_IN_PROJ = "mixer.in_proj.weight"
SCALES = evo2.SCALES
"""Our name, within a layer, of a tensor that is 1 where an original's file has none."""


class TensorFormat(Protocol):
    """The module ``tensors`` of a format.

    Attributes:
        SINGLE_FILE: the name of the file of ``torch.save`` that the original reads; None where it reads safetensors.
    """

    SINGLE_FILE: str | None

    def our_name(self, key: str) -> str | None: ...

    def to_ours(self, key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor] | None: ...

    def to_theirs(self, key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor] | None: ...

    def extra_tensors(self, state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]: ...


def format_of(config: ModelConfig) -> TensorFormat:
    """The format in which the original stores a model of a configuration: StripedHyena 2 or 1."""
    return cast("TensorFormat", evo2 if is_evo2(config) else stripedhyena)


def state_to_ours(state: Mapping[str, Tensor | io.BytesIO | None], config: ModelConfig) -> dict[str, Tensor]:
    """Convert an original state dict to our names and layout. Scales of FP8 projections that it lacks are 1.

    Raises:
        CheckpointError: the embedding is tied, and the checkpoint holds a head of its own that differs from it; or
            layers have different rotary frequencies; or an extra state cannot be read.
    """
    form, ours = format_of(config), dict[str, Tensor]()
    if config.fp8_input_projections:
        names = (form.our_name(key) for key in state)
        ours = {
            name.replace(_IN_PROJ, SCALES): torch.ones(2, dtype=torch.float32, device="cpu")
            for name in names
            if part(name) == _IN_PROJ and name
        }
    for key, tensor in state.items():
        if isinstance(tensor, io.BytesIO):
            tensor = torch.tensor(list(tensor.getvalue()), dtype=torch.uint8, device="cpu")
        elif tensor is None:  # the extra state of a layer that has none
            continue
        item = form.to_ours(key, tensor, config)
        if item is None:
            continue
        if item[0] in ours and item[0] in REPEATED:
            check_repeated(key, ours[item[0]], tensor)
        ours[item[0]] = item[1]
    if config.tie_embeddings and "lm_head.weight" in ours:
        check_tied(ours.get("embed_tokens.weight"), ours.pop("lm_head.weight"))
    return ours


def state_to_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert our state dict to the original's names and layout, with the tensors that only the original stores."""
    form = format_of(config)
    items = (form.to_theirs(key, tensor, config) for key, tensor in state.items())
    return dict(item for item in items if item is not None) | form.extra_tensors(state, config)


def check_tied(embedding: Tensor | None, head: Tensor) -> None:
    """Refuse a head that differs from the embedding that it is tied to; a copy or an alias is fine."""
    if embedding is None or embedding.is_meta or head.is_meta or torch.equal(embedding, head.to(embedding)):
        return
    raise CheckpointError(
        "tie_embeddings is true, but unembed.weight differs from embedding_layer.weight: set tie_embeddings to false"
    )


def check_repeated(key: str, first: Tensor, again: Tensor) -> None:
    """Refuse a tensor that a file repeats with other numbers."""
    if first.is_meta or again.is_meta or torch.equal(first, again.to(first)):
        return
    raise CheckpointError(
        f"{key} differs from that of another layer, and a model has one set of rotary frequencies: "
        "download the checkpoint again"
    )
