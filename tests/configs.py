"""The configurations that tests share: small, and with all that distinguishes the two published families."""

from __future__ import annotations

from dataclasses import replace

from hyaena.config import ModelConfig

TINY = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    layer_types=("hyena", "attention", "hyena"),
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
    name="tiny",
)
"""The shape of StripedHyena-Hessian-7B: grouped key/value heads, no biases in attention, eps inside the root."""

TINY_EVO = replace(
    TINY,
    num_key_value_heads=4,
    state_size=5,
    activation="gelu",
    norm_eps=1e-6,
    norm_eps_inside_root=False,
    tie_embeddings=True,
    attention_qkv_bias=True,
    attention_out_bias=True,
    rope_scaling_factor=16.0,
    name="tiny-evo",
)
"""The shape of Evo 1: as many key/value heads as heads, biases, gelu, eps outside the root, a tied head."""

TINY_EVO2 = replace(
    TINY_EVO,
    layer_types=("hyena_se", "attention", "hyena_mr", "hyena_li"),
    se_filter_groups=4,
    mr_filter_groups=8,
    state_size=3,
    hyena_in_bias=False,
    short_filter_bias=False,
    activation="identity",
    first_activation="gelu",
    attention_qkv_bias=False,
    rope_frequencies_stored=True,
    rope_tables_rounded=True,
    name="tiny-evo2",
)
"""The shape of Evo 2: every kind of layer, few biases, gelu in layer 0 alone, rotary frequencies of the checkpoint."""

TINY_BYTES = ModelConfig(
    vocab_size=259,
    hidden_size=16,
    layer_types=("hyena", "attention"),
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    state_size=2,
    max_length=512,
    tokenizer="bytes",
)
"""A model of text, byte by byte."""
