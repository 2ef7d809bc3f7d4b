"""The configuration keys of StripedHyena 2, the YAML files of Evo 2's package, to and from ours.

As in ``formats.stripedhyena.config`` every key is one of: read, required, supported with one value only, or known to
have no effect. What an absent key means is what the original takes it for, which is not always what its files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyaena.config import TOOL_KEYS, UNSUPPORTED_KEYS, ModelConfig, unknown_keys, unsupported_keys
from hyaena.errors import ConfigError, joined, shown
from hyaena.formats.stripedhyena import config as sibling
from hyaena.formats.stripedhyena.config import (
    SPEED,
    TOKENIZERS,
    check_written,
    flag,
    intermediate_size,
    layer_types,
    make_config,
    rope_scaling,
    same,
)

SWITCH = 128
"""Taps from which on an explicit filter has a skip, and its first stored tap is that of the current step."""

KINDS = {
    "hyena_se": "hcs_layer_idxs",
    "hyena_mr": "hcm_layer_idxs",
    "hyena_li": "hcl_layer_idxs",
}
"""Our kinds of Hyena layers -> the key that lists the layers."""

_LISTS = {"attention": "attn_layer_idxs", **KINDS}

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "attn_layer_idxs",
    *KINDS.values(),
    "hcm_filter_length",
    "hcm_filter_groups",
    "hcs_filter_length",
    "hcs_filter_groups",
    "num_attention_heads",
    "state_size",
    "short_filter_length",
    "eps",
    "tie_embeddings",
)
"""Keys that the original reads without a default."""

RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "state_size": "state_size",
    "short_filter_length": "short_filter_length",
    "hcs_filter_length": "se_filter_length",
    "hcs_filter_groups": "se_filter_groups",
    "hcm_filter_length": "mr_filter_length",
    "hcm_filter_groups": "mr_filter_groups",
    "short_filter_bias": "short_filter_bias",
    "hyena_out_proj_bias": "hyena_out_bias",
    "mha_out_proj_bias": "attention_out_bias",
    "use_fp8_input_projections": "fp8_input_projections",
    "tie_embeddings": "tie_embeddings",
    "eps": "norm_eps",
    "rotary_emb_base": "rope_theta",
    "prefill_style": "prefill_style",
    "model_name": "name",
}
"""Original key -> our field, where the value is the same."""

DEFAULTS: dict[str, Any] = {
    "short_filter_bias": False,
    "hyena_out_proj_bias": False,
    "mha_out_proj_bias": True,
    "use_fp8_input_projections": False,
    "rotary_emb_base": 1_000_000.0,
    "prefill_style": "auto",
    "model_name": "evo2",
}
"""What the original takes when these keys are absent."""

COMPUTED = (
    "num_layers",
    *_LISTS.values(),
    "inner_mlp_size",
    "inner_size_multiple_of",
    "mlp_activation",
    "evo2_style_activations",
    "qkv_proj_bias",
    "use_interpolated_rotary_pos_emb",
    "rotary_emb_scaling_factor",
    "max_seqlen",
    "tokenizer_type",
    "num_filters",
)
"""Keys that :func:`read_config` combines into our fields or checks against each other."""

_LAYOUT = "other orders of channels are not supported, and no published model has one"
SUPPORTED: dict[str, tuple[Any, Any, str]] = {
    "interleave": (True, False, _LAYOUT),
    "column_split": (True, True, _LAYOUT),
    "column_split_hyena": (False, True, _LAYOUT),
    "hyena_flip_x1x2": (False, False, _LAYOUT),
    "proj_groups": (1, 1, "shared key/value heads are not supported"),
    "final_norm": (True, True, "the norm before the head cannot be left out"),
    "use_flash_rmsnorm": (False, False, "the epsilon stands outside the root"),
    "smeared_gqa": (False, False, "smeared key/value heads are not supported"),
    "model_parallel_size": (1, 1, "merge the parallel parts into one checkpoint first"),
    "long_fir_threshold": (None, None, "the long filter is never cut silently; use method='truncated'"),
}
"""Keys that would change the numbers: the value that is supported, what an absent key means, why no other value is."""

NO_EFFECT: dict[str, str] = {key: reason for key, reason in sibling.NO_EFFECT.items() if key != "column_split"} | {
    "model_type": TOOL_KEYS["model_type"],
    "hcl_filter_groups": "every channel has a filter of its own",
    "hyena_filter_groups": "is read nowhere in the original",
    "padding_idx": "ids are looked up in the embedding, whatever they stand for",
    "use_hcs_kernel": SPEED,
    "use_hcm_kernel": SPEED,
    "use_hcl_kernel": SPEED,
}
"""Keys of the original that change no number, each with the reason why it may be ignored."""


def is_of(config: ModelConfig) -> bool:
    """Whether a model is of this format: it has layers of its kinds, or attention as it alone has it."""
    return bool(KINDS.keys() & set(config.layer_types)) or config.rope_frequencies_stored


def matches_config(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is written in the keys of StripedHyena 2: it lists layers of its kinds."""
    return "format" not in values and any(key in values for key in KINDS.values())


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the original's keys describe.

    Raises:
        ConfigError: naming, in the original's words, every key that is unknown, missing, ill-typed, contradictory or
            unsupported.
    """
    return make_config(_fields(values), RENAMED, {"first_activation": "mlp_activation"})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A configuration in the original's keys, every choice written out; :func:`read_config` reads it back.

    Raises:
        ConfigError: the original has no key for something in it.
    """
    kinds = config.layer_types
    values = {key: getattr(config, name) for key, name in RENAMED.items()}
    values |= {key: values[key] or config.hidden_size for key in ("hcs_filter_groups", "hcm_filter_groups")}
    values |= {key: [i for i, kind in enumerate(kinds) if kind == name] for name, key in _LISTS.items()}
    values |= {
        "num_filters": config.hidden_size,
        "num_layers": config.num_layers,
        "inner_mlp_size": config.intermediate_size,
        "mlp_activation": config.activation_of(0),
        "evo2_style_activations": config.activation_of(1) == "identity",
        "qkv_proj_bias": config.attention_qkv_bias,
        "use_interpolated_rotary_pos_emb": config.rope_scaling_factor != 1,
        "rotary_emb_scaling_factor": config.rope_scaling_factor,
        "max_seqlen": config.max_length,
        "tokenizer_type": {ours: theirs for theirs, ours in TOKENIZERS.items()}[config.tokenizer],
        # The original fails, or takes another kernel, where these are absent.
        "use_flash_attn": True,
        "use_flashfft": False,
    }
    values |= {key: wanted for key, (wanted, _, _) in SUPPORTED.items() if wanted is not None}
    if config.prefill_style == "auto":
        values["prefill_style"] = "fft"  # the only one that works there
    if config.attention_qkv_bias != config.hyena_in_bias:
        del values["qkv_proj_bias"]  # then attention has one, and Hyena none
    if other := sorted(set(kinds) - _LISTS.keys()):
        raise ConfigError(
            f"StripedHyena 2 has no layers of kind {', '.join(map(shown, other))}: save it in "
            "our layout (--layout hyaena, layout='hyaena')"
        )
    check_written(config, read_config(values), unread=("column_split_hyena", "prefill_style", "vocab_file"))
    return values


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The original's keys -> the fields of ``ModelConfig``."""
    if "hyena_layer_idxs" in values:
        here = next(key for key in KINDS.values() if key in values)
        raise ConfigError(
            f"hyena_layer_idxs (StripedHyena 1) and {here} (StripedHyena 2) contradict each other: "
            "list the layers of one"
        )
    known = {*RENAMED, *COMPUTED, *SUPPORTED, *NO_EFFECT, *UNSUPPORTED_KEYS}
    problems = unknown_keys([key for key in values if key not in known], known)
    problems += [f"{key} is missing: add it" for key in REQUIRED if values.get(key) is None]
    problems += unsupported_keys(values)
    for key, (wanted, absent, reason) in SUPPORTED.items():
        if key in values and not same(values[key], wanted):
            problems.append(f"{key} is {shown(values[key])}, only {wanted!r} is supported: {reason}")
        elif key not in values and absent != wanted:
            problems.append(f"{key} is missing, which means {absent!r}, and only {wanted!r} is supported: write it out")
    if problems:
        raise ConfigError(joined(problems))
    fields = {name: values.get(key, DEFAULTS.get(key)) for key, name in RENAMED.items()}
    filters, width = values.get("num_filters", values["hidden_size"]), values["hidden_size"]
    if type(filters) is not int or type(width) is not int or filters < 1 or width % filters:
        raise ConfigError(
            f"num_filters {shown(filters)} does not divide hidden_size {shown(width)}: change one of them"
        )
    activation = values.get("mlp_activation", "gelu")
    if flag(values, "evo2_style_activations"):
        fields |= {"activation": "identity", "first_activation": activation}
    else:
        fields["activation"] = activation
    return fields | {
        "num_key_value_heads": values["num_attention_heads"],
        "layer_types": layer_types(values, _LISTS),
        "intermediate_size": intermediate_size(values),
        "attention_qkv_bias": flag(values, "qkv_proj_bias", True),
        "hyena_in_bias": flag(values, "qkv_proj_bias"),
        "se_filter_skip": _has_skip(fields["se_filter_length"]),
        "mr_filter_skip": _has_skip(fields["mr_filter_length"]),
        "norm_eps_inside_root": False,
        "rope_scaling_factor": rope_scaling(values),
        "rope_frequencies_stored": True,
        "rope_tables_rounded": True,
        "max_length": values.get("max_seqlen", 8192),
        "tokenizer": _tokenizer(values),
    }


def _has_skip(taps: Any) -> bool:
    return isinstance(taps, int) and taps >= SWITCH


def _tokenizer(values: Mapping[str, Any]) -> str:
    name = values.get("tokenizer_type", "CharLevelTokenizer")
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise ConfigError(f"tokenizer_type is {shown(name)}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]
