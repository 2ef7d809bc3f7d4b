"""The tensor names and layouts of StripedHyena 2 checkpoints, to and from ours.

What is undone on the way in and redone on the way out, bit for bit:

- Hyena projections and short filters interleave their channels, ``x2, x1, v, x2, x1, v, …``; ours are three blocks of D
  rows, ``[x2 | x1 | v]``.
- Attention's projection is ``[q | k | v]`` per head; ours is ``[q | k | v]`` of all heads.
- Explicit filters are ``[F, 1, W]``, and the last tap is that of the current step where W < 128, the first from there
  on (``config.SWITCH``); ours are ``[F, W]`` and begin with the current step.
- Short filters are ``[3D, 1, K]``; ours ``[3D, K]``. Logarithms of poles are ``[D, N, 1]``; ours ``[D, N]``.
- Every attention layer stores the rotary frequencies; ours are stored once, and computed where a file has none.
- The scales of FP8 input projections are in the extra state of each (``extra_state``); ours are float32 [2].

Buffers of the original's older code and other states of Transformer Engine are dropped by pattern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError
from hyaena.formats.evo2.config import SWITCH
from hyaena.formats.evo2.extra_state import read_scales, write_scales
from hyaena.formats.names import INTERLEAVED, LAYER, Names, part

SINGLE_FILE = "model.pt"
"""The weights, as the original reads them: one file of ``torch.save``, whatever its size."""
FREQUENCIES = "rotary.frequencies"

_NAMES = Names(
    {
        **LAYER,
        "filter.h": "mixer.long_filter.taps",
        "filter.log_poles": "mixer.long_filter.log_poles",
        "filter.residues": "mixer.long_filter.residues",
        "projections._extra_state": "mixer.in_proj.scales",
    },
    re.compile(
        r"blocks\.\d+\.(filter|mixer\.mixer\.filter)\.(t|freq)|(?!blocks\.\d+\.projections\.)(.*\.)?_extra_state"
    ),
)
_STORED_FREQUENCIES = re.compile(r"(backbone\.)?blocks\.\d+\.inner_mha_cls\.rotary_emb\.inv_freq")
_PER_HEAD = ("mixer.qkv_proj.weight", "mixer.qkv_proj.bias")
_TAPS = "mixer.long_filter.taps"
SCALES = "mixer.in_proj.scales"
"""Our name, within a layer, of the scales of an FP8 projection."""
_EXTRA_AXIS = {"mixer.short_filter.weight": 1, _TAPS: 1, "mixer.long_filter.log_poles": 2}
"""Our name -> the axis of length 1 that the original's tensor has in addition."""


def our_name(key: str) -> str | None:
    """Our name for an original key; None for what is dropped. Other keys stay unchanged."""
    return FREQUENCIES if _STORED_FREQUENCIES.fullmatch(key) else _NAMES.ours(key)


def to_ours(key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor] | None:
    """Convert one tensor of an original checkpoint to our name and layout; None for what is dropped.

    A key that the original does not have is returned with its tensor unchanged, and a tensor of an unexpected shape
    keeps its shape, so that the caller can report both by name. The result may share memory with ``tensor``.
    The extra state of a projection is given as its bytes, uint8 [n].

    Raises:
        CheckpointError: an extra state that cannot be read.
    """
    name = our_name(key)
    inner = part(name)
    if name is None or name == key or inner is None:
        return None if name is None else (name, tensor)
    if inner == SCALES:
        return (name, _scales(key, tensor)) if config.fp8_input_projections else None
    axis = _EXTRA_AXIS.get(inner)
    if axis is not None and tensor.dim() > axis and tensor.shape[axis] == 1:
        tensor = tensor.squeeze(axis)
    if inner in INTERLEAVED:
        tensor = _reorder(tensor, (config.hidden_size, 3))
    if inner in _PER_HEAD:
        tensor = _reorder(tensor, (config.num_attention_heads, 3, config.head_dim))
    return name, _lag_order(tensor) if inner == _TAPS else tensor


def to_theirs(key: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor] | None:
    """Convert one of our tensors to the original's name and layout: the inverse of :func:`to_ours`.

    None for the rotary frequencies, which :func:`extra_tensors` gives every layer that has them there.
    """
    if key == FREQUENCIES:
        return None
    inner = part(key) or ""
    if inner in INTERLEAVED:
        tensor = _reorder(tensor, (3, config.hidden_size))
    if inner in _PER_HEAD:
        tensor = _reorder(tensor, (3, config.num_attention_heads, config.head_dim))
    if inner == _TAPS:
        tensor = _lag_order(tensor)
    if inner == SCALES and not tensor.is_meta:
        tensor = torch.frombuffer(bytearray(write_scales(*tensor.tolist())), dtype=torch.uint8)
    if inner in _EXTRA_AXIS:
        tensor = tensor.unsqueeze(_EXTRA_AXIS[inner])
    return _NAMES.theirs(key), tensor


def extra_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors that the original stores and we do not, or not as often.

    In every attention layer the rotary frequencies [head_dim / 2], and, where the head is tied, the embedding [V,D] a
    second time.
    """
    embedding, frequencies = state.get("embed_tokens.weight"), state.get(FREQUENCIES)
    extra = {"unembed.weight": embedding.clone()} if config.tie_embeddings and embedding is not None else {}
    for i, kind in enumerate(config.layer_types if frequencies is not None else ()):
        if kind == "attention" and frequencies is not None:
            extra[f"blocks.{i}.inner_mha_cls.rotary_emb.inv_freq"] = frequencies.clone()
    return extra


def _scales(key: str, state: Tensor) -> Tensor:
    """The scales of input and weight, float32 [2], in an extra state."""
    if state.is_meta:
        return state.new_empty(2, dtype=torch.float32)
    try:
        return torch.tensor(read_scales(state.cpu().numpy().tobytes()), dtype=torch.float32, device="cpu")
    except CheckpointError as error:
        raise CheckpointError(f"{key} {error}") from None


def _lag_order(taps: Tensor) -> Tensor:
    """Taps [F,W] in the other one of both orders; it is its own inverse."""
    return taps if taps.shape[-1] >= SWITCH else taps.flip(-1)


def _reorder(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Exchange the first two axes of the rows, which are counted by these axes; other shapes are left alone."""
    count = 1
    for size in rows:
        count *= size
    if tensor.dim() == 0 or tensor.shape[0] != count:
        return tensor
    return tensor.reshape(*rows, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
