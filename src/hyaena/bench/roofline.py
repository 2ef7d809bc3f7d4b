"""What a computation cannot do without: the bytes of a decoding step, the operations of a prefill.

Pure arithmetic on a configuration. A floor is a lower bound of the work, so that a fraction of it never flatters:
caches, kernels and launches can only add to it.

Letters as in ``docs/architecture.md``: B batch, T time, D channels, H query heads, G key/value heads, K taps, N modes,
V vocabulary.
"""

from __future__ import annotations

from hyaena.config import ModelConfig

FLOAT32 = 4
"""Bytes of the numbers that are never narrower: poles, residues, and each half of a state."""


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of all weights, for a dtype of ``itemsize`` bytes; poles and residues are float32 at least."""
    filters = config.layer_types.count("hyena") * 4 * config.hidden_size * config.state_size
    return config.num_parameters * itemsize + filters * (max(itemsize, FLOAT32) - itemsize)


def state_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one sequence's states in all Hyena layers: N complex numbers and K-1 inputs per channel."""
    modes = config.hidden_size * config.state_size * 2 * max(itemsize, FLOAT32)
    taps = 3 * config.hidden_size * (config.short_filter_length - 1) * itemsize
    return config.layer_types.count("hyena") * (modes + taps)


def decode_bytes(config: ModelConfig, batch: int, context: int, itemsize: int) -> int:
    """Bytes of one decoding step: ``weights + B·(context·slot + 2·state)``.

    Every weight is read once, but for the rows of an untied embedding, of which a token needs one. Keys and values of
    the context are read, states are read and written.
    """
    weights = weight_bytes(config, itemsize)
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.hidden_size * itemsize
    return weights + batch * (context * config.kv_bytes_per_token(itemsize) + 2 * state_bytes(config, itemsize))


def prefill_flops(config: ModelConfig, length: int) -> int:
    """Operations of a prefill of one sequence: ``2·W·T + A·4·D·T²/2 + 2·V·D``.

    W are the weights that every token meets (embedding and head aside), A the attention layers, whose scores and sums
    take 4·D operations per pair of positions, half of which are causal. Logits are of the last position only. The Hyena
    operator between its projections is bound by memory and counts nothing but its weights.
    """
    embeddings = config.vocab_size * config.hidden_size
    weights = config.num_parameters - embeddings * (1 if config.tie_embeddings else 2)
    attention = config.layer_types.count("attention") * 2 * config.hidden_size * length**2
    return 2 * weights * length + attention + 2 * embeddings


def spared_flops(config: ModelConfig, length: int) -> int:
    """Operations that ``prefill_flops`` counts and logits of the last position do not need.

    Nothing reads the last layer's output elsewhere: its scores, its output projection and its MLP, for all positions
    but one.
    """
    width = config.hidden_size
    scores = 2 * width * length**2 if config.layer_types[-1] == "attention" else 0
    return scores + 2 * (length - 1) * (width**2 + 3 * width * config.intermediate_size)


def needed_flops(config: ModelConfig, length: int) -> int:
    """Operations of a prefill without those that logits of the last position do not need: a lower bound."""
    return prefill_flops(config, length) - spared_flops(config, length)


def operator_bytes(config: ModelConfig, length: int, itemsize: int) -> int:
    """Bytes of one fused Hyena operator over one sequence: 3·D numbers per token are read and D written."""
    return 4 * config.hidden_size * length * itemsize
