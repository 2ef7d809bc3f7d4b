"""The configuration record: every way in, every way out, and a clear word about everything that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hyaena.config import ModelConfig
from hyaena.config_original import NO_EFFECT, SUPPORTED
from hyaena.errors import ConfigError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
PRESETS = {
    "7b-sh-32k-v1": 7_646_023_680,  # published as 7.65 B; the exact number follows from the checkpoint's key list
    "evo-1-8k": 6_452_781_056,  # published as 6.45 B
    "evo-1-131k": 6_452_781_056,
    "evo-1.5-8k": 6_452_781_056,
}

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    layer_types=("hyena", "attention"),
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    state_size=2,
)


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


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = (
        "import sys; from hyaena.config import ModelConfig; sys.exit('torch' in sys.modules or 'yaml' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the published models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert ModelConfig.from_file(ROOT / "configs" / f"{name}.yml").num_parameters == PRESETS[name]


def test_a_slot_of_the_7b() -> None:
    assert ModelConfig.from_file(ROOT / "configs" / "7b-sh-32k-v1.yml").kv_bytes_per_token(2) == 65_536


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_on_the_meta_device_with_that_many_parameters(name: str) -> None:
    import torch

    from hyaena.model import StripedHyena

    with torch.device("meta"):
        model = StripedHyena(ModelConfig.from_file(ROOT / "configs" / f"{name}.yml"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == PRESETS[name]


def test_preset_of_the_7b_states_the_published_architecture() -> None:
    config = ModelConfig.from_file(ROOT / "configs" / "7b-sh-32k-v1.yml")
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
    config = ModelConfig.from_file(ROOT / "configs" / f"{name}.yml")
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


# --- formats ---------------------------------------------------------------------------------------------------------


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
    assert ModelConfig.from_file(tmp_path / "config.json") == ModelConfig.from_file(path)


def test_golden_configurations_are_read_exactly() -> None:
    evo = ModelConfig.from_file(GOLDEN / "evo-tiny" / "config.yml")
    assert evo.intermediate_size == 176  # int(2 * 64 * 4 / 3) = 170, up to a multiple of 16
    assert evo.rope_scaling_factor == 16
    assert evo.column_split_hyena and not ModelConfig.from_file(GOLDEN / "evo8k-tiny" / "config.yml").column_split_hyena
    assert not evo.norm_eps_inside_root and evo.tokenizer == "characters"
    striped = ModelConfig.from_file(GOLDEN / "sh-tiny" / "config.yml")
    assert striped.num_key_value_heads == 2 and striped.norm_eps_inside_root and striped.tokenizer == "hf"
    assert striped.layer_types == ("hyena", "attention", "hyena", "attention")  # layer 4 is listed, and does not exist


def test_our_own_config_json_round_trips(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "hyaena"
    assert ModelConfig.from_file(tmp_path / "config.json") == TINY


configs = st.builds(
    lambda head_dim, heads, groups, **fields: ModelConfig(
        hidden_size=2 * head_dim * heads * groups,
        num_attention_heads=heads * groups,
        num_key_value_heads=groups,
        **fields,
    ),
    head_dim=st.integers(1, 8),
    heads=st.integers(1, 4),
    groups=st.integers(1, 4),
    vocab_size=st.integers(1, 600),
    layer_types=st.lists(st.sampled_from(["hyena", "attention"]), min_size=1, max_size=6).map(tuple),
    intermediate_size=st.integers(1, 99),
    state_size=st.integers(1, 16),
    short_filter_length=st.integers(1, 8),
    activation=st.sampled_from(["silu", "gelu"]),
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
    name=st.text(max_size=8),
)


@given(configs)
def test_the_count_is_that_of_the_model(config: ModelConfig) -> None:
    import torch

    from hyaena.model import StripedHyena

    with torch.device("meta"):
        assert sum(p.numel() for p in StripedHyena(config).parameters()) == config.num_parameters


@given(configs)
def test_a_slot_is_what_a_longer_cache_holds_more(config: ModelConfig) -> None:
    import torch

    from hyaena.model import StripedHyena

    with torch.device("meta"):
        model = StripedHyena(config)
        short, long = (model.make_cache(1, max_length=length).nbytes for length in (1, 2))
    assert long - short == config.kv_bytes_per_token(4)


@given(configs)
def test_both_formats_say_everything(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_original_dict()))) == config


def test_every_prefill_style_means_a_method() -> None:
    from hyaena.ops import ModalFilter

    six = {"recurrence", "modal-fft", "hybrid-modal-recurrence", "modal-scan", "canonical-fft", "iir-fir-caching"}
    for style in {*six, "fft"}:
        assert ModelConfig.from_dict(original(prefill_style=style)).prefill_method in ModalFilter.methods
    for name in ("auto", *ModalFilter.methods):  # our own names are the same in both
        assert ModelConfig.from_dict(original(prefill_style=name)).prefill_method == name


def test_the_maximum_length_is_max_seqlen_then_max_sequence_len_then_8192() -> None:
    assert ModelConfig.from_dict(original(max_seqlen=77, max_sequence_len=99)).max_length == 77
    assert ModelConfig.from_dict(original(max_sequence_len=99)).max_length == 99
    assert ModelConfig.from_dict(original()).max_length == 8192


def test_absent_keys_take_the_originals_defaults() -> None:
    config = ModelConfig.from_dict(original())
    assert config.attention_qkv_bias and config.attention_out_bias and config.column_split_hyena
    assert not config.norm_eps_inside_root
    assert (config.rope_theta, config.rope_scaling_factor, config.activation) == (10_000, 1, "silu")
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.intermediate_size == 64  # int(2 * 16 * 4 / 3) = 42, up to a multiple of 64


def test_the_interpolation_factor_counts_only_when_it_is_switched_on() -> None:
    assert ModelConfig.from_dict(original(rotary_emb_scaling_factor=16)).rope_scaling_factor == 1
    on = original(rotary_emb_scaling_factor=16, use_interpolated_rotary_pos_emb=True)
    assert ModelConfig.from_dict(on).rope_scaling_factor == 16


def test_keys_without_effect_change_nothing_and_each_has_a_reason() -> None:
    assert all(NO_EFFECT.values())
    assert ModelConfig.from_dict(original(**dict.fromkeys(NO_EFFECT, "anything"))) == ModelConfig.from_dict(original())


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
        ({"hyena_layer_idxs": [0, 1, 2]}, "layers [1] stand in attn_layer_idxs and in hyena_layer_idxs"),
        ({"hyena_layer_idxs": [0]}, "layers [2] stand in neither"),
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
        ModelConfig.from_dict(original(**changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


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
        ({"layer_types": ("hyena", "mamba")}, "layer_types holds 'mamba' (layer 1)"),
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


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({"format": "hyaena", "hidden_sise": 3})
    for words in ("did you mean hidden_size?", "vocab_size is missing", "layer_types is missing"):
        assert words in str(error.value)


def test_another_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="format 'gguf' is unknown"):
        ModelConfig.from_dict({"format": "gguf"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"vocab_size: [1", "is not valid YAML"),
        (b"{'vocab_size': 1}", "is not valid JSON"),
        (b"", "holds no mapping"),
        (b"- 1\n- 2\n", "holds no mapping"),
        (b"3: 4\n", "holds no mapping"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"eps: 1\neps: 2\n", "eps is written twice"),
        (b'{"eps": 1, "eps": 2}', "eps is written twice"),
        (b"!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_file(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        ModelConfig.from_file(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="is a folder"):
        ModelConfig.from_file(tmp_path)


def test_supported_values_are_what_the_published_presets_say() -> None:
    for name in PRESETS:
        values = yaml.safe_load((ROOT / "configs" / f"{name}.yml").read_text())
        assert all(values[key] == SUPPORTED[key][0] for key in SUPPORTED if key in values)
