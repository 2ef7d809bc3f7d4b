"""What a StripedHyena model is: one frozen, typed record, checked in one place.

Nothing here imports torch, so reading a configuration is instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hyaena.errors import ConfigError

LayerType = Literal["attention", "hyena"]
Activation = Literal["silu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one StripedHyena model.

    Shapes are written with the letters of ``docs/architecture.md``: D channels, H query heads, G key/value
    heads, K short-filter taps, N modes per channel, V vocabulary.

    Attributes:
        vocab_size: V, rows of the embedding.
        hidden_size: D, channels of the residual stream.
        layer_types: one entry per layer, ``"hyena"`` or ``"attention"``; the stripes.
        intermediate_size: width of the gated MLP.
        num_attention_heads: H; also the number of heads by which original checkpoints interleave Hyena projections.
        num_key_value_heads: G, a divisor of H.
        state_size: N, modes of each channel's long filter.
        short_filter_length: K, taps of the short depthwise filter.
        activation: the MLP's gate activation; ``"gelu"`` is the exact (erf) form.
        norm_eps: the epsilon of every RMSNorm.
        norm_eps_inside_root: True for ``x / sqrt(mean(x^2) + eps)`` (SH-7B), False for
            ``x / (sqrt(mean(x^2)) + eps)`` (Evo).
        tie_embeddings: the head reuses the embedding matrix.
        attention_qkv_bias: the fused attention projection has a bias.
        attention_out_bias: the attention output projection has a bias.
        rope_theta: base of the rotary frequencies.
        rope_scaling_factor: positions are divided by this (linear interpolation); 1 leaves them alone.
        max_length: the longest sequence that the model is meant for, in tokens.
        column_split_hyena: how the *original* checkpoint layout stores this model's Hyena projections: interleaved
            per head (True) or as three blocks. Read only when original files are loaded or written.
        prefill_style: the evaluation method that the original YAML asks for, kept for the entry script
            ``generate.py``; models choose by themselves unless told.
        tokenizer: ``"hf"`` (a ``tokenizer.json``), ``"characters"`` (Evo) or ``"bytes"``.
        name: a label for people.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[LayerType, ...]
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    state_size: int
    short_filter_length: int = 3
    activation: Activation = "silu"
    norm_eps: float = 1e-5
    norm_eps_inside_root: bool = True
    tie_embeddings: bool = False
    attention_qkv_bias: bool = False
    attention_out_bias: bool = False
    rope_theta: float = 10_000.0
    rope_scaling_factor: float = 1.0
    max_length: int = 8192
    column_split_hyena: bool = True
    prefill_style: str = "auto"
    tokenizer: Literal["hf", "characters", "bytes"] = "hf"
    name: str = "striped-hyena"

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
