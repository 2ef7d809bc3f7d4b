"""The architecture of a StripedHyena model as one frozen, typed record, checked in one place.

Nothing here imports torch, so reading a configuration is instant. This module reads our own keys only; other formats
are read and written by :mod:`hyaena.formats`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from hyaena.errors import ConfigError, joined, nearest, printable, shown
from hyaena.mappings import read_mapping
from hyaena.schemes import SCHEMES

Activation = Literal["silu", "gelu", "identity"]
TokenizerType = Literal["hf", "characters", "bytes"]

FORMAT = "hyaena"
"""The value of the key ``format`` in our own ``config.json``."""

MODEL_TYPE = "stripedhyena"
"""The value of ``model_type``, by which transformers finds the classes of ``hyaena.hf``."""

PREFILL_STYLES = {
    "recurrence": "recurrence",
    "modal-fft": "fft",
    "hybrid-modal-recurrence": "blocked",  # convolutions inside blocks, the recurrence from block to block
    "modal-scan": "scan",
    "canonical-fft": "canonical-fft",
    "iir-fir-caching": "truncated",  # the filter cut to a finite one, whose cache is a window of inputs
} | {name: name for name in ("auto", "reference", "fft", "blocked", "scan", "truncated", "direct")}
"""Values of ``prefill_style``, the original's six names and ours, each with the method of evaluation that it means.

