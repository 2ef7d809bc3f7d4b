"""Sizes of a model, computed from its configuration: parameters, bytes and operations. No torch.

One table, ``LAYER_SIZES``, gives the sizes of each kind of layer; ``ModelSizes`` sums them over a model. Bytes and
operations are lower bounds: caches, kernels and launches can only add to them.

Letters as in ``docs/architecture.md``: B batch, T time, D channels, H query heads, G key/value heads, K short-filter
taps, N modes, W taps and F groups of an explicit filter, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hyaena.config import ModelConfig, unknown_layer_kind
from hyaena.schemes import SCHEMES, Scheme

FLOAT32 = 4
"""Bytes of the numbers that are never narrower: poles, residues, and each half of a complex state."""


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """Sizes of the mixer of one layer. Norms and MLP are the same in every layer; ``ModelSizes`` adds them.

    Attributes:
        parameters: numbers that the mixer learns.
        float32_parameters: those among them that are stored in float32 at least, such as poles and residues.
        matrices: shapes (outputs, inputs) of the linear layers among them that a scheme makes narrow.
        output_parameters: those among them that are applied only where an output is needed: the output projection.
        kv_per_token: numbers cached for every token, in the dtype of the cache.
        kv_slots: keys and values of heads among them, each of which has a scale where the cache is int8.
        state: numbers of one sequence's state whatever its length, in the model's dtype.
        float32_state: numbers of that state that are stored in float32 at least; a complex number counts as two.
        activations_per_token: most numbers held for a token inside the mixer, in a pass without gradients.
        flops_per_pair: operations for each pair of a query and a key; half of the pairs are causal.
    """

    parameters: int
    float32_parameters: int = 0
    matrices: tuple[tuple[int, int], ...] = ()
    output_parameters: int = 0
    kv_per_token: int = 0
    kv_slots: int = 0
    state: int = 0
    float32_state: int = 0
    activations_per_token: int = 0
    flops_per_pair: int = 0


def attention_size(config: ModelConfig) -> LayerSize:
    """Grouped-query attention: ``[q | k | v]`` and output projections; keys and values are cached.

    Activations: ``[q | k | v]``, rotated queries and keys, and, where there is a past, attention to the past, to the
    present, and both merged.
    """
    d = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    qkv = queries + 2 * keys
    return LayerSize(
        parameters=qkv * d + queries * d + qkv * config.attention_qkv_bias + d * config.attention_out_bias,
        matrices=((qkv, d), (d, queries)),
        output_parameters=queries * d,
        kv_per_token=2 * keys,
        kv_slots=2 * config.num_key_value_heads,
        activations_per_token=qkv + (queries + keys) + 3 * queries,
        flops_per_pair=4 * queries,  # two for the score, two for the weighted sum
    )


def hyena_size(config: ModelConfig) -> LayerSize:
    """A Hyena block with N complex modes per channel: poles [D,N,2], residues [D,N,2], skip [D] (StripedHyena 1)."""
    modes = 2 * config.hidden_size * config.state_size  # real numbers of D·N complex ones
    return _hyena_block(config, filter=2 * modes + config.hidden_size, float32_filter=2 * modes, float32_state=modes)


def hyena_li_size(config: ModelConfig) -> LayerSize:
    """A Hyena block with N real modes per channel: log_poles, residues [D,N], skip [D] (hcl of StripedHyena 2)."""
    modes = config.hidden_size * config.state_size
    return _hyena_block(config, filter=2 * modes + config.hidden_size, float32_filter=2 * modes, float32_state=modes)


def hyena_se_size(config: ModelConfig) -> LayerSize:
    """A Hyena block with short explicit filters: taps [F,W], a skip [D] or none (hcs of StripedHyena 2)."""
    return _explicit_block(config, config.se_filter_length, config.se_filter_groups, config.se_filter_skip)


def hyena_mr_size(config: ModelConfig) -> LayerSize:
    """A Hyena block with medium explicit filters: taps [F,W], a skip [D] or none (hcm of StripedHyena 2)."""
    return _explicit_block(config, config.mr_filter_length, config.mr_filter_groups, config.mr_filter_skip)


def _explicit_block(config: ModelConfig, taps: int, groups: int | None, skip: bool) -> LayerSize:
    """A Hyena block with explicit filters, whose state is a window of W-1 inputs."""
    d = config.hidden_size
    return _hyena_block(config, filter=(groups or d) * taps + d * skip, float32_state=d * (taps - 1))


def _hyena_block(config: ModelConfig, *, filter: int, float32_state: int, float32_filter: int = 0) -> LayerSize:
    """The projections and the short filter around a long filter.

    The state is that of the long filter (modes, or W-1 inputs; float32 at least) and the K-1 inputs of the short one.

    Activations: the projection (three widths) and the output of the fused operator.
    """
    d, taps = config.hidden_size, config.short_filter_length
    input_projection, output_projection = 3 * d * (d + config.hyena_in_bias), d * (d + config.hyena_out_bias)
    short_filter = 3 * d * (taps + config.short_filter_bias)
    return LayerSize(
        parameters=input_projection + short_filter + filter + output_projection,
        float32_parameters=float32_filter,
        matrices=((d, d),) if config.fp8_input_projections else ((3 * d, d), (d, d)),
        output_parameters=d * d,
        state=3 * d * (taps - 1),
        float32_state=float32_state,
        activations_per_token=4 * d,
    )


LAYER_SIZES: Mapping[str, Callable[[ModelConfig], LayerSize]] = {
    "attention": attention_size,
    "hyena": hyena_size,
    "hyena_se": hyena_se_size,
    "hyena_mr": hyena_mr_size,
    "hyena_li": hyena_li_size,
}
"""The sizes of every kind of layer. A new kind is one entry here."""


class ModelSizes:
    """Sizes of a model of a configuration.

    Args:
        config: the model's configuration.
        kinds: the sizes of each kind of layer; a kind of your own goes in as
            ``LAYER_SIZES | {"mine": lambda config: LayerSize(parameters=…)}``.

    Raises:
        ConfigError: a layer's kind is not in ``kinds``.
    """

    def __init__(
        self, config: ModelConfig, kinds: Mapping[str, Callable[[ModelConfig], LayerSize]] = LAYER_SIZES
    ) -> None:
        self.config = config
        self.counts = Counter(config.layer_types)
        for kind in self.counts:
            if kind not in kinds:
                raise unknown_layer_kind(kind, config.layer_types.index(kind), kinds)
        self.by_kind = {kind: kinds[kind](config) for kind in self.counts}

    # --- parameters ----------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        """Numbers that the model learns; a tied embedding counts once."""
        return sum(self.parameters_by_part.values())

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """``parameters``, split into embeddings, norms, MLPs, and the mixers of each kind of layer."""
        config = self.config
        return {
            "embeddings": self._embedding * (1 if config.tie_embeddings else 2),
            "norms": config.hidden_size * (2 * config.num_layers + 1),
            "mlp": config.num_layers * self._mlp,
            **{kind: count * self.by_kind[kind].parameters for kind, count in self.counts.items()},
        }

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of all weights, for a dtype of ``itemsize`` bytes; narrow ones have those of their scheme."""
        wide = self._sum(lambda layer: layer.float32_parameters)
        narrow = sum(scheme.nbytes(e, d) - e * d * itemsize for scheme, e, d in self._narrow())
        return self.parameters * itemsize + wide * (_float32(itemsize) - itemsize) + narrow

    def narrow_bytes(self) -> dict[str, int]:
        """Bytes of the narrow weights by scheme; empty where there are none."""
        found: Counter[str] = Counter()
        for scheme, rows, columns in self._narrow():
            found[scheme.name] += scheme.nbytes(rows, columns)
        return dict(found)

    def _narrow(self) -> list[tuple[Scheme, int, int]]:
        """Every narrow matrix: its scheme, outputs and inputs."""
        config = self.config
        if config.weights is None:
            return []
        scheme, d, f = SCHEMES[config.weights], config.hidden_size, config.intermediate_size
        mlp = config.num_layers * ((f, d), (f, d), (d, f))
        mixers = (shape for kind, count in self.counts.items() for shape in count * self.by_kind[kind].matrices)
        head = [] if config.tie_embeddings else [(SCHEMES[scheme.head], config.vocab_size, d)]
        return [(scheme, *shape) for shape in (*mlp, *mixers)] + head

    # --- caches and activations ----------------------------------------------------------------------------------

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's keys and values in all layers; of one byte each (int8) with their scales in float32."""
        scale = FLOAT32 if itemsize == 1 else 0
        return self._sum(lambda layer: layer.kv_per_token * itemsize + layer.kv_slots * scale)

    def page_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of a page of keys and values for so many tokens, in all layers; see ``kv_bytes_per_token``."""
        return tokens * self.kv_bytes_per_token(itemsize)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of one sequence's states in all layers, whatever its length; also those of a snapshot of them."""
        return self._sum(lambda layer: layer.state * itemsize + layer.float32_state * _float32(itemsize))

    def cache_bytes(self, batch: int, length: int, itemsize: int, kv_itemsize: int | None = None) -> int:
        """Bytes of a cache of ``batch`` rows of ``length`` tokens: ``B·(T·kv + state)``.

        Args:
            itemsize: bytes of a number in the model's dtype.
            kv_itemsize: of keys and values; ``itemsize`` unless given.
        """
        return batch * (length * self.kv_bytes_per_token(kv_itemsize or itemsize) + self.state_bytes(itemsize))

    def activation_bytes_per_token(self, itemsize: int) -> int:
        """Most bytes of activations of one token in a pass without gradients, with the fused kernels.

        Every part of a layer runs beside four tensors of the residual's width: the layer's input, the mixer's output,
        their sum, and a norm. The MLP holds both products and the gate's result.
        """
        mixers = [layer.activations_per_token for layer in self.by_kind.values()]
        return itemsize * (4 * self.config.hidden_size + max(3 * self.config.intermediate_size, *mixers))

    # --- work ----------------------------------------------------------------------------------------------------

    def decode_bytes(self, batch: int, context: int, itemsize: int, kv_itemsize: int | None = None) -> int:
        """Bytes of one decoding step: ``weights + B·(context·kv + 2·state)``.

        Every weight is read once, except for the rows of an untied embedding, of which a token needs one. Keys and
        values of the context are read; states are read and written. Arguments as of ``cache_bytes``.
        """
        weights = self.weight_bytes(itemsize)
        if not self.config.tie_embeddings:
            weights -= self._embedding * itemsize
        cache = self.cache_bytes(batch, context, itemsize, kv_itemsize)
        return weights + cache + batch * self.state_bytes(itemsize)

    def prefill_flops(self, length: int) -> int:
        """Operations of a prefill of one sequence: ``2·P·T + S·T²/2 + 2·V·D``.

        P are the parameters outside embedding and head, each of which every token meets once; S the operations per
        pair of positions (4·D in attention), half of which are causal. Logits are of the last position only. Long
        filters count their parameters and nothing else: between its projections a Hyena block is bound by memory.
        """
        weights = self.parameters - self._embedding * (1 if self.config.tie_embeddings else 2)
        pairs = self._sum(lambda layer: layer.flops_per_pair) * length**2 // 2
        return 2 * weights * length + pairs + 2 * self._embedding

    def scoring_flops(self, length: int) -> int:
        """Operations of the log-probabilities of a sequence: ``prefill_flops`` with logits of all positions but one."""
        return self.prefill_flops(length) + 2 * self._embedding * (length - 2)

    def last_layer_savings(self, length: int) -> int:
        """Operations of ``prefill_flops`` that logits of the last position do not need.

        Only the last position of the last layer's output is read, so its scores, its output projection and its MLP can
        be left out at all others.
        """
        last = self.by_kind[self.config.layer_types[-1]]
        return last.flops_per_pair * length**2 // 2 + 2 * (length - 1) * (last.output_parameters + self._mlp)

    def operator_bytes(self, length: int, itemsize: int) -> int:
        """Bytes of one fused Hyena operator on one sequence: 3·D numbers per token are read and D written."""
        return 4 * self.config.hidden_size * length * itemsize

    @property
    def _embedding(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def _mlp(self) -> int:
        return 3 * self.config.hidden_size * self.config.intermediate_size

    def _sum(self, size: Callable[[LayerSize], int]) -> int:
        return sum(count * size(self.by_kind[kind]) for kind, count in self.counts.items())


def _float32(itemsize: int) -> int:
    """Bytes of a number that is never narrower than float32, in a model of a dtype of ``itemsize`` bytes."""
    return max(itemsize, FLOAT32)
