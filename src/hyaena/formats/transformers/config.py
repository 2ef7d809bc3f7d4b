"""The configuration keys of ``hyaena.hf.StripedHyenaConfig``, to and from ours.

They follow the habits of transformers where it has some (``num_hidden_layers``, ``rope_parameters``), so that its
tools find what they look for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyaena.config import MODEL_TYPE, TOOL_KEYS, UNSUPPORTED_KEYS, ModelConfig, unknown_keys, unsupported_keys
from hyaena.errors import ConfigError, in_words, joined, shown

ARCHITECTURE = "StripedHyenaForCausalLM"
"""The class that a folder with a language model names."""

RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layer_kinds": "layer_types",  # transformers checks its own layer_types against a list without Hyena blocks
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "state_size": "state_size",
    "short_filter_length": "short_filter_length",
    "se_filter_length": "se_filter_length",
    "se_filter_groups": "se_filter_groups",
    "mr_filter_length": "mr_filter_length",
    "mr_filter_groups": "mr_filter_groups",
    "se_filter_skip": "se_filter_skip",
    "mr_filter_skip": "mr_filter_skip",
    "hyena_in_bias": "hyena_in_bias",
    "short_filter_bias": "short_filter_bias",
    "hyena_out_bias": "hyena_out_bias",
    "fp8_input_projections": "fp8_input_projections",
    "hidden_act": "activation",
    "first_hidden_act": "first_activation",
    "rms_norm_eps": "norm_eps",
    "rms_norm_eps_inside_root": "norm_eps_inside_root",
    "tie_word_embeddings": "tie_embeddings",
    "attention_qkv_bias": "attention_qkv_bias",
    "attention_out_bias": "attention_out_bias",
    "rope_frequencies_stored": "rope_frequencies_stored",
    "rope_tables_rounded": "rope_tables_rounded",
    "max_position_embeddings": "max_length",
    "column_split_hyena": "column_split_hyena",
    "prefill_style": "prefill_style",
    "tokenizer": "tokenizer",
    "vocab_file": "vocab_file",
    "name": "name",
}
"""Key of transformers -> our field, where the value is the same."""

COMPUTED = ("num_hidden_layers", "rope_parameters", "model_type")
"""Keys that :func:`read_config` combines into our fields or checks against each other."""

NO_EFFECT = {key: reason for key, reason in TOOL_KEYS.items() if key not in {*RENAMED, *COMPUTED}}
"""Keys that transformers adds to a configuration, each with the reason why it has no effect here."""


def matches_config(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is written in the keys of ``StripedHyenaConfig``."""
    return "format" not in values and "layer_kinds" in values


def classifier(values: Mapping[str, Any]) -> str | None:
    """The class of transformers whose model has classes in the place of tokens, if it is one."""
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = [f"StripedHyenaFor{kind}Classification" for kind in ("Sequence", "Token")]
    return name if matches_config(values) and name in known else None


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the keys of ``StripedHyenaConfig`` describe.

    Raises:
        ConfigError: naming, in the words of transformers, every key that is unknown, missing, ill-typed or
            contradictory.
    """
    if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise ConfigError(f"model_type is {shown(values['model_type'])}: only {MODEL_TYPE!r} is supported")
    known = {*RENAMED, *COMPUTED, *NO_EFFECT, *UNSUPPORTED_KEYS}
    problems = unknown_keys([key for key in values if key not in known], known)
    problems += unsupported_keys(values)
    kinds, count = values.get("layer_kinds"), values.get("num_hidden_layers")
    if isinstance(kinds, list | tuple) and count is not None and count != len(kinds):
        problems.append(f"num_hidden_layers is {shown(count)}, and layer_kinds lists {len(kinds):,}: correct one")
    if problems:
        raise ConfigError(joined(problems))
    fields = {ours: values[key] for key, ours in RENAMED.items() if key in values}
    fields |= _rotary_fields(values.get("rope_parameters"))
    try:
        return ModelConfig.from_dict(fields)
    except ConfigError as error:
        raise ConfigError(_in_their_words(str(error))) from None


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A configuration in the keys of ``StripedHyenaConfig``; :func:`read_config` reads it back.

    Raises:
        ConfigError: the weights are narrow.
    """
    if config.weights is not None:
        raise ConfigError(
            f"transformers reads no {config.weights} weights of this package: convert the model that was quantized, "
            "and quantize it there, with torchao or bitsandbytes"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling_factor}
    values = {key: getattr(config, ours) for key, ours in RENAMED.items()}
    values |= {
        "model_type": MODEL_TYPE,
        "layer_kinds": list(config.layer_types),
        "num_hidden_layers": config.num_layers,
        "rope_parameters": rope,
    }
    return values


def _rotary_fields(rope: Any) -> dict[str, Any]:
    """``rope_parameters`` -> our fields: rotary positions as they are, or divided by a factor."""
    if rope is None:
        return {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters is {shown(rope)}: write a mapping, such as {{'rope_theta': 10000.0}}")
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ConfigError(f"rope_parameters: rope_type is {shown(kind)}: only 'default' and 'linear' are supported")
    if other := sorted(set(rope) - {"rope_type", "rope_theta", "factor"}):
        raise ConfigError(f"rope_parameters: {shown(other[0])} is not supported: remove it")
    fields = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if kind == "linear":
        fields["rope_scaling_factor"] = rope.get("factor", 1.0)
    return fields


def _in_their_words(message: str) -> str:
    words = {ours: theirs for theirs, ours in RENAMED.items() if ours != "name"}
    words |= {"rope_theta": "rope_parameters.rope_theta", "rope_scaling_factor": "rope_parameters.factor"}
    return in_words(message, words)
