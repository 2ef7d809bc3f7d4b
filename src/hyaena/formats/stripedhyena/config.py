"""The configuration keys of StripedHyena 1: the original's YAML files and the hub's ``config.json``, to and from ours.

The original reads a missing key as None and takes any non-empty string for true. Here every key is one of: read,
required, supported with one value only, or known to have no effect; anything else is an error that names the
nearest known key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyaena.config import MAX_LAYERS, TOOL_KEYS, UNSUPPORTED_KEYS, ModelConfig, unknown_keys, unsupported_keys
from hyaena.errors import ConfigError, in_words, joined, shown

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "attn_layer_idxs",
    "hyena_layer_idxs",
    "num_attention_heads",
    "state_size",
    "short_filter_length",
    "eps",
    "tie_embeddings",
)
"""Keys that the original reads without a default. There, a missing one becomes None and fails later, or never."""

RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "state_size": "state_size",
    "short_filter_length": "short_filter_length",
    "tie_embeddings": "tie_embeddings",
    "eps": "norm_eps",
    "use_flash_rmsnorm": "norm_eps_inside_root",  # the fused kernel put eps inside the root; checkpoints depend on it
    "mlp_activation": "activation",
    "qkv_proj_bias": "attention_qkv_bias",
    "mha_out_proj_bias": "attention_out_bias",
    "rotary_emb_base": "rope_theta",
    "column_split_hyena": "column_split_hyena",
    "prefill_style": "prefill_style",
    "vocab_file": "vocab_file",
    "model_name": "name",
}
"""Original key -> our field, where the value is the same."""

DEFAULTS: dict[str, Any] = {
    "use_flash_rmsnorm": False,
    "mlp_activation": "silu",
    "qkv_proj_bias": True,
    "mha_out_proj_bias": True,
    "rotary_emb_base": 10_000.0,
    "column_split_hyena": True,
    "prefill_style": "auto",  # there fft; here an absent key leaves the choice to the model
}
"""What the original takes when these keys are absent; not always what our own fields default to."""

COMPUTED = (
    "num_layers",
    "attn_layer_idxs",
    "hyena_layer_idxs",
    "inner_mlp_size",
    "inner_size_multiple_of",
    "proj_groups",
    "use_interpolated_rotary_pos_emb",
    "rotary_emb_scaling_factor",
    "max_seqlen",
    "max_sequence_len",
    "tokenizer_type",
    "num_filters",
    "model_type",
)
"""Keys that :func:`read_config` combines into our fields or checks against each other."""

SUPPORTED: dict[str, tuple[Any, str]] = {
    "final_norm": (True, "the norm before the head cannot be left out"),
    "short_filter_bias": (True, "short filters without a bias are not supported"),
    "hyena_filter_groups": (1, "every channel has a filter of its own"),
    "smeared_gqa": (False, "smeared key/value heads are not supported"),
    "model_parallel_size": (1, "merge the parallel parts into one checkpoint first"),
    "long_fir_threshold": (None, "the long filter is never cut silently; use method='truncated'"),
}
"""Keys that would change the numbers, with the one value that is supported and why no other is."""

_SPEED = "chooses a kernel of the original; here `method` and the backend do"
_PARALLEL = "concerns parallel training only"
_INIT = "concerns initialisation in the original's training code only"
_DTYPE = "the dtype is chosen when a model is loaded"
_UNREAD = "is read nowhere in the original"

NO_EFFECT: dict[str, str] = {
    "column_split": "matters only to an attention layout that no published checkpoint uses",
    "split_k0": _UNREAD,
    "pile_parallel_size": _PARALLEL,
    "pipe_parallel_size": _PARALLEL,
    "make_vocab_size_divisible_by": "vocab_size is given after rounding",
    "log_intermediate_values": "a debugging aid",
    "print_activations": "a debugging aid",
    "rng_fork": _INIT,
    "mlp_init_method": _INIT,
    "mlp_output_init_method": _INIT,
    "inference_mode": _UNREAD,
    "use_flash_attn": _SPEED,
    "use_flash_attention_2": _SPEED,
    "use_flash_depthwise": _SPEED,
    "use_flashfft": _SPEED,
    "use_laughing_hyena": _SPEED,
    "compile": _SPEED,
    "low_mem_mode": _SPEED,
    "seqlen": "sizes a kernel of the original",
    "max_batch_size": "caches are made for the batch at hand",
    "attn_block_dtype": _DTYPE,
    "hyena_block_dtype": _DTYPE,
    "mlp_dtype": _DTYPE,
    "params_dtype": _DTYPE,
    "depthwise_dtype": _DTYPE,
    "max_length": "a default of text generation in transformers; the key for the longest sequence is max_seqlen",
} | {key: reason for key, reason in TOOL_KEYS.items() if key != "model_type"}
"""Keys of the original that change no number, each with the reason why it may be ignored."""

TOKENIZERS = {"HFAutoTokenizer": "hf", "CharLevelTokenizer": "characters", "hyaena.ByteTokenizer": "bytes"}
"""``tokenizer_type`` -> our ``tokenizer``. The original has no lossless byte tokenizer: the last name is ours."""

EVO_VOCABULARY = 512
"""Hub configurations name no tokenizer; a vocabulary of exactly this size is Evo's characters."""

