"""The configuration keys of StripedHyena 1: the original's YAML files and the hub's ``config.json``, to and from ours.

The original reads a missing key as None and takes any non-empty string for true. Here every key is one of: read,
required, supported with one value only, or known to have no effect; anything else is an error that names the
nearest known key.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import fields
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

SPEED = "chooses a kernel of the original; here `method` and the backend do"
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
    "use_flash_attn": SPEED,
    "use_flash_attention_2": SPEED,
    "use_flash_depthwise": SPEED,
    "use_flashfft": SPEED,
    "use_laughing_hyena": SPEED,
    "compile": SPEED,
    "low_mem_mode": SPEED,
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

_LISTS = {"attention": "attn_layer_idxs", "hyena": "hyena_layer_idxs"}
_UNREAD_FIELDS = (
    *("se_filter_length", "se_filter_groups", "se_filter_skip", "mr_filter_length", "mr_filter_groups"),
    "mr_filter_skip",
)
"""Fields that mean nothing in models with layers of kinds ``attention`` and ``hyena``."""

_COMPUTED_WORDS = {
    "intermediate_size": "inner_mlp_size",
    "max_length": "max_seqlen",
    "rope_scaling_factor": "rotary_emb_scaling_factor",
}
"""Fields of ours -> the keys that they are computed from."""

_OUR_KEYS = {"layer_types", "intermediate_size", "num_key_value_heads", "norm_eps"}
_THEIR_KEYS = {"attn_layer_idxs", "hyena_layer_idxs", "num_layers", "num_filters", "proj_groups"}


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
    words = {"num_key_value_heads": "num_attention_heads / proj_groups"}
    return make_config(_fields(values), RENAMED, words)


def make_config(fields: dict[str, Any], renamed: dict[str, str], words: dict[str, str]) -> ModelConfig:
    """The configuration of these fields.

    Args:
        fields: of ``ModelConfig``.
        renamed: original key -> our field.
        words: other fields of ours -> what the original has in their place.

    Raises:
        ConfigError: a value that cannot be used, in the words of the file that the user wrote.
    """
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        known = {ours: theirs for theirs, ours in renamed.items() if ours != "name"}
        raise ConfigError(in_words(str(error), known | _COMPUTED_WORDS | words)) from None


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A configuration in the original's keys, every choice written out; :func:`read_config` reads it back.

    Raises:
        ConfigError: the model has layers that the original does not have.
    """
    kinds = config.layer_types
    if other := sorted(set(kinds) - {"attention", "hyena"}):
        raise ConfigError(
            f"the original's layout has attention and hyena layers only, and this model has "
            f"{', '.join(map(shown, other))}: save it in "
            "our layout (--layout hyaena, layout='hyaena')"
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
    check_written(config, read_config(values), unread=_UNREAD_FIELDS)
    return values


def check_written(config: ModelConfig, again: ModelConfig, *, unread: Iterable[str]) -> None:
    """Refuse to write a configuration that a format cannot say.

    Args:
        config: what is to be written.
        again: what would be read.
        unread: fields that mean nothing in models of this format.

    Raises:
        ConfigError: a field that would be lost.
    """
    lost = [
        name
        for name in (field.name for field in fields(ModelConfig))
        if name not in unread and getattr(again, name) != getattr(config, name)
    ]
    if lost:
        values = ", ".join(f"{name}: {shown(getattr(config, name))}" for name in lost[:3])
        raise ConfigError(
            f"the original's configuration has no keys for {values}: save it in "
            "our layout (--layout hyaena, layout='hyaena')"
        )


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The original's keys -> the fields of ``ModelConfig``."""
    if values.get("model_type", "stripedhyena") != "stripedhyena":
        raise ConfigError(f"model_type is {shown(values['model_type'])}: only 'stripedhyena' is supported")
    known = {*RENAMED, *COMPUTED, *SUPPORTED, *NO_EFFECT, *UNSUPPORTED_KEYS}
    problems = unknown_keys([key for key in values if key not in known], known)
    problems += [f"{key} is missing: add it" for key in REQUIRED if values.get(key) is None]
    problems += unsupported_keys(values)
    for key, (wanted, reason) in SUPPORTED.items():
        if key in values and not same(values[key], wanted):
            problems.append(f"{key} is {shown(values[key])}, only {wanted!r} is supported: {reason}")
    if problems:
        raise ConfigError(joined(problems))

    read = {name: values.get(key, DEFAULTS.get(key)) for key, name in RENAMED.items() if key != "model_name"}
    if values.get("model_name") is not None:
        read["name"] = values["model_name"]
    width, heads = values["hidden_size"], values["num_attention_heads"]
    filters, groups = values.get("num_filters", width), values.get("proj_groups", 1)
    for key, value in (("hidden_size", width), ("num_attention_heads", heads), ("proj_groups", groups)):
        check_whole(key, value)
    if not same(filters, width):
        raise ConfigError(
            f"num_filters {shown(filters)} differs from hidden_size {shown(width)}: shared filters are not supported"
        )
    if heads % groups:
        raise ConfigError(
            f"num_attention_heads {shown(heads)} is not a multiple of proj_groups {shown(groups)}: change one of them"
        )
    read["num_key_value_heads"] = heads // groups
    # The published 7B configuration has a Hyena layer past the last one.
    read["layer_types"] = layer_types(values, _LISTS, open_ended=("hyena_layer_idxs",))
    read["intermediate_size"] = intermediate_size(values)
    read["rope_scaling_factor"] = rope_scaling(values)
    read["max_length"] = values.get("max_seqlen", values.get("max_sequence_len", 8192))
    read["tokenizer"] = _tokenizer(values)
    return read


def same(value: Any, wanted: Any) -> bool:
    """Equality that does not take 1 for True, nor the string "True" for anything but a string."""
    return type(value) is type(wanted) and value == wanted


def check_whole(key: str, value: Any) -> None:
    """Refuse a value that is not a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key} is {shown(value)}: write a whole number of at least 1")


def flag(values: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """The value of a key that is true or false."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {shown(value)}: write true or false, without quotes")
    return value


