"""Folders of models: what is written is read again, by both sides, bit for bit and in the right dtypes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import hyaena
import pages
from hf_models import CONFIGS
from hyaena import StripedHyena
from hyaena.adapters import add_adapter
from hyaena.checkpoints import load_model, save_model
from hyaena.cli import main
from hyaena.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from hyaena.formats import read_config, write_original
from hyaena.hf import (
    StripedHyenaConfig,
    StripedHyenaForCausalLM,
    StripedHyenaForSequenceClassification,
    StripedHyenaModel,
)

WIDE = ("poles", "residues", "log_poles")


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in one.items()
    )


def check_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(WIDE) else dtype), name


@pytest.mark.parametrize("limit", ["5GB", "10kB"])
def test_saved_and_loaded(native: StripedHyena, tmp_path: Path, limit: str) -> None:
    model = StripedHyenaForCausalLM.from_native(native)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit == "10kB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is StripedHyenaForCausalLM and same(again, model) and not again.training
    assert again.config.to_native() == native.config
    if native.config.tie_embeddings:
        assert again.lm_head.weight is again.model.embed_tokens.weight
    read = hyaena.load_model(tmp_path)
    assert same(read, native) and read.config == native.config
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is StripedHyenaModel and same(base, model.model)


def test_a_second_save_replaces_the_first(tiny: StripedHyena, tmp_path: Path) -> None:
    model = StripedHyenaForCausalLM.from_native(copy.deepcopy(tiny))
    for limit in ("5GB", "10kB", "5GB"):
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        model.save_pretrained(tmp_path, max_shard_size=limit)
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        assert same(hyaena.load_model(tmp_path), model.to_native())


def test_what_cannot_be_saved(tiny: StripedHyena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the folder is empty: name a path"):
        StripedHyenaForCausalLM.from_native(tiny).save_pretrained("")
    adapted = copy.deepcopy(tiny)
    add_adapter(adapted, rank=2)
    with pytest.raises(CheckpointError, match="merge it into the weights first"):
        StripedHyenaForCausalLM.from_native(adapted).save_pretrained("x")
    for other in (StripedHyenaForCausalLM.from_native(tiny), 3):
        with pytest.raises(InputError, match="from_native takes the StripedHyena that"):
            StripedHyenaForCausalLM.from_native(other)  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


def test_classifiers_are_saved_and_start_from_language_models(tiny: StripedHyena, tmp_path: Path) -> None:
    StripedHyenaForCausalLM.from_native(tiny).save_pretrained(tmp_path / "lm")
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model, info = auto.from_pretrained(tmp_path / "lm", num_labels=3, output_loading_info=True)
        assert "score.weight" in info["missing_keys"] and model.score.weight.shape == (3, 16)
        assert 0 < model.score.weight.std() < 1
        model.save_pretrained(tmp_path / "classes")
        assert same(auto.from_pretrained(tmp_path / "classes"), model)
        with pytest.raises(ConfigError, match=rf"classifier.* hyaena\.hf\.{type(model).__name__}\.from_pretrained"):
            hyaena.load(tmp_path / "classes")
        made = auto.from_config(model.config)
        assert type(made) is type(model) and made.config.num_labels == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_poles_are_float32_on_every_road(native: StripedHyena, tmp_path: Path, dtype: torch.dtype) -> None:
    native(torch.zeros(1, 2, dtype=torch.long)).sum().backward()  # gradients are cast, too
    model = StripedHyenaForCausalLM.from_native(native)
    model.save_pretrained(tmp_path / "wide")
    exact = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(WIDE)}
    name = str(dtype).removeprefix("torch.")
    roads: dict[str, Any] = {
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype),
        "by name": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=name),
        "device_map": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype, device_map="cpu"),
        "auto": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype, device_map="auto"),
        "from_config": lambda: AutoModelForCausalLM.from_config(model.config, dtype=dtype),
        ".to": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "wide").to(dtype),
        ".half": lambda: getattr(
            AutoModelForCausalLM.from_pretrained(tmp_path / "wide"), "half" if dtype == torch.float16 else "bfloat16"
        )(),
        "type": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "wide").type(dtype),
    }
    for road, load in roads.items():
        loaded = load()
        check_dtypes(loaded, dtype)
        assert loaded.dtype == dtype, road
        if road != "from_config":
            assert all(torch.equal(p, exact[n]) for n, p in loaded.named_parameters() if n in exact), road
        if dtype == torch.bfloat16:
            loaded.save_pretrained(tmp_path / "narrow")
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
            check_dtypes(again, dtype)
            assert same(again, loaded), road
            check_dtypes(hyaena.load_model(tmp_path / "narrow", dtype="bfloat16"), dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.bfloat16
    check_dtypes(model, torch.float32)


def test_float64_is_wider_still(tiny: StripedHyena, tmp_path: Path) -> None:
    StripedHyenaForCausalLM.from_native(tiny).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@torch.inference_mode()
def test_weights_that_accelerate_keeps_elsewhere(native: StripedHyena, tmp_path: Path) -> None:
    """Weights on the disk are brought in for each call: every module that has some must be called, not only read."""
    pytest.importorskip("accelerate")
    StripedHyenaForCausalLM.from_native(native).save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "disk"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(native.config.num_layers)}
    if native.rotary.frequencies is not None:
        places["model.rotary"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    x = torch.randint(2, 50, (2, 6))
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(model(x).logits, native(x))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    plain = StripedHyenaForCausalLM.from_native(native).generate(x, **options)
    assert torch.equal(model.generate(x, **options), plain)
    assert torch.equal(model.generate(x, cache_implementation="static", **options), plain)


@pytest.mark.parametrize("kept", [None, "int8", "bfloat16"])
def test_there_and_back_the_caches_have_their_dtype(kept: str | None) -> None:
    native = StripedHyena(CONFIGS[min(CONFIGS)])
    native.cache_dtype = kept
    for kind in (StripedHyenaForCausalLM, StripedHyenaForSequenceClassification, StripedHyenaModel):
        made = kind.from_native(native)
        if made.get_output_embeddings() is None and not native.config.tie_embeddings:
            continue
        assert made.to_native().cache_dtype == native.cache_dtype
        assert copy.deepcopy(made).to_native().make_cache(max_length=4).nbytes == native.make_cache(max_length=4).nbytes
    fresh = StripedHyenaForCausalLM(StripedHyenaConfig.from_native(native.config)).to_native()
    assert fresh.cache_dtype == fresh.dtype


def test_our_own_layout(native: StripedHyena, tmp_path: Path) -> None:
    save_model(native, tmp_path, max_shard_size=10_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(model.to_native(), native) and not model.training
    narrow = StripedHyenaForCausalLM.from_pretrained(str(tmp_path), dtype="bfloat16", device_map="cpu")
    check_dtypes(narrow, torch.bfloat16)
    classes = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert isinstance(classes, StripedHyenaForSequenceClassification) and classes.score.weight.shape == (4, 16)
    assert all(same(a, b) for a, b in zip(classes.model.layers, native.layers, strict=True))


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_hub_checkpoints_of_the_original(golden_case: Path, tmp_path: Path, weights: str) -> None:
    """As the hub has them: ``config.json`` with code of its own beside it, ``backbone.`` before the names."""
    native = load_model(golden_case)
    values = write_original(native.config) | {
        "model_type": "stripedhyena",
        "architectures": ["StripedHyenaModelForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_hyena.StripedHyenaModelForCausalLM"},
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    state = load_file(golden_case / "model.safetensors")
    if weights == "safetensors":
        save_file({f"backbone.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model) is StripedHyenaForCausalLM and same(model.to_native(), native)
    assert model.generation_config.eos_token_id == 3
    check_dtypes(AutoModelForCausalLM.from_pretrained(tmp_path), torch.bfloat16)  # as its configuration says
    model.save_pretrained(tmp_path / "saved")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
    with pytest.raises(UnsupportedError, match="subfolder does not work"):
        StripedHyenaForCausalLM.from_pretrained(tmp_path, config=model.config, subfolder=".")


def test_published_configurations_are_completed() -> None:
    values = write_original(hyaena.ModelConfig.from_name("evo-1-131k")) | {"model_type": "stripedhyena"}
    del values["use_interpolated_rotary_pos_emb"], values["rotary_emb_scaling_factor"]
    config = StripedHyenaConfig.from_dict(values, name_or_path="togethercomputer/evo-1-131k-base")
    assert config.rope_parameters == {"rope_type": "linear", "factor": 16.0, "rope_theta": 10_000.0}
    assert (config.tokenizer, config.max_position_embeddings, config.eos_token_id) == ("characters", 131_072, 0)


def test_converted_folders(tmp_path: Path, native: StripedHyena, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(native, tmp_path / "ours")
    for layout in ("transformers", "hyaena"):
        source = tmp_path / ("ours" if layout == "transformers" else "transformers")
        assert main(["convert", str(source), str(tmp_path / layout), "--layout", layout]) == 0
    assert "in the transformers layout" in capsys.readouterr().out
    assert same(load_model(tmp_path / "hyaena"), native)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")
    assert same(model.to_native(), native)
    model.save_pretrained(tmp_path / "again")
    mine, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("transformers", "again"))
    assert {key: theirs[key] for key in mine} == mine


def test_the_bundled_model_converted(tmp_path: Path) -> None:
    assert main(["convert", "cub", str(tmp_path), "--layout", "transformers"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer("import argparse\n", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)
    assert (
        text == "import argparse\n" + hyaena.generate(*hyaena.load("cub"), "import argparse\n", max_new_tokens=8).text
    )
    native, own = hyaena.load(tmp_path)
    assert own.encode("a") == tokenizer("a")["input_ids"] and native.config.name == "cub"


@pytest.mark.parametrize("lost", ["model.layers.1.mixer.o_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_an_error(tiny: StripedHyena, tmp_path: Path, lost: str) -> None:
    StripedHyenaForCausalLM.from_native(tiny).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing: {lost}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        hyaena.load_model(tmp_path)


def test_a_damaged_original_checkpoint(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "sh-tiny", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["blocks.0.filter.poles"] = state["blocks.0.filter.poles"][:-1].clone()
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks.0.filter.poles is"):
        StripedHyenaForCausalLM.from_pretrained(tmp_path / "model")


def test_configurations(native: StripedHyena, tmp_path: Path) -> None:
    config = StripedHyenaConfig.from_native(native.config)
    assert config.to_native() == native.config
    assert config.layer_types.count("full_attention") == native.config.layer_types.count("attention")
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_native() == native.config
    assert read_config(tmp_path / "config.json") == native.config
    assert StripedHyenaConfig.from_pretrained(tmp_path, use_cache=False).use_cache is False


def test_default_configuration() -> None:
    assert StripedHyenaConfig(num_hidden_layers=4).layer_kinds == ["hyena", "attention"] * 2
    named = {"name": "sh-7b-32k-v1", "prefill_style": "fft"}
    assert StripedHyenaConfig(**named).to_native() == hyaena.ModelConfig.from_name("sh-7b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 17}, "hidden_size 17 is not a multiple of num_attention_heads 4"),
        ({"layer_kinds": ["hyena", "mamba"]}, "unknown layer kind 'mamba'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': choose one of silu, gelu"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "only 'default' and 'linear'"),
    ],
)
def test_bad_configurations(changes: dict, words: str) -> None:
    values = StripedHyenaConfig.from_native(CONFIGS["sh"]).to_dict() | changes
    if "layer_kinds" in changes:
        values["num_hidden_layers"] = 2
    with pytest.raises(ConfigError, match=words):
        StripedHyenaForCausalLM(StripedHyenaConfig(**values))


def test_an_unknown_key_in_a_folder(tiny: StripedHyena, tmp_path: Path) -> None:
    StripedHyenaForCausalLM.from_native(tiny).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"hiden_act": "silu"}))
    with pytest.raises(ConfigError, match="hiden_act is not a known key: did you mean hidden_act"):
        hyaena.load_model(tmp_path)


PROGRAM = """
import sys
{before}
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
print(type(model).__module__, type(model).__name__)
model.save_pretrained("again")
"""
NOT_INSTALLED = """
class Finder:
    def find_spec(self, name, *_):
        if name == "hyaena":
            raise ModuleNotFoundError("No module named 'hyaena'")


