"""The baseline: transformers' Mistral of the same widths, all layers attention, evaluated as its users do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hyaena.config import ModelConfig


class Mistral:
    """A MistralForCausalLM with the widths of one of our configurations, and its DynamicCache.

    Scaled-dot-product attention, no sliding window, logits of the last position only.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        widths: dict[str, Any] = dict(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            sliding_window=None,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            dtype=str(dtype).removeprefix("torch."),
        )
        self.config = config
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that the weights are never any wider
        try:
            with torch.device(device):
                self.model: Any = MistralForCausalLM(MistralConfig(**widths)).eval()
        finally:
            torch.set_default_dtype(before)
        self.cache: Any = None

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """Read a prompt [1,T] into a new cache, in one pass or in chunks; logits [1,V] after it."""
        self.cache = None
        for part in ids.split(chunk or ids.shape[1], dim=1):
            out = self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
        return out.logits[:, -1]

    def static_cache(self, batch: int, length: int) -> Any:
        """An empty StaticCache, allocated in full."""
        from transformers import StaticCache

        weight = next(self.model.parameters())
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        heads, width = self.config.num_key_value_heads, self.config.head_dim
        cache.early_initialization(batch, heads, width, weight.dtype, weight.device)
        return cache

    def step(self, ids: Tensor) -> Tensor:
        """Read one token [1,1]; logits [1,V] after it."""
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def rewind(self, length: int) -> None:
        """Forget what came after the first ``length`` tokens."""
        surplus = self.cache.get_seq_length() - length
        if surplus:
            self.cache.crop(-surplus)
