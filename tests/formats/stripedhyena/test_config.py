"""Original configuration files: every key, in both directions, and a clear error for all that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import TINY, TINY_EVO
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import ConfigError
from hyaena.formats import config_from_dict, read_config, write_original
from hyaena.formats.stripedhyena.config import NO_EFFECT, write_config

GOLDEN = Path(__file__).parents[2] / "golden"


def original(**changes: Any) -> dict[str, Any]:
    """A small configuration in the original's keys; a change to ``...`` removes the key."""
    values = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_filters": 16,
        "num_layers": 3,
        "attn_layer_idxs": [1],
        "hyena_layer_idxs": [0, 2],
        "num_attention_heads": 4,
        "state_size": 2,
        "short_filter_length": 3,
        "short_filter_bias": True,
        "eps": 1e-5,
        "tie_embeddings": False,
    } | changes
    return {key: value for key, value in values.items() if value is not ...}


@pytest.mark.parametrize("case", ["sh-tiny", "evo-tiny", "evo8k-tiny"])
def test_a_hub_config_json_reads_like_its_yaml(case: str, tmp_path: Path) -> None:
    path = GOLDEN / case / "config.yml"
    hub = yaml.safe_load(path.read_text()) | {
        "_commit_hash": None,
        "_name_or_path": "togethercomputer/evo-1-131k-base",
        "architectures": ["StripedHyenaModelForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_hyena.StripedHyenaConfig"},
        "model_type": "stripedhyena",
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "use_cache": True,
        "use_flash_attention_2": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(hub))
    assert read_config(tmp_path / "config.json") == read_config(path)


def test_golden_configurations_are_read_exactly() -> None:
    evo = read_config(GOLDEN / "evo-tiny" / "config.yml")
    assert evo.intermediate_size == 176  # int(2 * 64 * 4 / 3) = 170, up to a multiple of 16
    assert evo.rope_scaling_factor == 16
    assert evo.column_split_hyena and not read_config(GOLDEN / "evo8k-tiny" / "config.yml").column_split_hyena
    assert not evo.norm_eps_inside_root and evo.tokenizer == "characters"
    striped = read_config(GOLDEN / "sh-tiny" / "config.yml")
    assert striped.num_key_value_heads == 2 and striped.norm_eps_inside_root and striped.tokenizer == "hf"
    assert striped.layer_types == ("hyena", "attention", "hyena", "attention")  # layer 4 is listed, and does not exist


def test_every_prefill_style_means_a_method() -> None:
    from hyaena.ops import METHODS

    six = {"recurrence", "modal-fft", "hybrid-modal-recurrence", "modal-scan", "canonical-fft", "iir-fir-caching"}
    for style in {*six, "fft"}:
        assert config_from_dict(original(prefill_style=style)).prefill_method in METHODS
    for name in ("auto", *METHODS):  # our own names are the same in both
        assert config_from_dict(original(prefill_style=name)).prefill_method == name


def test_the_maximum_length_is_max_seqlen_then_max_sequence_len_then_8192() -> None:
    assert config_from_dict(original(max_seqlen=77, max_sequence_len=99)).max_length == 77
    assert config_from_dict(original(max_sequence_len=99)).max_length == 99
    assert config_from_dict(original()).max_length == 8192


def test_absent_keys_take_the_originals_defaults() -> None:
    config = config_from_dict(original())
    assert config.attention_qkv_bias and config.attention_out_bias and config.column_split_hyena
    assert not config.norm_eps_inside_root
    assert (config.rope_theta, config.rope_scaling_factor, config.activation) == (10_000, 1, "silu")
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.intermediate_size == 64  # int(2 * 16 * 4 / 3) = 42, up to a multiple of 64


def test_the_interpolation_factor_counts_only_when_it_is_switched_on() -> None:
    assert config_from_dict(original(rotary_emb_scaling_factor=16)).rope_scaling_factor == 1
    on = original(rotary_emb_scaling_factor=16, use_interpolated_rotary_pos_emb=True)
    assert config_from_dict(on).rope_scaling_factor == 16


def test_keys_without_effect_change_nothing_and_each_has_a_reason() -> None:
    assert all(NO_EFFECT.values())
    assert config_from_dict(original(**dict.fromkeys(NO_EFFECT, "anything"))) == config_from_dict(original())


