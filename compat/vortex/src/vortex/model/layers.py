"""hyaena's norm, MLP, attention and projections under the original's names, the embedding and the head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from hyaena import ModelConfig, layers, ops
from hyaena.compat import ParallelGatedMLP, Renamed, RMSNorm

if TYPE_CHECKING:
    from vortex.model.cache import Pass

__all__ = [
    "MHA",
    "Lambda",
    "ParallelGatedMLP",
    "RMSNorm",
    "RotaryEmbedding",
    "TELinear",
    "VocabParallelEmbedding",
    "VocabParallelUnembedding",
]


class RotaryEmbedding(Renamed, layers.Rotary):
    """hyaena's rotary tables with the buffer ``inv_freq``, float32 [head_dim/2] through every cast."""

    names: ClassVar = {"frequencies": "inv_freq"}


class MHA(Renamed, layers.Attention):
    """hyaena's attention: ``Wqkv``, rows [q | k | v], rotary positions, causal softmax, ``out_proj``."""

    names: ClassVar = {"qkv_proj": "Wqkv", "o_proj": "out_proj"}
    _version = 2
    """In the metadata of state dicts of this package: the rows of ``Wqkv`` have this order. Those of published
    checkpoints are [q | k | v] of each head."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, x: Tensor, run: Pass) -> Tensor:  # type: ignore[override]
        context = run.context(x.device)
        context = replace(context, rotary=self.rotary_emb(context.rotary[0], x.dtype))
        y, run.states[self.layer_idx] = super().forward(x, context, run.states[self.layer_idx], x.shape[1])
        return y


class TELinear(nn.Linear):
    """The input projections of a Hyena block. Returns, as the original's, a tuple: y [B,T,3D] and None."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class VocabParallelEmbedding(nn.Embedding):
    """The embedding, and the head by its transpose."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Look up int32 or int64 ids [B,T]: [B,T,D]."""
        return layers.embed(super().forward, ids, self.num_embeddings)  # type: ignore[arg-type]

    def unembed(self, u: Tensor) -> Tensor:
        """Logits [B,T,V] of the final hidden states u [B,T,D]."""
        return ops.linear(u, ops.Dense(self.weight))


class VocabParallelUnembedding(VocabParallelEmbedding):
    """A head with a matrix of its own."""

    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        return self.unembed(u)


class Lambda(nn.Module):
    """A function as a module, so that it can have hooks: the tied head."""

    def __init__(self, func: Any) -> None:
        super().__init__()
        self.func = func

    def forward(self, u: Tensor) -> Tensor:
        return self.func(u)
