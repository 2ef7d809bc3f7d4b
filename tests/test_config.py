"""The configuration record: its presets, its file, and a clear error for everything that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import TINY
from hyaena.config import LARGEST, MAX_LAYERS, RANGES, TOOL_KEYS, ModelConfig, preset_names
from hyaena.errors import SCREEN, ConfigError
from hyaena.formats import config_from_dict, write_original
from hyaena.formats.stripedhyena.config import write_config
from hyaena.sizes import LAYER_SIZES, ModelSizes

PARAMETERS = {
    "sh-7b": 7_646_023_680,  # published as 7.65 B; the exact number follows from the checkpoint's key list
    "evo2-1b-base": 1_107_989_760,
    "evo2-7b-base": 6_481_059_584,
    "evo2-7b-262k": 6_481_059_584,
    "evo2-7b": 6_581_722_880,
    "evo2-7b-microviridae": 6_481_059_584,
    "evo2-20b": 19_738_780_160,
    "evo2-40b-base": 40_331_142_144,
    "evo2-40b": 41_117_574_144,
    "evo-1-8k": 6_452_781_056,  # published as 6.45 B
    "evo-1-131k": 6_452_781_056,
    "evo-1.5-8k": 6_452_781_056,
}


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = (
        "import sys; from hyaena.config import ModelConfig; sys.exit('torch' in sys.modules or 'yaml' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the published models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    import torch

    from hyaena.model import StripedHyena

    config = ModelConfig.from_name(name)
    assert ModelSizes(config).parameters == PARAMETERS[name]
    with torch.device("meta"):
        model = StripedHyena(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_presets_are_listed_and_the_nearest_is_suggested() -> None:
    assert set(preset_names()) == {*PARAMETERS, "cub"}
    assert ModelConfig.from_name("cub").tokenizer == "bytes"
    with pytest.raises(ConfigError, match="did you mean sh-7b") as error:
        ModelConfig.from_name("sh7b")
    assert all(name in str(error.value) for name in preset_names())
    for name in ("../configs/sh-7b", "sh-7b.yml", "", "\x1b[2J"):
        with pytest.raises(ConfigError, match="no preset is called") as error:
            ModelConfig.from_name(name)
        assert str(error.value).isprintable()


def test_preset_of_the_7b_states_the_published_architecture() -> None:
    config = ModelConfig.from_name("sh-7b")
    assert config == ModelConfig(
        name="sh-7b-32k-v1",
        vocab_size=32_000,
        hidden_size=4096,
        layer_types=("hyena", "attention") * 16,
        intermediate_size=14_336,
        num_attention_heads=32,
        num_key_value_heads=8,
        state_size=2,
        rope_theta=500_000.0,
        max_length=32_768,
        prefill_style="fft",
    )


@pytest.mark.parametrize(
    ("name", "scaling", "length"), [("evo-1-8k", 1, 8192), ("evo-1-131k", 16, 131_072), ("evo-1.5-8k", 1, 8192)]
)
def test_presets_of_evo_state_the_published_architecture(name: str, scaling: int, length: int) -> None:
    config = ModelConfig.from_name(name)
    assert config == ModelConfig(
        name=name,
        vocab_size=512,
        hidden_size=4096,
        layer_types=tuple("attention" if i in (8, 16, 24) else "hyena" for i in range(32)),
        intermediate_size=10_928,
        num_attention_heads=32,
        num_key_value_heads=32,
        state_size=8,
        activation="gelu",
        norm_eps=1e-6,
        norm_eps_inside_root=False,
        tie_embeddings=True,
        attention_qkv_bias=True,
        attention_out_bias=True,
        rope_scaling_factor=scaling,
        max_length=length,
        prefill_style="fft",
        tokenizer="characters",
    )


# --- our own file ----------------------------------------------------------------------------------------------------


configs = st.builds(
    lambda head_dim, heads, groups, filters, fp8, **fields: ModelConfig(
        hidden_size=2 * head_dim * heads * groups,
        num_attention_heads=heads * groups,
        num_key_value_heads=groups,
        se_filter_groups=2 * heads if filters else None,
        mr_filter_groups=2 * heads * groups if filters else None,
        fp8_input_projections=fp8 and not fields["hyena_in_bias"],
        **fields,
    ),
    filters=st.booleans(),
    fp8=st.booleans(),
    head_dim=st.integers(1, 8),
    heads=st.integers(1, 4),
    groups=st.integers(1, 4),
    vocab_size=st.integers(1, 600),
    layer_types=st.lists(st.sampled_from(sorted(LAYER_SIZES)), min_size=1, max_size=6).map(tuple),
    intermediate_size=st.integers(1, 99),
    state_size=st.integers(1, 16),
    short_filter_length=st.integers(1, 8),
    activation=st.sampled_from(["silu", "gelu", "identity"]),
    first_activation=st.sampled_from([None, "silu", "gelu"]),
    hyena_in_bias=st.booleans(),
    short_filter_bias=st.booleans(),
    hyena_out_bias=st.booleans(),
    se_filter_skip=st.booleans(),
    mr_filter_skip=st.booleans(),
    rope_frequencies_stored=st.booleans(),
    rope_tables_rounded=st.booleans(),
    norm_eps=st.floats(1e-9, 1e-2),
    norm_eps_inside_root=st.booleans(),
    tie_embeddings=st.booleans(),
    attention_qkv_bias=st.booleans(),
    attention_out_bias=st.booleans(),
    rope_theta=st.floats(1, 1e7),
    rope_scaling_factor=st.floats(0.5, 32),
    max_length=st.integers(1, 1 << 20),
    column_split_hyena=st.booleans(),
    prefill_style=st.sampled_from(["auto", "fft", "recurrence"]),
    tokenizer=st.sampled_from(["hf", "characters", "bytes"]),
    name=st.text(st.characters(exclude_categories=["C", "Z"]), max_size=8),
    se_filter_length=st.integers(1, 9),
    mr_filter_length=st.integers(1, 200),
    vocab_file=st.none() | st.just("tokenizer.json"),
)


@given(configs)
def test_the_count_is_that_of_the_model(config: ModelConfig) -> None:
    import torch

    from hyaena.model import StripedHyena

    with torch.device("meta"):
        assert sum(p.numel() for p in StripedHyena(config).parameters()) == ModelSizes(config).parameters


@given(configs)
def test_a_token_is_what_a_longer_cache_holds_more(config: ModelConfig) -> None:
    import torch

    from hyaena.model import StripedHyena

    with torch.device("meta"):
        model = StripedHyena(config)
        short, long = (model.make_cache(1, max_length=length).nbytes for length in (1, 2))
    assert long - short == ModelSizes(config).kv_bytes_per_token(4)


@given(configs)
def test_both_formats_keep_every_field(config: ModelConfig) -> None:
    import yaml

    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    kinds = tuple("attention" if kind == "attention" else "hyena" for kind in config.layer_types)
    others = ("se_filter_length", "se_filter_groups", "mr_filter_length", "mr_filter_groups", "se_filter_skip")
    others += ("mr_filter_skip", "first_activation", "hyena_in_bias", "short_filter_bias", "hyena_out_bias")
    others += ("rope_frequencies_stored", "rope_tables_rounded", "fp8_input_projections")
    old = replace(config, layer_types=kinds, **{name: getattr(TINY, name) for name in others})
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(write_config(old)))) == old
    if kinds != config.layer_types:
        with pytest.raises(ConfigError, match="the original's layout has attention and hyena layers only"):
            write_config(config)


@given(configs)
def test_what_is_written_for_an_original_is_read_back_or_refused(config: ModelConfig) -> None:
    """Nothing is lost silently. Left out are fields that mean nothing in models of such layers."""
    try:
        again = config_from_dict(write_original(config))
    except ConfigError as error:
        assert "our layout (--layout hyaena" in str(error)
        return
    old = not (config.rope_frequencies_stored or {"hyena_se", "hyena_mr", "hyena_li"} & set(config.layer_types))
    unread = [name for name in config.to_dict() if name.startswith(("se_", "mr_"))] if old else ["column_split_hyena"]
    unread += [] if old else ["prefill_style", "vocab_file"]
    assert replace(again, **{name: getattr(config, name) for name in unread}) == config


def test_our_own_config_json_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_dict()))
    assert json.loads(path.read_text())["format"] == "hyaena"
    assert ModelConfig.from_file(path) == TINY
    path.write_text(json.dumps(TINY.to_dict()), encoding="utf-8-sig")  # with a byte order mark
    assert ModelConfig.from_file(path) == TINY


def test_kinds_of_layers_are_names_that_the_model_and_its_sizes_check() -> None:
    """A model may be built with mixers of its own, so the record takes any name."""
    from hyaena.model import StripedHyena

    config = replace(TINY, layer_types=("hyena", "atention"))
    assert ModelConfig.from_dict(config.to_dict()) == config
    for check in (StripedHyena, ModelSizes):
        with pytest.raises(ConfigError, match=r"layer 1: unknown layer kind 'atention': did you mean attention[?]"):
            check(config)


def test_keys_of_other_tools_change_nothing_and_each_has_a_reason() -> None:
    assert all(TOOL_KEYS.values())
    added = dict.fromkeys(TOOL_KEYS, "anything") | {"quantization_config": None}
    assert ModelConfig.from_dict(added | TINY.to_dict()) == TINY
    with pytest.raises(ConfigError, match="quantization_config: quantized checkpoints cannot be read"):
        ModelConfig.from_dict(TINY.to_dict() | {"quantization_config": {"load_in_8bit": True}})


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size is 0: write a whole number of at least 1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 12}, "hidden_size / num_attention_heads is 3: rotary positions need an even number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"layer_types": ()}, "layer_types is ()"),
        ({"layer_types": ("hyena", "")}, "layer_types has '' for layer 1"),
        ({"layer_types": ("hyena", 3)}, "layer_types has 3 for layer 1"),
        ({"layer_types": ("hyena",) * (MAX_LAYERS + 1)}, "layer_types lists 1,025 layers: at most 1,024"),
        ({"se_filter_groups": 3}, "hidden_size 16 is not a multiple of se_filter_groups 3"),
        ({"mr_filter_groups": 5}, "hidden_size 16 is not a multiple of mr_filter_groups 5"),
        ({"mr_filter_length": 0}, "mr_filter_length is 0"),
        ({"se_filter_groups": 0}, "se_filter_groups is 0"),
        ({"vocab_size": 10**5000}, "vocab_size is a number of thousands of digits: write at most 16,777,216"),
        ({"norm_eps": 10**400}, "norm_eps is 1000000"),
        ({"norm_eps": 1e-320}, "norm_eps is 1e-320: write a positive number from 1e-20 to 1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 1e308}, "rope_theta is 1e+308"),
        ({"name": "\x1b]0;title\x07"}, "name is '\\x1b]0;title\\x07': leave out characters that cannot be printed"),
        ({"name": "x" * 10_000}, "name has 10,000 characters: write at most 200"),
        ({"vocab_file": 3}, "vocab_file is 3: write text"),
        ({"layer_types": "hyena"}, "layer_types is 'hyena'"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_scaling_factor": -1}, "rope_scaling_factor is -1"),
        ({"tokenizer": "words"}, "tokenizer is 'words': choose one of hf, characters, bytes"),
        ({"activation": []}, "activation is []"),
        ({"name": 7}, "name is 7"),
        ({"tie_embeddings": "False"}, "tie_embeddings is 'False': write true or false, without quotes"),
    ],
)
def test_values_that_cannot_be_used(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(TINY, **changes)
    assert words in str(error.value)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(TINY.to_dict() | changes)
    assert words in str(error.value)


def test_hyena_only_models_may_have_odd_heads() -> None:
    assert replace(TINY, hidden_size=12, layer_types=("hyena",)).head_dim == 3


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({"format": "hyaena", "hidden_sise": 3})
    for words in ("did you mean hidden_size?", "vocab_size is missing", "layer_types is missing"):
        assert words in str(error.value)


def test_another_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="format 'gguf' is unknown"):
        ModelConfig.from_dict({"format": "gguf"})


@pytest.mark.parametrize("name", LARGEST)
def test_numbers_beyond_every_model_are_refused_before_anything_is_built(name: str) -> None:
    for value in (LARGEST[name] + 1, 2**62, 2**64, 10**30):
        with pytest.raises(ConfigError, match=f"{name} is .*: write at most {LARGEST[name]:,}"):
            replace(TINY, **{name: value})


@pytest.mark.parametrize("name", RANGES)
def test_real_numbers_stay_within_what_float32_computes_with(name: str) -> None:
    smallest, largest = RANGES[name]
    for value in (smallest, largest):
        assert getattr(replace(TINY, **{name: value}), name) == value
    for value in (smallest / 2, largest * 2, -smallest, float("nan"), float("-inf")):
        with pytest.raises(ConfigError, match=f"{name} is "):
            replace(TINY, **{name: value})


def test_messages_are_printable_and_fit_a_screen() -> None:
    hostile = {f"\x1b[2Jkey{i}\n" + "x" * 9000: i for i in range(2000)}
    with pytest.raises(ConfigError, match="and 1,994 more") as error:
        ModelConfig.from_dict(TINY.to_dict() | hostile)
    assert str(error.value).isprintable() and len(str(error.value)) <= SCREEN
    nested: Any = "x"
    for _ in range(500):
        nested = [nested] * 5
    with pytest.raises(ConfigError, match="activation is ") as error:
        replace(TINY, activation=nested)
    assert len(str(error.value)) < 300


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yml: no such file"):
        ModelConfig.from_file(tmp_path / "none.yml")
