"""The operators of one decoding step: T = 1, memory updated in place, positions read from the device.

``DecodeOperators`` composes them of the plain functions; it is what runs on a CPU, and the twin that
``ops.triton.FusedDecodeOperators`` must equal, where each is one kernel that reads its weights once. The numbers
that differ from step to step (how many slots are used) are tensors, so that a step can be captured as a graph.

Shapes: B rows, D channels, H query heads, G key/value heads, K taps, N modes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.ops.attention import attention
from hyaena.ops.gate import ACTIVATIONS
from hyaena.ops.hyena import HyenaState, hyena
from hyaena.ops.long_conv import ModalFilter
from hyaena.ops.norm import rms_norm
from hyaena.ops.rope import rotate


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and its convention, see ``rms_norm``."""

    weight: Tensor
    eps: float
    eps_inside_root: bool


class Slots(NamedTuple):
    """Where the newest token of every row stands.

    Attributes:
        used: int32 [1], slots in use, the newest among them; it goes to slot ``used - 1`` of every row.
        padding: int32 [B], leading slots of each row that hold no token; its position is ``used - 1 - padding``.
        rotary: cos and sin of every position, float32 [capacity,head_dim/2] each.
    """

    used: Tensor
    padding: Tensor
    rotary: tuple[Tensor, Tensor]


class DecodeOperators:
    """The plain composition.

    A step is ``begin``, the layers' operators, and a choice; ``begin`` comes first in every step.
    """

    def begin(self, ids: Tensor, table: Tensor, slots: Slots) -> Tensor:
        """One more slot is in use, in place, and the embeddings of its tokens: ids [B], table [V,D] -> [B,D]."""
        slots.used.add_(1)
        return torch.nn.functional.embedding(ids, table)

    def greedy(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The most probable token of each row of logits [B,V] into ids [B], in place; 0 where they are not finite.

        Returns:
            float64 [B,3]: the token, its log-probability, and whether the logits were finite.
        """
        best, chosen = logits.max(dim=-1)
        finite = best.isfinite()  # NaN and +infinity win; -infinity only where there is nothing else
        ids.copy_(torch.where(finite, chosen, 0))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.stack([ids.double(), (best - wide.logsumexp(dim=-1)).double(), finite.double()], dim=1)

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``residual + weight·norm(x) + bias``: x [B,D], weight [E,D] -> [B,E]."""
        y = torch.nn.functional.linear(normalise(x, norm), weight, bias)
        return y if residual is None else residual + y

    def gate(self, x: Tensor, gate: Tensor, up: Tensor, *, norm: Norm | None = None, activation: str) -> Tensor:
        """``act(gate·norm(x)) · (up·norm(x))``: x [B,D], both weights [E,D] -> [B,E]."""
        x = normalise(x, norm)
        linear = torch.nn.functional.linear
        return ACTIVATIONS[activation](linear(x, gate)) * linear(x, up)

    def remember(self, qkv: Tensor, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        """Rotate queries and keys of qkv [B,(H+2G)·head_dim], store keys and values; the queries [B,H,head_dim].

        keys, values: [B,G,capacity,head_dim], written at slot ``used - 1``.
        """
        groups, _, width = keys.shape[1:]
        parts = qkv.unflatten(-1, (-1, width))
        heads = parts.shape[1] - 2 * groups
        q, k, v = parts.split([heads, groups, groups], dim=1)
        slot = slots.used - 1
        position = (slot - slots.padding).long()
        table = (slots.rotary[0][position, None], slots.rotary[1][position, None])  # [B,1,head_dim/2]
        q, k = (rotate(t.unsqueeze(2), table).squeeze(2) for t in (q, k))
        keys.index_copy_(2, slot.long(), k.unsqueeze(2))
        values.index_copy_(2, slot.long(), v.unsqueeze(2))
        return q

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, slots: Slots) -> Tensor:
        """Attention of q [B,H,head_dim] to the slots in use; [B,H,head_dim]. Waits for the device."""
        used = int(slots.used)
        padding = slots.padding if bool(slots.padding.any()) else None
        return attention(q.unsqueeze(2), keys[:, :, :used], values[:, :, :used], padding=padding).squeeze(2)

    def hyena(
        self, z: Tensor, short_weight: Tensor, short_bias: Tensor, long_filter: ModalFilter, state: HyenaState
    ) -> Tensor:
        """One step of ``ops.hyena``, z [B,3D] -> [B,D]; both states move on in place."""
        y, new = hyena(z.unsqueeze(1), short_weight, short_bias, long_filter, state)
        for old, now in zip(state, new, strict=True):
            old.copy_(now)
        return y.squeeze(1)


def normalise(x: Tensor, norm: Norm | None) -> Tensor:
    """``rms_norm``, or x itself."""
    if norm is None:
        return x
    return rms_norm(x, norm.weight, norm.eps, eps_inside_root=norm.eps_inside_root)
