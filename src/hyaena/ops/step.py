"""The operators of one decoding step: T = 1, states updated in place, lengths read from the device.

``DecodeOperators`` composes them of the plain functions. It runs on every device and is the reference that
``ops.triton.decode.operators.FusedDecodeOperators`` must equal, where each is one kernel that reads its weights once.
The numbers that differ from step to step (how many tokens a row holds) are tensors, so that a step can be captured in a
CUDA graph.

Shapes: B rows, D channels, H query heads, G key/value heads, K taps, N modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.ops.attention import attention, sdpa
from hyaena.ops.backend import PLAIN
from hyaena.ops.gate import ACTIVATIONS
from hyaena.ops.hyena import HyenaState, hyena
from hyaena.ops.kv import KVState
from hyaena.ops.linear import Linear, linear
from hyaena.ops.long_conv import Filter
from hyaena.ops.norm import rms_norm
from hyaena.ops.pages import PagedKVState, PagedRows, PageTable
from hyaena.ops.rope import rotate


class RMSNormWeight(NamedTuple):
    """An RMSNorm: weight [D] and its convention, see ``rms_norm``."""

    weight: Tensor
    eps: float
    eps_inside_root: bool


Norm = RMSNormWeight | Callable[[Tensor], Tensor]
"""A record of a norm, which kernels may read, or anything that maps [..., D] to [..., D] when it is called."""


class StepContext(NamedTuple):
    """What every layer needs to know of one decoding step.

    Attributes:
        operators: that compute the step.
        lengths: int32 [B], tokens of each row, the newest among them; its position and slot are ``lengths - 1``.
        limits: int32 [B], the most tokens of each row. A row that is full overwrites its last slot: nothing is written
            outside of its storage, and its results mean nothing.
        rotary: cos and sin of every position, float32 [positions,head_dim/2] each.
        pages: the pages of the rows where keys and values are on pages, else None.
    """

    operators: DecodeOperators
    lengths: Tensor
    limits: Tensor
    rotary: tuple[Tensor, Tensor]
    pages: PageTable | None = None


class DecodeOperators:
    """The plain composition. Every step begins with ``embed``.

    Attributes:
        backend: what evaluates norms and rotary positions.
    """

    backend = PLAIN

    def record(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
        """Take a step over static memory: its result, and what takes the next ones, here the same function.

        Operators that can repeat a step at less cost than calls return a function that does; its result is in the same
        memory each time.
        """
        return step(), step

    def embed(self, ids: Tensor, table: Tensor | Callable[[Tensor], Tensor], context: StepContext) -> Tensor:
        """Count one more token in every row, in place, and look up ids [B] in the table [V,D]: [B,D]."""
        torch.minimum(context.lengths + 1, context.limits, out=context.lengths)
        return torch.nn.functional.embedding(ids, table) if isinstance(table, Tensor) else table(ids)

    def last_tokens(self, x: Tensor) -> Tensor:
        """The tokens [R,D] of x [B,D] whose successors are chosen: all of them, where each is of a row of its own."""
        return x

    def argmax(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Write the most probable token of each row of logits [B,V] into ids [B]; 0 where they are not finite.

        Returns:
            float64 [B,3]: the token, its log-probability, and whether the logits were finite.
        """
        best, chosen = logits.max(dim=-1)
        finite = best.isfinite()  # NaN and +infinity win; -infinity only where there is nothing else
        ids.copy_(torch.where(finite, chosen, 0))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = -(wide - best[:, None]).logsumexp(dim=-1)  # large logits cost no digits
        return torch.stack([ids.double(), logprobs.double(), finite.double()], dim=1)

    def linear(self, x: Tensor, layer: Linear, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """``residual + weight·norm(x) + bias``: x [B,D] -> [B,E]."""
        return linear(self.normalise(x, norm), layer, residual=residual)

    def gate(self, x: Tensor, gate: Linear, up: Linear, *, norm: Norm | None = None, activation: str) -> Tensor:
        """``act(gate·norm(x)) · (up·norm(x))``: x [B,D] -> [B,E]."""
        x = self.normalise(x, norm)
        return ACTIVATIONS[activation](linear(x, gate)) * linear(x, up)

    def attention(self, qkv: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        """Rotate queries and keys of qkv [B,(H+2G)·head_dim], store keys and values, attend: [B,H,head_dim]."""
        return self.attend(self.rotate_and_cache(qkv, state, context), state, context)

    def rotate_and_cache(self, qkv: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        """Rotate queries and keys of qkv [B,(H+2G)·head_dim], store keys and values; the queries [B,H,head_dim].

        Waits for the device.
        """
        kv = state.through(context.pages)
        q, k, v, position = self._rotated(qkv, kv, context)
        kv.write(k.unsqueeze(2), v.unsqueeze(2), position.tolist())
        return q

    def _rotated(
        self, qkv: Tensor, kv: KVState | PagedRows, context: StepContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B,H,head_dim], keys and values [B,G,head_dim] of the newest tokens, and their positions [B]."""
        groups, width = kv.groups, kv.head_dim
        parts = qkv.unflatten(-1, (-1, width))
        q, k, v = parts.split([parts.shape[1] - 2 * groups, groups, groups], dim=1)
        position = (context.lengths - 1).long()
        table = (context.rotary[0][position, None], context.rotary[1][position, None])  # [B,1,head_dim/2]
        q, k = (rotate(t.unsqueeze(2), table, backend=self.backend).squeeze(2) for t in (q, k))
        return q, k, v, position

    def attend(self, q: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        """Attention of q [B,H,head_dim] to the tokens of each row; [B,H,head_dim]. Waits for the device."""
        parts = [
            attention(q[run.rows].unsqueeze(2), *run.read(q)).squeeze(2)
            for run in state.through(context.pages).runs(context.lengths.tolist())
        ]
        return torch.cat(parts)

    def hyena(
        self, z: Tensor, short_weight: Tensor, short_bias: Tensor | None, long_filter: Filter, state: HyenaState
    ) -> Tensor:
        """One step of ``ops.hyena``, z [B,3D] -> [B,D]; both states are updated in place."""
        y, new = hyena(z.unsqueeze(1), short_weight, short_bias, long_filter, state, backend=self.backend)
        for old, now in zip(state, new, strict=True):
            old.copy_(now)
        return y.squeeze(1)

    def hyena_at(
        self,
        z: Tensor,
        short_weight: Tensor,
        short_bias: Tensor | None,
        long_filter: Filter,
        state: HyenaState,
        source: Tensor,
        target: Tensor,
    ) -> Tensor:
        """``hyena`` of rows whose states have places in one of more rows, which may lie apart in memory.

        Args:
            z: [B,3D].
            short_weight, short_bias, long_filter: see ``hyena``.
            state: of S rows, each contiguous.
            source: int [B], whose state a row of z continues.
            target: int [B], where the state behind it is written. Several rows may write one that nobody reads.
        """
        taken = HyenaState(*(t[source.long()] for t in state.tensors()))
        y = self.hyena(z, short_weight, short_bias, long_filter, taken)
        for old, now in zip(state.tensors(), taken.tensors(), strict=True):
            old[target.long()] = now
        return y

    def normalise(self, x: Tensor, norm: Norm | None) -> Tensor:
        """Apply a norm, or return x itself where there is none."""
        if norm is None:
            return x
        if isinstance(norm, RMSNormWeight):
            return rms_norm(x, norm.weight, norm.eps, eps_inside_root=norm.eps_inside_root, backend=self.backend)
        return norm(x)


class CompilableOperators(DecodeOperators):
    """The plain composition as one graph for torch.compile: nothing waits for the device.

    The rows must have storage of one allocation (``KVState.store``), and attention reads all of it, under a mask.
    """

    def rotate_and_cache(self, qkv: Tensor, state: KVState, context: StepContext) -> Tensor:
        q, k, v, position = self._rotated(qkv, state, context)
        rows = torch.arange(len(q), device=q.device)
        for old, new in zip(state.store, (k, v), strict=True):
            old[rows, :, position] = state.slots.encode(new)
        return q

    def attend(self, q: Tensor, state: KVState, context: StepContext) -> Tensor:
        keys, values = (state.slots.decode(t, q) for t in state.store)
        seen = torch.arange(keys.shape[2], device=q.device) < context.lengths[:, None]
        rows = q.unflatten(1, (keys.shape[1], -1))  # the queries that share a key head: every key is read once
        return sdpa(rows, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)