def test_an_export_states_what_the_original_needs_to_open_it() -> None:
    """Where these are absent, the original takes a kernel that is not installed, or fails."""
    for config in (TINY, TINY_EVO):
        values = write_config(config)
        assert values["use_flashfft"] is False and values["use_flash_attn"] is True
        assert config_from_dict(values) == config
    assert "vocab_file" not in write_config(TINY)
    assert write_config(replace(TINY, vocab_file="a/tokenizer.json"))["vocab_file"] == "a/tokenizer.json"


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_the_originals_format(name: str) -> None:
    config = ModelConfig.from_name(name)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(write_original(config)))) == config


def test_formats_are_distinguished_by_their_keys(tmp_path: Path) -> None:
    ours = TINY.to_dict() | {"model_type": "stripedhyena"}
    assert config_from_dict(ours) == TINY
    del ours["format"]
    assert config_from_dict(ours) == TINY
    assert config_from_dict(original(max_length=20)).max_length == 8192  # a generation default of transformers
    path = tmp_path / "config.json"
    path.write_text(json.dumps(original()), encoding="utf-8-sig")
    assert read_config(path) == config_from_dict(original())
    with pytest.raises(ConfigError, match=r"none\.yml: no such file"):
        read_config(tmp_path / "none.yml")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hiden_size": 3}, "hiden_size is not a known key: did you mean hidden_size?"),
        ({"zzz": 3}, "zzz is not a known key: remove it"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"hyena_layer_idxs": ...}, "hyena_layer_idxs is missing"),
        ({"eps": None}, "eps is missing"),
        ({"eps": "1e-5"}, "eps is '1e-5': write a positive number (in YAML 1.0e-5, not 1e-5)"),
        ({"tie_embeddings": "False"}, "tie_embeddings is 'False': write true or false, without quotes"),
        ({"use_flash_rmsnorm": "True"}, "use_flash_rmsnorm is 'True'"),
        ({"column_split_hyena": "False"}, "column_split_hyena is 'False'"),
        ({"use_interpolated_rotary_pos_emb": "False"}, "use_interpolated_rotary_pos_emb is 'False'"),
        ({"hyena_layer_idxs": [0, 1, 2]}, "layers [1] are in attn_layer_idxs and in hyena_layer_idxs"),
        ({"hyena_layer_idxs": [0]}, "layers [2] are in neither"),
        ({"attn_layer_idxs": [1, 3]}, "attn_layer_idxs lists [3], but num_layers is 3"),
        ({"attn_layer_idxs": 1}, "attn_layer_idxs is 1"),
        ({"attn_layer_idxs": [-2]}, "attn_layer_idxs is [-2]"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_filters": 8}, "num_filters 8 differs from hidden_size 16"),
        ({"proj_groups": 3}, "num_attention_heads 4 is not a multiple of proj_groups 3"),
        ({"proj_groups": 0}, "proj_groups is 0"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"inner_mlp_size": 0}, "inner_mlp_size is 0"),
        ({"inner_size_multiple_of": 0}, "inner_size_multiple_of is 0"),
        ({"max_seqlen": 0}, "max_seqlen is 0"),
        ({"mlp_activation": "relu"}, "mlp_activation is 'relu': choose one of silu, gelu"),
        ({"prefill_style": "fftt"}, "prefill_style is 'fftt'"),
        ({"prefill_style": ["fft"]}, "prefill_style is ['fft']"),
        ({"tokenizer_type": "Elves"}, "tokenizer_type is 'Elves': choose one of HFAutoTokenizer"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hcl_layer_idxs": [0]}, "StripedHyena 2"),
        ({"layer_types": ["hyena"]}, "contradict each other: use one format"),
        ({"smeared_gqa": True}, "smeared_gqa is True, only False is supported"),
        ({"smeared_gqa": "False"}, "smeared_gqa is 'False', only False is supported"),
        ({"hyena_filter_groups": 2}, "hyena_filter_groups is 2, only 1 is supported"),
        ({"model_parallel_size": 2}, "model_parallel_size is 2, only 1 is supported"),
        ({"final_norm": False}, "final_norm is False, only True is supported"),
        ({"short_filter_bias": False}, "short_filter_bias is False, only True is supported"),
        ({"long_fir_threshold": 100}, "long_fir_threshold is 100, only None is supported"),
    ],
)
def test_original_configurations_that_cannot_be_used(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(original(**changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
