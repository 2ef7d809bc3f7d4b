"""hyaena's norm, MLP and attention under the original's names, and the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyaena import ModelConfig, layers, ops
from hyaena.compat import ParallelGatedMLP, Renamed, RMSNorm
from hyaena.errors import InputError

if TYPE_CHECKING:
    from stripedhyena.cache import Pass

__all__ = ["MHA", "ParallelGatedMLP", "RMSNorm", "Unembedding", "VocabParallelEmbedding"]


class RotaryEmbedding(nn.Module):
    """The buffer ``inv_freq`` that checkpoints of the original hold: theta^(-2i/head_dim), float32 [head_dim/2].

    It is written to state dicts and ignored at load: the angles are computed from the configuration.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.register_buffer("inv_freq", self._frequencies(None))

    def _frequencies(self, device: torch.device | None) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return 1.0 / self.theta**exponents

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        self.inv_freq = self._frequencies(fn(self.inv_freq).device)  # no cast of the model narrows it
        return self

    def _load_from_state_dict(self, *_: Any) -> None:
        return


class MHA(Renamed, layers.Attention):
    """hyaena's attention: ``Wqkv``, rotary positions, causal softmax, ``out_proj``."""

    names: ClassVar = {"qkv_proj": "Wqkv", "o_proj": "out_proj"}

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, x: Tensor, run: Pass) -> Tensor:  # type: ignore[override]
        y, run.states[self.layer_idx] = super().forward(x, run.context, run.states[self.layer_idx], x.shape[1])
        return y


class VocabParallelEmbedding(nn.Embedding):
    """The embedding, and the head by its transpose."""

    def embed(self, ids: Tensor) -> Tensor:
        """Look up int32 or int64 ids [B,T]: [B,T,D]."""
        try:
            return self(ids if ids.dtype == torch.int32 else ids.long())
        except IndexError:  # on a CPU; elsewhere looking at the ids would stall the device
            low, high = (int(t) for t in torch.aminmax(ids))
            raise InputError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.num_embeddings}: "
                "use the tokenizer of this model"
            ) from None

    def unembed(self, u: Tensor) -> Tensor:
        """Logits [B,T,V] of the final hidden states u [B,T,D]."""
        return ops.linear(u, ops.Dense(self.weight))


class Unembedding(VocabParallelEmbedding):
    """A head with a matrix of its own. It is called as a module, so that its hooks see hidden states and logits."""

    def forward(self, u: Tensor) -> Tensor:
        return super().unembed(u)

    def unembed(self, u: Tensor) -> Tensor:
        return self(u)
