"""The tensor names and layouts of StripedHyena 1 checkpoints, to and from ours: one table, read in both directions.

Three quirks are undone on the way in and redone on the way out, bit for bit:

- Hyena projections and short filters interleave ``[x2 | x1 | v]`` per head (``column_split_hyena``); ours are three
  blocks of D rows.
- Short filters are ``[3D, 1, K]``; ours ``[3D, K]``. Poles and residues are ``[D, N, 1, 2]``; ours ``[D, N, 2]``.
- Rotary frequencies are stored as buffers; ours are computed.

Everything works on one tensor at a time, so that a checkpoint can be read shard by shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError

PREFIX = "backbone."
"""What the hub's safetensors files write before every key."""

_TOP = {
    "embedding_layer.weight": "embed_tokens.weight",
    "unembed.weight": "lm_head.weight",
    "norm.scale": "norm.weight",
}
_LAYER = {
    "pre_norm.scale": "mixer_norm.weight",
    "post_norm.scale": "mlp_norm.weight",
    "mlp.l1.weight": "mlp.gate_proj.weight",
    "mlp.l2.weight": "mlp.up_proj.weight",
    "mlp.l3.weight": "mlp.down_proj.weight",
    "inner_mha_cls.Wqkv.weight": "mixer.qkv_proj.weight",
    "inner_mha_cls.Wqkv.bias": "mixer.qkv_proj.bias",
    "inner_mha_cls.out_proj.weight": "mixer.o_proj.weight",
    "inner_mha_cls.out_proj.bias": "mixer.o_proj.bias",
    "projections.weight": "mixer.in_proj.weight",
    "projections.bias": "mixer.in_proj.bias",
    "out_filter_dense.weight": "mixer.out_proj.weight",
    "out_filter_dense.bias": "mixer.out_proj.bias",
    "filter.short_filter_weight": "mixer.short_filter.weight",
    "filter.short_filter_bias": "mixer.short_filter.bias",
    "filter.poles": "mixer.long_filter.poles",
    "filter.residues": "mixer.long_filter.residues",
    "filter.D": "mixer.long_filter.skip",
}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_LAYER_BACK = {ours: theirs for theirs, ours in _LAYER.items()}

_INTERLEAVED = ("mixer.in_proj.weight", "mixer.in_proj.bias", "mixer.short_filter.weight", "mixer.short_filter.bias")
_EXTRA_AXIS = {"mixer.short_filter.weight": 1, "mixer.long_filter.poles": 2, "mixer.long_filter.residues": 2}
"""Our name -> the axis of length 1 that the original's tensor has in addition."""

_DROPPED = re.compile(r"blocks\.\d+\.(filter\.(t|freq)|inner_mha_cls\.rotary_emb\.inv_freq)|(.*\.)?_extra_state")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_OURS = re.compile(r"layers\.(\d+)\.(.+)")


def matches_tensors(keys: Iterable[str]) -> bool:
    """Whether a state dict has the original's names (with or without ``backbone.``)."""
    return any(key.startswith("blocks.") or key in _TOP for key in map(_strip, keys))


def our_name(key: str) -> str | None:
    """Our name for an original key; None for what is recomputed. Other keys stay unchanged."""
    key = _strip(key)
    if _DROPPED.fullmatch(key):
        return None
    block = _BLOCK.fullmatch(key)
    if block is not None and block[2] in _LAYER:
        return f"layers.{block[1]}.{_LAYER[block[2]]}"
    return _TOP.get(key, key)


def to_ours(key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor] | None:
    """Convert one tensor of an original checkpoint to our name and layout; None for what is recomputed.

    A key that the original does not have is returned with its tensor unchanged, and a tensor of an unexpected shape
    keeps its shape, so that the caller can report both by name. The result may share memory with ``tensor``.
    """
    name = our_name(key)
    if name is None:
        return None
    block = _BLOCK.fullmatch(_strip(key))
    part = None if block is None else _LAYER.get(block[2])
    axis = _EXTRA_AXIS.get(part or "")
    if axis is not None and tensor.dim() > axis and tensor.shape[axis] == 1:
        tensor = tensor.squeeze(axis)
    if part in _INTERLEAVED and config.column_split_hyena:
        tensor = _reorder(tensor, config.num_attention_heads, 3, config)
    return name, tensor


def to_theirs(key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """Convert one of our tensors to the original's name and layout: the inverse of :func:`to_ours`."""
    if key in _TOP_BACK:
        return _TOP_BACK[key], tensor
    layer = _OURS.fullmatch(key)
    if layer is None or layer[2] not in _LAYER_BACK:
        return key, tensor
    name = layer[2]
    if name in _INTERLEAVED and config.column_split_hyena:
        tensor = _reorder(tensor, 3, config.num_attention_heads, config)
    if name in _EXTRA_AXIS:
        tensor = tensor.unsqueeze(_EXTRA_AXIS[name])
    return f"blocks.{layer[1]}.{_LAYER_BACK[name]}", tensor


def state_to_ours(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert an original state dict to our names and layout.

    Raises:
        CheckpointError: the embedding is tied, and the checkpoint holds a head of its own that differs from it.
    """
    items = (to_ours(key, tensor, config) for key, tensor in state.items())
    ours = dict(item for item in items if item is not None)
    if config.tie_embeddings and "lm_head.weight" in ours:
        check_tied(ours.get("embed_tokens.weight"), ours.pop("lm_head.weight"))
    return ours


def state_to_theirs(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert our state dict to the original's names and layout, with the tensors that only the original stores."""
    original = dict(to_theirs(key, tensor, config) for key, tensor in state.items())
    return original | extra_tensors(state, config)


def extra_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors that the original stores and we do not.

    In every attention layer the rotary frequencies theta^(-2j/head_dim) [head_dim / 2]; and, where the head is tied,
    the embedding [V,D] a second time, without which the original refuses the checkpoint.
    """
    embedding = state.get("embed_tokens.weight")
    head = {"unembed.weight": embedding.clone()} if config.tie_embeddings and embedding is not None else {}
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return head | {
        f"blocks.{i}.inner_mha_cls.rotary_emb.inv_freq": 1.0 / (config.rope_theta**exponents)
        for i, kind in enumerate(config.layer_types)
        if kind == "attention"
    }


def check_tied(embedding: Tensor | None, head: Tensor) -> None:
    """Refuse a head that differs from the embedding that it is tied to; a copy or an alias is fine."""
    if embedding is None or embedding.is_meta or head.is_meta or torch.equal(embedding, head.to(embedding)):
        return
    raise CheckpointError(
        "tie_embeddings is true, but unembed.weight differs from embedding_layer.weight: set tie_embeddings to false"
    )


def _strip(key: str) -> str:
    return key.removeprefix(PREFIX)


def _reorder(tensor: Tensor, outer: int, inner: int, config: ModelConfig) -> Tensor:
    """Rows ordered [outer, inner, head_dim] -> [inner, outer, head_dim]; other shapes are left alone."""
    if tensor.dim() == 0 or tensor.shape[0] != 3 * config.hidden_size:
        return tensor
    rows = tensor.reshape(outer, inner, config.head_dim, *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)
