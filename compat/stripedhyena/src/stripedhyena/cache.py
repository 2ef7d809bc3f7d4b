"""What a model remembers between calls: the original's two objects, and the same tensors as a cache of hyaena.

The dictionaries of the two objects are the only storage. They hold tensors of the original's shapes, by layer, which
programs may read, copy, save and move between devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyaena import ModelConfig, ops
from hyaena.cache import Cache
from hyaena.compat import leading_mask, with_room
from hyaena.context import ForwardContext
from hyaena.errors import InputError
from hyaena.layers import Rotary

if TYPE_CHECKING:
    from stripedhyena.model import StripedHyena


@dataclass
class InferenceParams:
    """Keys and values of the attention layers.

    Attributes:
        max_seqlen, max_batch_size, seqlen_offset, batch_size_offset, lengths_per_sample: the callers' own. The model
            reads none of them: it knows how many tokens it holds, and grows.
        key_value_memory_dict: layer → [B,capacity,2,G,head_dim], keys and values; a row's tokens fill its first slots.
        lengths: how many tokens each row holds. Written by the model.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None
    lengths: list[int] = field(default_factory=list)

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Forget everything."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        self.key_value_memory_dict.clear()
        self.lengths = []


@dataclass
class RecurrentInferenceParams:
    """States of the Hyena layers.

    Attributes:
        fir_filter_length, state_dim: K and N of the model.
        seqlen_offset, max_batch_size: the callers' own; the model reads neither.
        fir_state_dict: layer → [B,3D,K-1], the last inputs of the short filter, oldest first, in the channel order of
            the checkpoint.
        state_dict: layer → complex64 [B,D,N], the state of the long filter.
    """

    fir_filter_length: int = 3
    state_dim: int = 16
    seqlen_offset: int = 0
    max_batch_size: int = 1
    fir_state_dict: dict[int, Tensor] = field(default_factory=dict)
    state_dict: dict[int, Tensor] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything."""
        self.seqlen_offset = 0
        self.fir_state_dict.clear()
        self.state_dict.clear()


@dataclass
class Pass:
    """One forward pass: what its layers share, and what each remembers (None without a cache)."""

    context: ForwardContext
    states: list[Any]

    @classmethod
    def stateless(cls, config: ModelConfig, u: Tensor, inference_params: Any, padding_mask: Tensor | None) -> Pass:
        """The pass of a block that is called by itself, over u [B,T,D]."""
        if inference_params is not None:
            raise InputError("a block that is called by itself takes no inference_params: call the model")
        ids = torch.zeros(u.shape[:2], dtype=torch.int64, device=u.device)
        return cls(make_context(config, ids, padding_mask, None, u.dtype), [None] * config.num_layers)


class Memory:
    """The tensors of the two objects as a cache of hyaena, for one pass over ids [B,T].

    Raises:
        InputError: the objects are incomplete, or hold another number of rows.
    """

    def __init__(self, model: StripedHyena, params: Mapping[str, Any], ids: Tensor) -> None:
        try:
            self.mha, self.hyena = params["mha"], params["hyena"]
        except (KeyError, TypeError):
            raise InputError("inference_params_dict must be what initialize_inference_params() returns") from None
        kinds = model.architecture.layer_types
        self.filters: dict[int, Any] = {i: model.blocks[i].filter for i, kind in enumerate(kinds) if kind == "hyena"}
        held = [set(d) for d in (self.mha.key_value_memory_dict, self.hyena.fir_state_dict, self.hyena.state_dict)]
        self.empty = not any(held)
        hyena = set(self.filters)
        if not self.empty and held != [set(range(len(kinds))) - hyena, hyena, hyena]:
            raise InputError("inference_params_dict holds some layers only: call initialize_inference_params() anew")
        rows, steps = ids.shape
        lengths = [0] * rows if self.empty else self.mha.lengths
        if len(lengths) != rows:
            raise InputError(
                f"inference_params_dict holds {len(lengths)} rows and the ids {rows}: "
                "call initialize_inference_params() for another batch"
            )
        method = model.architecture.prefill_method if self.empty else "auto"
        self.keys_values: dict[int, Tensor] = {}
        states: list[Any] = []
        for i, block in enumerate(model.blocks):
            if i in self.filters:
                states.append(self._hyena_state(i, rows, method, model.dtype))
            else:
                attention: Any = block.inner_mha_cls
                shape = (rows, max(lengths, default=0) + steps, 2, attention.groups, attention.head_dim)
                stored = with_room(self.mha.key_value_memory_dict.get(i), shape, model.dtype, ids.device)
                self.keys_values[i] = stored
                states.append(ops.KVState.over(*stored.transpose(1, 3).unbind(2)))
        self.method = method
        self.cache = Cache(states, lengths, [None] * rows, owner=model)

    def _hyena_state(self, layer: int, rows: int, method: str, dtype: torch.dtype) -> ops.HyenaState:
        part = self.filters[layer]
        if self.empty:
            return part.make_state(rows, method, dtype)
        return ops.HyenaState(part.to_blocks(self.hyena.fir_state_dict[layer], 1), self.hyena.state_dict[layer])

    def commit(self) -> None:
        """Write the cache, brought up to date by a pass, back to the two objects."""
        for i, part in self.filters.items():
            state = self.cache.states[i]
            self.hyena.fir_state_dict[i] = part.to_heads(state.short, 1)
            self.hyena.state_dict[i] = state.long
        self.mha.key_value_memory_dict.update(self.keys_values)
        self.mha.lengths = list(self.cache.lengths)


def make_context(
    config: ModelConfig,
    ids: Tensor,
    padding_mask: Tensor | None,
    memory: Memory | None,
    dtype: torch.dtype,
) -> ForwardContext:
    """Check the arguments of a pass, and compute what its layers share.

    Raises:
        InputError: ids or a mask that cannot be used.
    """
    if padding_mask is not None:
        padding_mask = leading_mask(padding_mask, tuple(ids.shape), cached=memory is not None)
    return ForwardContext.of(
        Rotary(config),
        ids,
        cache=None if memory is None else memory.cache,
        mask=padding_mask,
        segment_ids=None,
        method="auto" if memory is None else memory.method,
        backend=ops.resolve_backend("auto", device=ids.device, dtype=dtype, gradients=torch.is_grad_enabled()),
        dtype=dtype,
    )
