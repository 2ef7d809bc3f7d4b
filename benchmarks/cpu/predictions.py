"""What to expect before measuring: counts of multiplications and bytes, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cpu.models import STRIPED
from hyaena.config import ModelConfig
from hyaena.sizes import FLOAT32, ModelSizes

CHUNK = 32
"""Steps of a block of the blocked convolution, as ``hyaena.ops.long_conv.blocked`` cuts them."""


def multiplications(config: ModelConfig, length: int) -> dict[str, float]:
    """Multiply-adds per token of one layer's parts, averaged over a causal prefill of ``length`` tokens.

    A query at position t sees t+1 keys, (length+1)/2 on average, and multiplies each by D channels twice. The long
    filter costs a row of a Toeplitz product and the two products with the N complex states of a chunk.
    """
    d = config.hidden_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return {
        "mlp": 3 * d * config.intermediate_size,
        "attention projections": qkv * d + d * d,
        "attention scores": 2 * d * (length + 1) / 2,
        "hyena projections": 4 * d * d,
        "hyena filters": d * (3 * config.short_filter_length + CHUNK + 4 * config.state_size + 2),
    }


def prefill_multiplications(config: ModelConfig, length: int) -> float:
    """Multiply-adds per token of all layers; the head runs once per prompt and is left out."""
    part = multiplications(config, length)
    mixer = {
        "attention": part["attention projections"] + part["attention scores"],
        "hyena": part["hyena projections"] + part["hyena filters"],
    }
    return sum(mixer[kind] + part["mlp"] for kind in config.layer_types)


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one decoding step moves: weights (embedding rows aside), keys and values, and their copies."""

    weights: float
    cache: float
    copies: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.copies


def decode_bytes(config: ModelConfig, context: int, *, concatenates: bool) -> DecodeBytes:
    """One float32 step at a context; a cache that concatenates reads and writes all of itself at each step."""
    sizes = ModelSizes(config)
    weights = sizes.weight_bytes(FLOAT32) - FLOAT32 * config.vocab_size * config.hidden_size
    cache = context * sizes.kv_bytes_per_token(FLOAT32)
    return DecodeBytes(weights, cache, 2 * cache if concatenates else 0)


def as_transformer(config: ModelConfig) -> ModelConfig:
    """The baseline's shape: the same widths, attention in every layer."""
    return replace(config, layer_types=("attention",) * config.num_layers)


def layers_of(config: ModelConfig, kind: str) -> int:
    """How many layers are of a kind."""
    return config.layer_types.count(kind)


def _fused_projection(config: ModelConfig) -> float:
    """Multiply-adds per token of the fused projection, which the last layer needs for its cache."""
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim * config.hidden_size


def page(config: ModelConfig, length: int = 8192) -> str:
    """The predictions, as Markdown."""
    transformer = as_transformer(config)
    part = multiplications(config, length)
    ours, theirs = prefill_multiplications(config, length), prefill_multiplications(transformer, length)
    filters = layers_of(config, "hyena") * part["hyena filters"]
    spared = part["attention projections"] + part["attention scores"] + part["mlp"] - _fused_projection(config)
    bytes_ours = decode_bytes(config, length, concatenates=False)
    bytes_theirs = decode_bytes(transformer, length, concatenates=True)
    chunk = 2048
    cache_mb = bytes_ours.cache / 1e6
    widest = FLOAT32 * chunk * (3 * config.intermediate_size + 2 * config.hidden_size) / 1e6
    counts = "\n".join(f"| {name} | {value / 1e6:.2f} |" for name, value in part.items())
    return f"""\
These were written down before anything was optimised; `benchmarks/cpu/predictions.py` computes them from the \
configuration.

**Prefill.** Million multiply-adds per token of one layer, {length:,} tokens, causal:

| part | million |
|---|---|
{counts}

{layers_of(config, "hyena")} Hyena and {layers_of(config, "attention")} attention layers: {ours / 1e6:.1f} million \
per token. {transformer.num_layers} attention layers: {theirs / 1e6:.1f} million. The ratio is \
**{theirs / ours:.2f}**, or {theirs / (ours - filters):.2f} when the filters count for nothing: at equal efficiency, \
ours is so much faster, which is where the target of 1.3 comes from.

Added later: since our last layer, attention, computes its output at the last position only, and elsewhere just the \
fused projection, {spared / 1e6:.1f} million are spared, and the ratio is {theirs / (ours - spared):.2f}.

**Decoding at {length:,}.** A step of ours moves {bytes_ours.weights / 1e6:.0f} MB of weights and \
{bytes_ours.cache / 1e6:.0f} MB of keys and values. The baseline moves {bytes_theirs.weights / 1e6:.0f} and \
{bytes_theirs.cache / 1e6:.0f} MB, and its cache concatenates: {bytes_theirs.copies / 1e6:.0f} MB more. By bytes the \
ratio is {bytes_theirs.total / bytes_ours.total:.2f}, or \
{(bytes_theirs.weights + bytes_theirs.cache) / bytes_ours.total:.2f} without the concatenation; a target of 2 needs \
fewer small operations per step as well, and key heads that are read once for all queries that share them.

**Memory of the prefill.** The cache, {cache_mb:.0f} MB, and for a chunk of {chunk:,} tokens the tensors of the widest \
layer, {widest:.0f} MB; with what the allocator keeps, about {cache_mb + 2 * widest:.0f} MB.

**Long convolution.** A prototype of `blocked` ran 6 to 12 times faster than the float32 FFT at these sizes.

**cub at 262,144 bytes.** Chunks are of one size and the states of Hyena blocks are constant, so nothing but the cache \
and the ids may grow: a ratio of 1.
"""


def appendix() -> str:
    """The end of the CPU's page."""
    log = "What was tried, and where a target is not met: [the log](../../docs/log/performance.md)."
    return f"## Predictions\n\n{page(STRIPED)}\n{log}"
