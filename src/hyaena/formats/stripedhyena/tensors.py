"""The tensor names and layouts of StripedHyena 1 checkpoints, to and from ours.

Three quirks are undone on the way in and redone on the way out, bit for bit:

- Hyena projections and short filters interleave ``[x2 | x1 | v]`` per head (``column_split_hyena``); ours are three
  blocks of D rows.
- Short filters are ``[3D, 1, K]``; ours ``[3D, K]``. Poles and residues are ``[D, N, 1, 2]``; ours ``[D, N, 2]``.
- Rotary frequencies are stored as buffers; ours are computed.

Everything works on one tensor at a time, so that a checkpoint can be read shard by shard. ``formats.tensors`` has what
works on whole state dicts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hyaena.config import ModelConfig
from hyaena.formats.names import INTERLEAVED, LAYER, Names, part

_NAMES = Names(
    {
        **LAYER,
        "filter.poles": "mixer.long_filter.poles",
        "filter.residues": "mixer.long_filter.residues",
    },
    re.compile(r"blocks\.\d+\.(filter\.(t|freq)|inner_mha_cls\.rotary_emb\.inv_freq)|(.*\.)?_extra_state"),
)
_EXTRA_AXIS = {"mixer.short_filter.weight": 1, "mixer.long_filter.poles": 2, "mixer.long_filter.residues": 2}
"""Our name -> the axis of length 1 that the original's tensor has in addition."""

SINGLE_FILE = None
"""The original reads safetensors, in as many files as there are."""


def our_name(key: str) -> str | None:
    """Our name for an original key; None for what is recomputed. Other keys stay unchanged."""
    return _NAMES.ours(key)


def to_ours(key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor] | None:
    """Convert one tensor of an original checkpoint to our name and layout; None for what is recomputed.

    A key that the original does not have is returned with its tensor unchanged, and a tensor of an unexpected shape
    keeps its shape, so that the caller can report both by name. The result may share memory with ``tensor``.
    """
    name = our_name(key)
    if name is None:
        return None
    axis = _EXTRA_AXIS.get(part(name) or "")
    if axis is not None and key != name and tensor.dim() > axis and tensor.shape[axis] == 1:
        tensor = tensor.squeeze(axis)
    if part(name) in INTERLEAVED and key != name and config.column_split_hyena:
        tensor = _reorder(tensor, config.num_attention_heads, 3, config)
    return name, tensor


def to_theirs(key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """Convert one of our tensors to the original's name and layout: the inverse of :func:`to_ours`."""
    name = part(key) or ""
    if name in INTERLEAVED and config.column_split_hyena:
        tensor = _reorder(tensor, 3, config.num_attention_heads, config)
    if name in _EXTRA_AXIS:
        tensor = tensor.unsqueeze(_EXTRA_AXIS[name])
    return _NAMES.theirs(key), tensor


def extra_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors that the original stores and we do not.

    In every attention layer the rotary frequencies theta^(-2j/head_dim) [head_dim / 2]; and, where the head is tied,
    the embedding [V,D] a second time, without which the original refuses the checkpoint.
    """
    embedding = state.get("embed_tokens.weight")
    head = {"unembed.weight": embedding.clone()} if config.tie_embeddings and embedding is not None else {}
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return head | {
        f"blocks.{i}.inner_mha_cls.rotary_emb.inv_freq": 1.0 / (config.rope_theta**exponents)
        for i, kind in enumerate(config.layer_types)
        if kind == "attention"
    }


def _reorder(tensor: Tensor, outer: int, inner: int, config: ModelConfig) -> Tensor:
    """Rows ordered [outer, inner, head_dim] -> [inner, outer, head_dim]; other shapes are left alone."""
    if tensor.dim() == 0 or tensor.shape[0] != 3 * config.hidden_size:
        return tensor
    rows = tensor.reshape(outer, inner, config.head_dim, *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)