The original named all six and implemented the first two. Only ``truncated`` changes results, by no more than a
tolerance.
"""

_TRANSFORMERS = "concerns the transformers library only"
_GENERATION = "a default of text generation in transformers; options of `generate` choose here"
_DTYPE = "the dtype is chosen when a model is loaded"
_TOKENS = "special tokens are those of the tokenizer"
_TRAINING = "concerns training in other libraries only"

TOOL_KEYS: dict[str, str] = {
    "tie_word_embeddings": "tie_embeddings states whether the head is tied",
    "tokenizer_class": "the key for the tokenizer is tokenizer (tokenizer_type in the original's files)",
    "model_type": "the format of the configuration is known from its other keys",
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "use_bfloat16": _DTYPE,
    "use_cache": "whether a cache is used is chosen at the call",
    "initializer_range": _TRAINING,
    "attention_dropout": _TRAINING,
    "hidden_dropout": _TRAINING,
    "dropout": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "pretraining_tp": _TRAINING,
    "unsloth_fixed": _TRAINING,
    "unsloth_version": _TRAINING,
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"), _TOKENS
    ),
    **dict.fromkeys(
        (
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "_auto_class",
            "_commit_hash",
            "_from_pipeline",
            "_name_or_path",
            "add_cross_attention",
            "architectures",
            "attn_implementation",
            "auto_map",
            "base_model_name_or_path",
            "chunk_size_feed_forward",
            "cross_attention_hidden_size",
            "finetuning_task",
            "id2label",
            "is_decoder",
            "is_encoder_decoder",
            "keys_to_ignore_at_inference",
            "label2id",
            "output_attentions",
            "output_hidden_states",
            "prefix",
            "problem_type",
            "pruned_heads",
            "return_dict",
            "task_specific_params",
            "tf_legacy_loss",
            "tie_encoder_decoder",
            "torchscript",
            "transformers_version",
            "transformers.js_config",
        ),
        _TRANSFORMERS,
    ),
    **dict.fromkeys(
        (
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "length_penalty",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ),
        _GENERATION,
    ),
}
"""Keys that other tools add to a ``config.json``, each with the reason why it has no effect here."""

UNSUPPORTED_KEYS = {
    "quantization_config": "quantized checkpoints cannot be read: use the checkpoint that was quantized",
}
"""Keys of other tools that would change the numbers; null is accepted."""

LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "state_size": 1 << 12,
    "short_filter_length": 1 << 12,
    "se_filter_length": 1 << 16,
    "se_filter_groups": 1 << 20,
    "mr_filter_length": 1 << 16,
    "mr_filter_groups": 1 << 20,
    "max_length": 1 << 40,
}
"""The largest value of each whole number: far above any model, and small enough to compute and allocate with."""

RANGES = {"norm_eps": (1e-20, 1.0), "rope_theta": (1.0, 1e15), "rope_scaling_factor": (1e-3, 1e6)}
"""The smallest and the largest value of each real number, within what float32 can compute with."""

MAX_LAYERS = 1024
MAX_NAME = 200
"""Characters of ``name`` and of ``vocab_file``."""

_OPTIONAL = ("se_filter_groups", "mr_filter_groups")
_FLAGS = (
    "norm_eps_inside_root",
    "tie_embeddings",
    "attention_qkv_bias",
    "attention_out_bias",
    "hyena_in_bias",
    "short_filter_bias",
    "hyena_out_bias",
    "se_filter_skip",
    "mr_filter_skip",
    "rope_frequencies_stored",
    "rope_tables_rounded",
    "fp8_input_projections",
    "column_split_hyena",
)
_CHOICES = {
    "activation": get_args(Activation),
    "first_activation": (None, *get_args(Activation)),
    "tokenizer": get_args(TokenizerType),
    "prefill_style": tuple(PREFILL_STYLES),
    "weights": (None, *SCHEMES),
}
_PRESETS = Path(__file__).parent / "configs"
_BUNDLED = {"cub": Path(__file__).parent / "cub" / "config.json"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one StripedHyena model.

    Shapes are written with the letters of ``docs/architecture.md``: D channels, H query heads, G key/value
    heads, K short-filter taps, N modes per channel, W taps of an explicit filter, V vocabulary.

    Attributes:
        vocab_size: V, rows of the embedding.
        hidden_size: D, channels of the residual stream.
        layer_types: the kind of each layer, such as ``"attention"`` or ``"hyena"``: the stripes. Kinds are those of
            ``sizes.LAYER_SIZES``; a model built with mixers of its own may have others.
        intermediate_size: width of the gated MLP.
        num_attention_heads: H; also the number of heads by which original checkpoints interleave Hyena projections.
        num_key_value_heads: G, a divisor of H.
        state_size: N, modes of each channel's long filter in layers of kind ``hyena`` and ``hyena_li``.
        short_filter_length: K, taps of the short depthwise filter.
        se_filter_length: W, taps of the explicit filters of ``hyena_se`` layers.
        se_filter_groups: how many filters a ``hyena_se`` layer has, each for D / groups neighbouring channels; None
            for one per channel.
        mr_filter_length: W, taps of the explicit filters of ``hyena_mr`` layers.
        mr_filter_groups: the same number of filters for ``hyena_mr`` layers.
        se_filter_skip, mr_filter_skip: the explicit filters of these layers have a skip: ``y = h * u + skip·u``.
        hyena_in_bias: the input projections of Hyena layers have a bias.
        short_filter_bias: their short filters have a bias.
        hyena_out_bias: their output projections have a bias.
        fp8_input_projections: the input projections of Hyena layers were trained and are run by their authors as FP8
            products.
        activation: the MLPs' gate activation; ``"gelu"`` is the exact (erf) form, ``"identity"`` none.
        first_activation: that of layer 0, where it differs from the others.
        norm_eps: the epsilon of every RMSNorm.
        norm_eps_inside_root: True for ``x / sqrt(mean(x^2) + eps)`` (SH-7B), False for
            ``x / (sqrt(mean(x^2)) + eps)`` (Evo).
        tie_embeddings: the head reuses the embedding matrix.
        attention_qkv_bias: the fused attention projection has a bias.
        attention_out_bias: the attention output projection has a bias.
        rope_theta: base of the rotary frequencies.
        rope_scaling_factor: positions are divided by this (linear interpolation); 1 leaves them unchanged.
        rope_frequencies_stored: checkpoints hold the rotary frequencies, which need not be those of ``rope_theta``.
        rope_tables_rounded: cos and sin of the rotary angles are rounded to the dtype of the model.
        max_length: the longest sequence that the model is meant for, in tokens.
        column_split_hyena: how the *original* checkpoint layout stores this model's Hyena projections: interleaved
            per head (True) or as three blocks. Read only when original files are loaded or written.
        prefill_style: the evaluation method that an original YAML names (``PREFILL_STYLES``), used by the entry
            script ``generate.py``; other commands choose the method themselves.
        tokenizer: ``"hf"`` (a ``tokenizer.json``), ``"characters"`` (Evo) or ``"bytes"``.
        vocab_file: the path of the tokenizer's file relative to the model's folder, or None for ``tokenizer.json``.
        weights: the scheme of narrow linear layers (``schemes.SCHEMES``), or None for floating-point ones.
        name: a label for people.

    Raises:
        ConfigError: naming every value that cannot be used, and what it should be.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    state_size: int
    short_filter_length: int = 3
    se_filter_length: int = 7
    se_filter_groups: int | None = None
    mr_filter_length: int = 128
    mr_filter_groups: int | None = None
    se_filter_skip: bool = False
    mr_filter_skip: bool = True
    hyena_in_bias: bool = True
    short_filter_bias: bool = True
    hyena_out_bias: bool = True
    fp8_input_projections: bool = False
    activation: Activation = "silu"
    first_activation: Activation | None = None
    norm_eps: float = 1e-5
    norm_eps_inside_root: bool = True
    tie_embeddings: bool = False
    attention_qkv_bias: bool = False
    attention_out_bias: bool = False
    rope_theta: float = 10_000.0
    rope_scaling_factor: float = 1.0
    rope_frequencies_stored: bool = False
    rope_tables_rounded: bool = False
    max_length: int = 8192
    column_split_hyena: bool = True
    prefill_style: str = "auto"
    tokenizer: TokenizerType = "hf"
    vocab_file: str | None = None
    weights: str | None = None
    name: str = "striped-hyena"

    def __post_init__(self) -> None:
        if isinstance(self.layer_types, list):  # JSON and YAML have lists only
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
        problems = _problems(self)
        if problems:
            raise ConfigError(joined(problems))
        for name in RANGES:  # 500000 in a file means 500000.0
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def activation_of(self, layer: int) -> Activation:
        """The gate activation of a layer's MLP."""
        return self.first_activation or self.activation if layer == 0 else self.activation

    @property
    def prefill_method(self) -> str:
        """``prefill_style`` as a method of ``ops.long_conv``."""
        return PREFILL_STYLES[self.prefill_style]

    # --- reading and writing -------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build the record from our own keys; see :func:`hyaena.formats.read_config` for those of other formats.

        Keys that other tools add (``TOOL_KEYS``) are left out.

        Raises:
            ConfigError: unknown, missing, ill-typed or contradictory keys, each with its fix.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if values.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"format {shown(values['format'])} is unknown: write {FORMAT!r}")
        values = {key: value for key, value in values.items() if key in fields or key not in {"format", *TOOL_KEYS}}
        problems = unsupported_keys(values)
        problems += unknown_keys([key for key in values if key not in {*fields, *UNSUPPORTED_KEYS}], fields)
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        problems += [f"{name} is missing: add it" for name in required if name not in values]
        if problems:
            raise ConfigError(joined(problems))
        return cls(**{key: value for key, value in values.items() if key in fields})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> ModelConfig:
        """Read our own keys from a JSON or YAML file; :func:`hyaena.formats.read_config` reads other formats, too.

        Raises:
            ConfigError: the file is missing or is not a configuration; the message begins with its path.
        """
        try:
            return cls.from_dict(read_mapping(Path(path)))
        except ConfigError as error:
            raise ConfigError(f"{printable(str(path))}: {error}") from None

    @classmethod
    def from_name(cls, name: str) -> ModelConfig:
        """The configuration of a published architecture, such as ``"sh-7b"``; see :func:`preset_names`.

        Raises:
            ConfigError: there is no preset of this name.
        """
        if name not in preset_names():
            near = nearest(str(name), preset_names())
            hint = f"did you mean {near}? " if near else ""
            raise ConfigError(f"no preset is called {shown(name)}: {hint}choose one of {', '.join(preset_names())}")
        return cls.from_file(_BUNDLED.get(name, _PRESETS / f"{name}.yml"))

    def to_dict(self) -> dict[str, Any]:
        """Our own ``config.json``: the format, the model type, and every field; :meth:`from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT, "model_type": MODEL_TYPE, **values, "layer_types": list(self.layer_types)}


def preset_names() -> tuple[str, ...]:
    """The names that :meth:`ModelConfig.from_name` takes: the files of ``configs/`` and the bundled model."""
    return (*sorted(path.stem for path in _PRESETS.glob("*.yml")), *_BUNDLED)


def unknown_keys(keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """A sentence about each key that is not known, naming the nearest one that is; see ``joined`` for their number."""
    known = list(known)
    problems = []
    for count, key in enumerate(keys):
        # Searching is slow, and only the first few are printed.
        near = nearest(key, known) if count < 10 else None
        hint = f"did you mean {near}?" if near else "remove it"
        problems.append(f"{printable(key) or repr(key)} is not a known key: {hint}")
    return problems


def unsupported_keys(values: Mapping[str, Any]) -> list[str]:
    """A sentence about each key of another tool that would change the numbers and is not null."""
    return [f"{key}: {reason}" for key, reason in UNSUPPORTED_KEYS.items() if values.get(key) is not None]


def unknown_layer_kind(kind: str, layer: int, known: Iterable[str]) -> ConfigError:
    """The error about a kind of layer that is not known, naming the nearest one that is."""
    near = nearest(kind, known)
    hint = f"did you mean {near}? " if near else ""
    return ConfigError(f"layer {layer}: unknown layer kind {shown(kind)}: {hint}known: {', '.join(known)}")


def _problems(config: ModelConfig) -> list[str]:
    """Everything that is wrong with the values of a configuration, one sentence each."""
    problems = []
    for name, largest in LARGEST.items():
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        if type(value) is not int or value < 1:
            problems.append(f"{name} is {shown(value)}: write a whole number of at least 1")
        elif value > largest:
            problems.append(f"{name} is {shown(value)}: write at most {largest:,}")
    for name, (smallest, largest) in RANGES.items():
        value = getattr(config, name)
        if type(value) not in (int, float) or not smallest <= value <= largest:  # NaN is in no range
            # YAML 1.1 reads 1e-5, without a dot, as text.
            hint = " (in YAML 1.0e-5, not 1e-5)" if isinstance(value, str) else ""
            problems.append(f"{name} is {shown(value)}: write a positive number{hint} from {smallest:g} to {largest:g}")
    for name in _FLAGS:
        value = getattr(config, name)
        if not isinstance(value, bool):
            problems.append(f"{name} is {shown(value)}: write true or false, without quotes")
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if not (isinstance(value, str) or value is None) or value not in choices:
            problems.append(f"{name} is {shown(value)}: choose one of {', '.join(filter(None, choices))}")
    problems += _text_problem("name", config.name)
    if config.vocab_file is not None:
        problems += _text_problem("vocab_file", config.vocab_file)

    kinds = config.layer_types
    if not isinstance(kinds, tuple) or not kinds:
        problems.append(f"layer_types is {shown(kinds)}: list the kind of each layer, such as 'hyena' or 'attention'")
    elif len(kinds) > MAX_LAYERS:
        problems.append(f"layer_types lists {len(kinds):,} layers: at most {MAX_LAYERS:,} are supported")
    else:
        wrong = [(i, kind) for i, kind in enumerate(kinds) if not isinstance(kind, str) or not kind.strip()]
        problems += [
            f"layer_types has {shown(kind)} for layer {i}: write a name, such as 'hyena' or 'attention'"
            for i, kind in wrong
        ]

    if problems:  # what follows compares values, which have to make sense by themselves first
        return problems
    d, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if d % heads:
        problems.append(f"hidden_size {d} is not a multiple of num_attention_heads {heads}: change one of them")
    elif "attention" in kinds and config.head_dim % 2:
        problems.append(
            f"hidden_size / num_attention_heads is {config.head_dim}: rotary positions need an even number, change one"
        )
    if heads % groups:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}: change one")
    if config.fp8_input_projections and config.hyena_in_bias:
        problems.append("fp8_input_projections go without a bias: set hyena_in_bias to false")
    for name in _OPTIONAL:
        filters = getattr(config, name)
        if filters is not None and d % filters:
            problems.append(f"hidden_size {d} is not a multiple of {name} {filters}: change one of them")
    return problems


def _text_problem(name: str, value: Any) -> list[str]:
    """What is wrong with a text that is printed: its type, its length, or characters that no terminal should get."""
    if not isinstance(value, str):
        return [f"{name} is {shown(value)}: write text"]
    if len(value) > MAX_NAME:
        return [f"{name} has {len(value):,} characters: write at most {MAX_NAME}"]
    if not value.isprintable():
        return [f"{name} is {shown(value)}: leave out characters that cannot be printed"]
    return []
