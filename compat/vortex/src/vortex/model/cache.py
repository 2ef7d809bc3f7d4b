"""What a model remembers between calls: the original's objects, and the same tensors as a cache of hyaena.

The dictionaries of the objects are the only storage. They hold tensors of the original's shapes, by layer, which
programs may read, copy, reorder, save and move between devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyaena import ops
from hyaena.cache import Cache
from hyaena.compat import leading_mask, with_room
from hyaena.context import ForwardContext
from hyaena.errors import InputError

if TYPE_CHECKING:
    from vortex.model.model import StripedHyena

NAMES = {"attention": "mha", "hyena_li": "hcl", "hyena_mr": "hcm", "hyena_se": "hcs"}
"""hyaena's kinds of layers → the original's."""


@dataclass
class InferenceParams:
    """Keys and values of the attention layers, and what was read.

    Attributes:
        max_seqlen, max_batch_size, seqlen_offset, batch_size_offset, lengths_per_sample: the callers' own. The model
            reads none of them: it knows how many tokens it holds, and grows.
        key_value_memory_dict: layer → [B,capacity,2,H,head_dim], keys after rotation and values; a row's tokens fill
            its first slots.
        room: tokens for which there is room from the first call on.
        lengths: how many tokens each row holds. Written by the model.
        tokens: the ids that were read, [B,T] of each call, padding included. Written by the model.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None
    room: int = 0
    lengths: list[int] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Forget everything."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        self.key_value_memory_dict.clear()
        self.lengths, self.tokens = [], []


@dataclass
class HyenaCascadeIIRInferenceParams:
    """States of the layers with modal filters (hcl).

    Attributes:
        fir_filter_length, state_dim: K and N of the model.
        seqlen_offset: the callers' own.
        fir_state_dict: layer → [B,3D,K-1], the last inputs of the short filter, oldest first, in the channel order of
            the checkpoint.
        state_dict: layer → float32 [B,D,N], the state of the long filter.
    """

    fir_filter_length: int = 3
    state_dim: int = 16
    seqlen_offset: int = 0
    fir_state_dict: dict[int, Tensor] = field(default_factory=dict)
    state_dict: dict[int, Tensor] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything."""
        self.seqlen_offset = 0
        self.fir_state_dict.clear()
        self.state_dict.clear()


@dataclass
class HyenaCascadeFIRInferenceParams:
    """States of the layers with explicit inner filters of W taps (hcs and hcm).

    Attributes:
        fir_filter_length, fir_inner_filter_length: K and W of the model.
        seqlen_offset: the callers' own.
        fir_inner_state_dict: layer → [B,D,W-1], the last inputs of the inner filter, oldest first. What was before the
            first token is zero; the original held fewer columns there.
        fir_state_dict: as in :class:`HyenaCascadeIIRInferenceParams`.
        state_dict: empty.
    """

    fir_filter_length: int = 3
    fir_inner_filter_length: int = 4
    seqlen_offset: int = 0
    fir_inner_state_dict: dict[int, Tensor] = field(default_factory=dict)
    fir_state_dict: dict[int, Tensor] = field(default_factory=dict)
    state_dict: dict[int, Tensor] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything."""
        self.seqlen_offset = 0
        self.fir_inner_state_dict.clear()
        self.fir_state_dict.clear()


def long_states(params: Any) -> dict[int, Tensor]:
    """The states of the inner filters by layer: windows of inputs, or modes."""
    return params.state_dict if isinstance(params, HyenaCascadeIIRInferenceParams) else params.fir_inner_state_dict


def device_of(block: nn.Module) -> torch.device:
    """Where a block is."""
    return next(block.parameters()).device


class Pass:
    """One forward pass: what its layers share, on every device, and what each remembers (None without a cache)."""

    def __init__(self, context: ForwardContext, states: list[Any]) -> None:
        self.states = states
        self._context, self._moved = context, {}

    def context(self, device: torch.device) -> ForwardContext:
        """What the layers on a device share."""
        if device not in self._moved:
            self._moved[device] = self._context.to(device)
        return self._moved[device]