def layer_types(
    values: Mapping[str, Any], lists: Mapping[str, str], *, open_ended: Container[str] = ()
) -> tuple[str, ...]:
    """The kinds of all layers, from lists of their numbers.

    Args:
        values: a configuration.
        lists: our kind of layer -> the key of its list.
        open_ended: keys whose lists may go past the last layer.
    """
    count = values["num_layers"]
    check_whole("num_layers", count)
    if count > MAX_LAYERS:
        raise ConfigError(f"num_layers is {shown(count)}: write at most {MAX_LAYERS:,}")
    kinds: dict[int, str] = {}
    for kind, key in lists.items():
        indices = values[key]
        if not isinstance(indices, (list, tuple)) or any(type(i) is not int or i < 0 for i in indices):
            raise ConfigError(f"{key} is {shown(indices)}: list the layers' numbers, from 0")
        if both := sorted(set(indices) & kinds.keys()):
            other = lists[kinds[both[0]]]
            raise ConfigError(f"layers {shown(both)} are in {other} and in {key}: remove them from one")
        if key not in open_ended and (beyond := sorted({i for i in indices if i >= count})):
            raise ConfigError(f"{key} lists {shown(beyond)}, but num_layers is {count}: remove them or add layers")
        kinds |= dict.fromkeys(indices, kind)
    if missing := sorted(set(range(count)) - kinds.keys()):
        names = " nor ".join([", ".join([*lists.values()][:-1]), [*lists.values()][-1]])
        raise ConfigError(f"layers {shown(missing)} are in neither {names}: add them to one")
    return tuple(kinds[i] for i in range(count))


def intermediate_size(values: Mapping[str, Any]) -> Any:
    """The MLP's width: ``inner_mlp_size``, or int(2·D·4/3) rounded up to a multiple of ``inner_size_multiple_of``."""
    if values.get("inner_mlp_size") is not None:
        return values["inner_mlp_size"]
    multiple = values.get("inner_size_multiple_of", 64)
    check_whole("inner_size_multiple_of", multiple)
    return -(-(8 * values["hidden_size"] // 3) // multiple) * multiple


def rope_scaling(values: Mapping[str, Any]) -> Any:
    """The factor by which positions are divided. Without the flag the original ignores the factor, so this does."""
    if not flag(values, "use_interpolated_rotary_pos_emb"):
        return 1.0
    return values.get("rotary_emb_scaling_factor", 1.0)


def _tokenizer(values: Mapping[str, Any]) -> str:
    name = values.get("tokenizer_type")
    if name is None:
        return "characters" if values["vocab_size"] == EVO_VOCABULARY else "hf"
    if not isinstance(name, str) or name not in TOKENIZERS:
        raise ConfigError(f"tokenizer_type is {shown(name)}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]