STRIPEDHYENA_2 = ("hcl_layer_idxs", "hcm_layer_idxs", "hcs_layer_idxs")

_OUR_KEYS = {"layer_types", "intermediate_size", "num_key_value_heads", "norm_eps"}
_THEIR_KEYS = {"attn_layer_idxs", "hyena_layer_idxs", "num_layers", "num_filters", "proj_groups", *STRIPEDHYENA_2}


def matches_config(values: Mapping[str, Any]) -> bool:
    """Whether a mapping is written in the original's keys: it has a key that only the original has.

    Raises:
        ConfigError: it has keys of both formats.
    """
    if "format" in values:
        return False
    ours, theirs = sorted(_OUR_KEYS & values.keys()), sorted(_THEIR_KEYS & values.keys())
    if ours and theirs:
        raise ConfigError(
            f"{theirs[0]} (an original key) and {ours[0]} (our key) contradict each other: use one format"
        )
    return bool(theirs) or ("model_type" in values and not ours)


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the original's keys describe.

    Raises:
        ConfigError: naming, in the original's words, every key that is unknown, missing, ill-typed, contradictory or
            unsupported.
    """
    fields = _fields(values)
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(_in_original_words(str(error))) from None


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A configuration in the original's keys, every choice written out; :func:`read_config` reads it back.

    Raises:
        ConfigError: the model has layers that the original does not have.
    """
    kinds = config.layer_types
    if other := sorted(set(kinds) - {"attention", "hyena"}):
        raise ConfigError(
            f"the original's layout has attention and hyena layers only, and this model has "
            f"{', '.join(map(shown, other))}: save it in our layout"
        )
    tokenizers = {ours: theirs for theirs, ours in TOKENIZERS.items()}
    values = {key: getattr(config, name) for key, name in RENAMED.items()}
    values |= {
        "num_filters": config.hidden_size,
        "num_layers": config.num_layers,
        "attn_layer_idxs": [i for i, kind in enumerate(kinds) if kind == "attention"],
        "hyena_layer_idxs": [i for i, kind in enumerate(kinds) if kind == "hyena"],
        "inner_mlp_size": config.intermediate_size,
        "proj_groups": config.num_attention_heads // config.num_key_value_heads,
        "use_interpolated_rotary_pos_emb": config.rope_scaling_factor != 1,
        "rotary_emb_scaling_factor": config.rope_scaling_factor,
        "max_seqlen": config.max_length,
        "tokenizer_type": tokenizers[config.tokenizer],
        # The original reads these two without a default that works: it fails where they are absent.
        "use_flash_attn": True,
        "use_flashfft": False,
    }
    values |= {key: wanted for key, (wanted, _) in SUPPORTED.items() if wanted is not None}
    if config.prefill_style == "auto":
        del values["prefill_style"]  # a word of ours
    if config.vocab_file is None:
        del values["vocab_file"]
    return values


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The original's keys -> the fields of ``ModelConfig``."""
    if any(key in values for key in STRIPEDHYENA_2):
        raise ConfigError("this is a StripedHyena 2 (Evo 2) configuration: only StripedHyena 1 models can be read")
    if values.get("model_type", "stripedhyena") != "stripedhyena":
        raise ConfigError(f"model_type is {shown(values['model_type'])}: only 'stripedhyena' is supported")
    known = {*RENAMED, *COMPUTED, *SUPPORTED, *NO_EFFECT, *UNSUPPORTED_KEYS}
    problems = unknown_keys([key for key in values if key not in known], known)
    problems += [f"{key} is missing: add it" for key in REQUIRED if values.get(key) is None]
    problems += unsupported_keys(values)
    for key, (wanted, reason) in SUPPORTED.items():
        if key in values and not _same(values[key], wanted):
            problems.append(f"{key} is {shown(values[key])}, only {wanted!r} is supported: {reason}")
    if problems:
        raise ConfigError(joined(problems))

    fields = {name: values.get(key, DEFAULTS.get(key)) for key, name in RENAMED.items() if key != "model_name"}
    if values.get("model_name") is not None:
        fields["name"] = values["model_name"]
    width, heads = values["hidden_size"], values["num_attention_heads"]
    filters, groups = values.get("num_filters", width), values.get("proj_groups", 1)
    for key, value in (("hidden_size", width), ("num_attention_heads", heads), ("proj_groups", groups)):
        _check_whole(key, value)
    if not _same(filters, width):
        raise ConfigError(
            f"num_filters {shown(filters)} differs from hidden_size {shown(width)}: shared filters are not supported"
        )
    if heads % groups:
        raise ConfigError(
            f"num_attention_heads {shown(heads)} is not a multiple of proj_groups {shown(groups)}: change one of them"
        )
    fields["num_key_value_heads"] = heads // groups
    fields["layer_types"] = _layer_types(values)
    fields["intermediate_size"] = _intermediate_size(values)
    fields["rope_scaling_factor"] = _rope_scaling(values)
    fields["max_length"] = values.get("max_seqlen", values.get("max_sequence_len", 8192))
    fields["tokenizer"] = _tokenizer(values)
    return fields