class Memory:
    """The tensors of the objects as a cache of hyaena, for one pass over [B,T] tokens.

    Raises:
        InputError: the objects are incomplete, or hold another number of rows.
    """

    def __init__(self, model: StripedHyena, params: Mapping[str, Any], rows: int, steps: int) -> None:
        try:
            self.params = {name: params[name] for name in NAMES.values()}
        except (KeyError, TypeError):
            raise InputError("inference_params_dict must be what initialize_inference_params() returns") from None
        self.mha: InferenceParams = self.params["mha"]
        self.layers = [(i, NAMES[kind], block) for i, (kind, block) in enumerate(model.kinds_and_blocks())]
        self.empty = self._is_empty()
        lengths = [0] * rows if self.empty else self.mha.lengths
        if len(set(lengths)) == 1:  # rows of the tensors may have been chosen anew
            lengths = lengths[:1] * rows
        self.keys_values: dict[int, Tensor] = {}
        states: list[Any] = []
        for i, name, block in self.layers:
            if name == "mha":
                attention, device = block.inner_mha_cls, device_of(block)
                stored = self.mha.key_value_memory_dict.get(i)
                room = max(lengths, default=0) + steps
                if stored is None:
                    room = max(room, self.mha.room)
                shape = (rows, room, 2, attention.groups, attention.head_dim)
                self._check_rows(stored, rows)
                self.keys_values[i] = with_room(stored, shape, model.dtype, device)
                states.append(ops.KVState.over(*self.keys_values[i].transpose(1, 3).unbind(2)))
            elif self.empty:
                states.append(block.filter.make_state(rows, model.dtype))
            else:
                short, long = self.params[name].fir_state_dict[i], long_states(self.params[name])[i]
                self._check_rows(short, rows)
                states.append(ops.HyenaState(block.filter.to_blocks(short, 1), long))
        if len(lengths) != rows:
            raise InputError(f"inference_params_dict holds rows of unequal lengths, {lengths}: keep all of its rows")
        self.cache = Cache(states, lengths, [None] * rows, owner=model)

    def _is_empty(self) -> bool:
        """Whether nothing was read yet. Raises InputError where some layers lack their states."""
        held = {(i, name, part) for name in NAMES.values() for part, i in self._held(name)}
        wanted = {
            (i, name, part) for i, name, _ in self.layers for part in (("kv",) if name == "mha" else ("short", "long"))
        }
        if held and held != wanted:
            raise InputError("inference_params_dict holds some layers only: call initialize_inference_params() anew")
        return not held

    def _held(self, name: str) -> list[tuple[str, int]]:
        params = self.params[name]
        if name == "mha":
            return [("kv", i) for i in params.key_value_memory_dict]
        return [("short", i) for i in params.fir_state_dict] + [("long", i) for i in long_states(params)]

    def _check_rows(self, stored: Tensor | None, rows: int) -> None:
        if stored is not None and len(stored) != rows:
            raise InputError(
                f"inference_params_dict holds {len(stored)} rows and the ids {rows}: "
                "call initialize_inference_params() for another batch"
            )

    def commit(self, ids: Tensor | None) -> None:
        """Write the cache, brought up to date by a pass over these ids, back to the objects."""
        for i, name, block in self.layers:
            if name != "mha":
                state = self.cache.states[i]
                self.params[name].fir_state_dict[i] = block.filter.to_checkpoint(state.short, 1)
                long_states(self.params[name])[i] = state.long
        self.mha.key_value_memory_dict.update(self.keys_values)
        self.mha.lengths = list(self.cache.lengths)
        if ids is not None:
            self.mha.tokens.append(ids.detach())


def _positions(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In the place of rotary tables: every attention layer has frequencies, and so tables, of its own."""
    return positions, positions


def make_context(ids: Tensor, padding_mask: Tensor | None, cache: Cache | None, dtype: torch.dtype) -> ForwardContext:
    """Check the arguments of a pass over ids [B,T], and compute what its layers share.

    Raises:
        InputError: ids or a mask that cannot be used.
    """
    if padding_mask is not None:
        padding_mask = leading_mask(padding_mask, tuple(ids.shape), cached=cache is not None).to(ids.device)
    return ForwardContext.of(
        _positions,
        ids,
        cache=cache,
        mask=padding_mask,
        segment_ids=None,
        method="auto",
        backend=ops.resolve_backend("auto", device=ids.device, dtype=dtype, gradients=torch.is_grad_enabled()),
        dtype=dtype,
    )