sys.meta_path.insert(0, Finder())
"""


@pytest.mark.integration
@pytest.mark.parametrize("writer", ["save_pretrained", "save_model"])
def test_a_folder_opens_where_nobody_imported_us(tiny: StripedHyena, tmp_path: Path, writer: str) -> None:
    if writer == "save_model":
        save_model(tiny, tmp_path / "model", layout="transformers")
    else:
        StripedHyenaForCausalLM.from_native(tiny).save_pretrained(tmp_path / "model")
    done = run_program(tmp_path, "")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hyaena.hf.heads", "StripedHyenaForCausalLM"]
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_hyaena.py"]
    assert same(hyaena.load_model(tmp_path / "again"), tiny)


@pytest.mark.integration
def test_a_folder_says_what_is_missing(tiny: StripedHyena, tmp_path: Path) -> None:
    StripedHyenaForCausalLM.from_native(tiny).save_pretrained(tmp_path / "model")
    done = run_program(tmp_path, NOT_INSTALLED)
    assert done.returncode == 1
    assert "packages that were not found in your environment: hyaena" in done.stderr


def run_program(folder: Path, before: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(pages.ROOT / "src"), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM.format(before=before)]
    return subprocess.run(
        command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, check=False, timeout=200
    )


def test_hub_models_without_a_configuration(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evo 2's authors publish weights alone."""
    case = golden / "evo2-tiny"
    torch.save(load_file(case / "model.safetensors"), tmp_path / "evo2_7b.pt")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(hyaena.ModelConfig, "from_name", lambda _: read_config(case / "config.yml"))
    model = StripedHyenaForCausalLM.from_pretrained("arcinstitute/evo2_7b")
    assert same(model.to_native(), load_model(case))
    assert model.config.pad_token_id == 1