def _in_original_words(message: str) -> str:
    """A message about our fields, in the words of the file that the user wrote."""
    words = {ours: theirs for theirs, ours in RENAMED.items() if ours != "name"}
    words |= {
        "intermediate_size": "inner_mlp_size",
        "max_length": "max_seqlen",
        "num_key_value_heads": "num_attention_heads / proj_groups",
        "rope_scaling_factor": "rotary_emb_scaling_factor",
    }
    return in_words(message, words)


def _same(value: Any, wanted: Any) -> bool:
    """Equality that does not take 1 for True, nor the string "True" for anything but a string."""
    return type(value) is type(wanted) and value == wanted


def _check_whole(key: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} is {shown(value)}: write a whole number of at least 1")


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {shown(value)}: write true or false, without quotes")
    return value


def _layer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Two index lists -> one list of kinds.

    A Hyena index past the last layer is ignored: the published 7B configuration has one.
    """
    count = values["num_layers"]
    _check_whole("num_layers", count)
    if count > MAX_LAYERS:
        raise ConfigError(f"num_layers is {shown(count)}: write at most {MAX_LAYERS:,}")
    listed = {}
    for key in ("attn_layer_idxs", "hyena_layer_idxs"):
        indices = values[key]
        if not isinstance(indices, (list, tuple)) or any(type(i) is not int or i < 0 for i in indices):
            raise ConfigError(f"{key} is {shown(indices)}: list the layers' numbers, from 0")
        listed[key] = set(indices)
    attention, hyena = listed["attn_layer_idxs"], listed["hyena_layer_idxs"]
    if both := sorted(attention & hyena):
        raise ConfigError(f"layers {shown(both)} are in attn_layer_idxs and in hyena_layer_idxs: remove them from one")
    if beyond := sorted(i for i in attention if i >= count):
        raise ConfigError(
            f"attn_layer_idxs lists {shown(beyond)}, but num_layers is {count}: remove them or add layers"
        )
    if neither := sorted(set(range(count)) - attention - hyena):
        raise ConfigError(
            f"layers {shown(neither)} are in neither attn_layer_idxs nor hyena_layer_idxs: add them to one"
        )
    return tuple("attention" if i in attention else "hyena" for i in range(count))


def _intermediate_size(values: Mapping[str, Any]) -> Any:
    """The MLP's width: ``inner_mlp_size``, or int(2·D·4/3) rounded up to a multiple of ``inner_size_multiple_of``."""
    if values.get("inner_mlp_size") is not None:
        return values["inner_mlp_size"]
    multiple = values.get("inner_size_multiple_of", 64)
    _check_whole("inner_size_multiple_of", multiple)
    return -(-(8 * values["hidden_size"] // 3) // multiple) * multiple


def _rope_scaling(values: Mapping[str, Any]) -> Any:
    """The factor by which positions are divided. Without the flag the original ignores the factor, so this does."""
    if not _flag(values, "use_interpolated_rotary_pos_emb"):
        return 1.0
    return values.get("rotary_emb_scaling_factor", 1.0)


def _tokenizer(values: Mapping[str, Any]) -> str:
    name = values.get("tokenizer_type")
    if name is None:
        return "characters" if values["vocab_size"] == EVO_VOCABULARY else "hf"
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise ConfigError(f"tokenizer_type is {shown(name)}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]
