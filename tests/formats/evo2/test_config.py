"""The configuration files of StripedHyena 2: every key, in both directions, and a clear error for all else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hyaena.config import ModelConfig
from hyaena.errors import ConfigError
from hyaena.formats import config_from_dict, is_original, read_config, write_original

GOLDEN = Path(__file__).parents[2] / "golden" / "evo2-tiny"


def original(**changes: Any) -> dict[str, Any]:
    """The configuration of the golden case with other keys; a change to ``...`` removes the key."""
    values = yaml.safe_load((GOLDEN / "config.yml").read_text()) | changes
    return {key: value for key, value in values.items() if value is not ...}


def test_golden_configurations_are_read_exactly() -> None:
    tiny = read_config(GOLDEN / "config.yml")
    assert tiny == ModelConfig(
        vocab_size=512,
        hidden_size=64,
        layer_types=("hyena_se", "hyena_mr", "hyena_li", "attention", "hyena_se", "hyena_li"),
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        state_size=16,
        se_filter_length=7,
        se_filter_groups=8,
        se_filter_skip=False,
        mr_filter_length=32,
        mr_filter_groups=8,
        mr_filter_skip=False,
        hyena_in_bias=False,
        short_filter_bias=False,
        hyena_out_bias=True,
        activation="identity",
        first_activation="gelu",
        norm_eps=1e-6,
        norm_eps_inside_root=False,
        tie_embeddings=True,
        attention_qkv_bias=False,
        attention_out_bias=True,
        rope_frequencies_stored=True,
        rope_tables_rounded=True,
        max_length=512,
        prefill_style="fft",
        tokenizer="characters",
        name="evo2",
    )
    wide = read_config(GOLDEN / "hcm128" / "config.yml")
    assert (wide.mr_filter_length, wide.mr_filter_skip, wide.se_filter_skip) == (128, True, False)
    assert wide.intermediate_size == 128 and wide.norm_eps == 1e-3


@pytest.mark.parametrize(("taps", "skip"), [(127, False), (128, True), (200, True)])
def test_explicit_filters_have_a_skip_from_128_taps_on(taps: int, skip: bool) -> None:
    """By the number of taps, whatever the kind of layer."""
    assert config_from_dict(original(hcm_filter_length=taps)).mr_filter_skip is skip
    assert config_from_dict(original(hcs_filter_length=taps)).se_filter_skip is skip


def test_absent_keys_mean_what_the_original_takes() -> None:
    config = config_from_dict(
        original(
            rotary_emb_base=..., evo2_style_activations=..., mlp_activation=..., qkv_proj_bias=...,
            hyena_out_proj_bias=..., mha_out_proj_bias=..., short_filter_bias=..., inner_mlp_size=...,
            use_interpolated_rotary_pos_emb=..., rotary_emb_scaling_factor=32,
        )
    )  # fmt: skip
    assert config.rope_theta == 1_000_000 and config.rope_scaling_factor == 1
    assert (config.activation, config.first_activation) == ("gelu", None)
    assert (config.attention_qkv_bias, config.hyena_in_bias) == (True, False)
    assert (config.attention_out_bias, config.hyena_out_bias, config.short_filter_bias) == (True, False, False)
    assert config.intermediate_size == 176  # int(2·64·4/3) = 170, rounded up to a multiple of 16


def test_the_first_layer_keeps_its_activation() -> None:
    config = config_from_dict(original(mlp_activation="silu"))
    assert [config.activation_of(i) for i in range(3)] == ["silu", "identity", "identity"]


@pytest.mark.parametrize("case", ["config.yml", "hcm128/config.yml"])
def test_back_and_forth(case: str) -> None:
    config = read_config(GOLDEN / case)
    values = write_original(config)
    assert is_original(values) and config_from_dict(values) == config
    theirs = yaml.safe_load((GOLDEN / case).read_text())
    named = {key for key in theirs if key in values} - {"use_interpolated_rotary_pos_emb"}  # by a factor of 1
    assert {key: values[key] for key in named} == {key: theirs[key] for key in named}
    for changes in (
        {"rope_scaling_factor": 32.0, "max_length": 262_144},
        {"hyena_in_bias": True, "attention_qkv_bias": True},
        {"attention_qkv_bias": True},
        {"first_activation": None, "activation": "silu"},
        {"fp8_input_projections": True, "se_filter_groups": 16},
    ):
        changed = replace(config, **changes)
        assert config_from_dict(write_original(changed)) == changed, changes


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps_inside_root": True},
        {"layer_types": ("hyena_se", "hyena_mr", "hyena_li", "hyena", "attention", "attention")},
        {"mr_filter_skip": True},
        {"num_key_value_heads": 2},
        {"rope_tables_rounded": False},
        {"activation": "gelu"},
    ],
)
def test_what_the_original_cannot_say_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="our layout"):
        write_original(replace(read_config(GOLDEN / "config.yml"), **changes))


@pytest.mark.parametrize("preset", ["evo2-1b-base", "evo2-7b", "evo2-40b"])
def test_presets_can_be_written(preset: str) -> None:
    config = ModelConfig.from_name(preset)
    assert config_from_dict(write_original(config)) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hcl_layer_idxs": ...}, "hcl_layer_idxs is missing: add it"),
        ({"hyena_layer_idxs": [0, 1]}, "hyena_layer_idxs (StripedHyena 1) and hcs_layer_idxs (StripedHyena 2)"),
        ({"hcs_layer_idxs": [0]}, "layers [4] are in neither attn_layer_idxs, hcs_layer_idxs, hcm_layer_idxs nor"),
        ({"hcs_layer_idxs": [0, 3, 4]}, "layers [3] are in attn_layer_idxs and in hcs_layer_idxs"),
        ({"hcs_layer_idxs": [0, 4, 9]}, "hcs_layer_idxs lists [9], but num_layers is 6"),
        ({"interleave": ...}, "interleave is missing, which means False, and only True is supported: write it out"),
        ({"interleave": False}, "interleave is False, only True is supported"),
        ({"column_split_hyena": ...}, "column_split_hyena is missing, which means True"),
        ({"column_split": False}, "column_split is False, only True is supported"),
        ({"hyena_flip_x1x2": True}, "hyena_flip_x1x2 is True"),
        ({"proj_groups": 2}, "proj_groups is 2, only 1 is supported"),
        ({"use_flash_rmsnorm": True}, "use_flash_rmsnorm is True, only False is supported"),
        ({"num_filters": 48}, "num_filters 48 does not divide hidden_size 64"),
        ({"hcm_filter_groups": 7}, "hidden_size 64 is not a multiple of hcm_filter_groups 7"),
        ({"hcm_filter_lenght": 128}, "hcm_filter_lenght is not a known key: did you mean hcm_filter_length?"),
        ({"mlp_activation": "relu"}, "mlp_activation is 'relu': choose one of"),
        ({"evo2_style_activations": "True"}, "evo2_style_activations is 'True': write true or false"),
        ({"tokenizer_type": "Nope"}, "tokenizer_type is 'Nope': choose one of"),
        ({"eps": "1e-6"}, "eps is '1e-6': write a positive number"),
    ],
)
def test_configurations_that_cannot_be_used(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(original(**changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
