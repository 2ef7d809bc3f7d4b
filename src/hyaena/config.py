"""What a StripedHyena model is: one frozen, typed record, checked in one place.

Nothing here imports torch, so reading a configuration is instant. The original's key names live in
:mod:`hyaena.config_original`; everything else of the package knows only this record.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from hyaena import config_original
from hyaena.errors import ConfigError

LayerType = Literal["attention", "hyena"]
Activation = Literal["silu", "gelu"]
TokenizerType = Literal["hf", "characters", "bytes"]

FORMAT = "hyaena"
"""The value of the key ``format`` in our own ``config.json``."""


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
        prefill_style: the evaluation method that the original YAML asks for, in its words or ours, kept for the
            entry script ``generate.py``; models choose by themselves unless told.
        tokenizer: ``"hf"`` (a ``tokenizer.json``), ``"characters"`` (Evo) or ``"bytes"``.
        name: a label for people.

    Raises:
        ConfigError: naming every value that cannot be used, and what it should be.
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
    tokenizer: TokenizerType = "hf"
    name: str = "striped-hyena"

    def __post_init__(self) -> None:
        if isinstance(self.layer_types, list):  # JSON and YAML know lists only; a frozen record holds a tuple
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
        problems = _problems(self)
        if problems:
            raise ConfigError("; ".join(problems))
        for name in _NUMBERS:  # 500000 in a file means 500000.0
            object.__setattr__(self, name, float(getattr(self, name)))

    # --- sizes ---------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def prefill_method(self) -> str:
        """``prefill_style`` as a method of ``ops.long_conv``."""
        return config_original.PREFILL_STYLES[self.prefill_style]

    @property
    def num_parameters(self) -> int:
        """How many numbers a model of this configuration learns; a tied embedding counts once."""
        d, taps, modes = self.hidden_size, self.short_filter_length, self.state_size
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        attention = qkv * d + d * d + qkv * self.attention_qkv_bias + d * self.attention_out_bias
        projections = 3 * d * d + 3 * d + d * d + d
        filters = 3 * d * taps + 3 * d + 4 * d * modes + d  # short weight and bias; poles and residues; skip
        mixers = {"attention": attention, "hyena": projections + filters}
        layers = sum(mixers[kind] + 2 * d + 3 * d * self.intermediate_size for kind in self.layer_types)
        return self.vocab_size * d * (1 if self.tie_embeddings else 2) + layers + d

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of the keys and values of one token in all attention layers, for a dtype of ``itemsize`` bytes."""
        return self.layer_types.count("attention") * 2 * self.num_key_value_heads * self.head_dim * itemsize

    # --- reading and writing -------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build the record from our own keys or from the original's (recognised by the keys themselves).

        Raises:
            ConfigError: unknown, missing, ill-typed, contradictory or unsupported keys, each with its fix.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if "format" in values:
            if values["format"] != FORMAT:
                raise ConfigError(
                    f"format {values['format']!r} is unknown: write {FORMAT!r}, or use the original's keys"
                )
            values = {key: value for key, value in values.items() if key != "format"}
        elif config_original.is_original(values):
            try:
                return cls(**config_original.read(values))
            except ConfigError as error:
                raise ConfigError(config_original.in_original_words(str(error))) from None
        unknown = [config_original.unknown_key(key, fields) for key in values if key not in fields]
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        missing = [f"{name} is missing: add it" for name in required if name not in values]
        if unknown or missing:
            raise ConfigError("; ".join(unknown + missing))
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> ModelConfig:
        """Read the original's YAML, the original's hub ``config.json`` or our ``config.json``, told apart by content.

        Raises:
            ConfigError: the file is missing or is not a configuration; the message begins with its path.
        """
        path = Path(path)
        try:
            return cls.from_dict(read_mapping(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Our own ``config.json``: ``{"format": "hyaena", ...every field}``; :meth:`from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT, **values, "layer_types": list(self.layer_types)}

    def to_original_dict(self) -> dict[str, Any]:
        """The same architecture in the original's keys; :meth:`from_dict` reads it back to an equal record."""
        return config_original.write(self.to_dict())


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds. A key written twice is an error: one of the two would be lost."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file: check the path of the configuration") from None
    except IsADirectoryError:
        raise ConfigError("is a folder: name the configuration file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read as text: {_one_line(error)}") from None
    values = _parse_json(text) if text.lstrip().startswith("{") else _parse_yaml(text)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError("holds no mapping of names to values: write one `key: value` per line")
    return values


def _parse_json(text: str) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ConfigError(f"{max(keys, key=keys.count)} is written twice: keep one")
        return values

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not valid JSON: {_one_line(error)}") from None


def _parse_yaml(text: str) -> Any:
    import yaml  # here, so that importing this module stays instant

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"{key} is written twice: keep one")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_NUMBERS = ("norm_eps", "rope_theta", "rope_scaling_factor")


def _problems(config: ModelConfig) -> list[str]:
    """Everything that is wrong with the values of a configuration, one sentence each."""
    problems = []
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "state_size",
        "short_filter_length",
        "max_length",
    ):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{name} is {value!r}: write a whole number of at least 1")
    for name in _NUMBERS:
        value = getattr(config, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            # YAML 1.1 reads 1e-5, without a dot, as text.
            hint = " (in YAML 1.0e-5, not 1e-5)" if isinstance(value, str) else ""
            problems.append(f"{name} is {value!r}: write a positive number{hint}")
    for name in (
        "norm_eps_inside_root",
        "tie_embeddings",
        "attention_qkv_bias",
        "attention_out_bias",
        "column_split_hyena",
    ):
        value = getattr(config, name)
        if not isinstance(value, bool):
            problems.append(f"{name} is {value!r}: write true or false, without quotes")
    for name, choices in (
        ("activation", get_args(Activation)),
        ("tokenizer", get_args(TokenizerType)),
        ("prefill_style", tuple(config_original.PREFILL_STYLES)),
    ):
        value = getattr(config, name)
        if value not in choices:
            problems.append(f"{name} is {value!r}: choose one of {', '.join(choices)}")
    if not isinstance(config.name, str):
        problems.append(f"name is {config.name!r}: write text")

    kinds = config.layer_types
    if not isinstance(kinds, tuple) or not kinds:
        problems.append(f"layer_types is {kinds!r}: list 'hyena' or 'attention' once per layer")
    elif unknown := [f"{kind!r} (layer {i})" for i, kind in enumerate(kinds) if kind not in get_args(LayerType)]:
        problems.append(f"layer_types holds {', '.join(unknown)}: every layer is 'hyena' or 'attention'")

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
    return problems
