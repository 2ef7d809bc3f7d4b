"""Every form of checkpoint loads to the original's numbers, and everything that does not fit is told by name."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyaena.checkpoints import find, load, load_model, read_tensors
from hyaena.config import ModelConfig
from hyaena.errors import CheckpointError, ConfigError, HyaenaError, InputError
from hyaena.formats import read_config
from hyaena.formats.tensors import state_to_ours
from hyaena.sizes import ModelSizes
from hyaena.tensor_files import memory

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_config(case: str) -> ModelConfig:
    return read_config(GOLDEN / case / "config.yml")


def refusal(*args: Any, **kwargs: Any) -> str:
    """The message with which a load is refused: one line."""
    with pytest.raises(HyaenaError) as error:
        load_model(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A golden case that a test may damage."""
    for name in ("config.yml", "model.safetensors"):
        shutil.copy(GOLDEN / "sh-tiny" / name, tmp_path / name)
    return tmp_path


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Put tensors into the folder's weights, or (None) take them out."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, folder / "model.safetensors")


# --- what loads ------------------------------------------------------------------------------------------------------


def test_every_form_gives_the_same_weights(checkpoint: Path, case: str) -> None:
    config = golden_config(case)
    expected = state_to_ours(load_file(GOLDEN / case / "model.safetensors"), config)
    model = load_model(checkpoint)
    assert model.config == config and not model.training
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == torch.float32, name


def test_golden_folders_give_the_originals_logits(case: str) -> None:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    model = load_model(GOLDEN / case / "model.safetensors", GOLDEN / case / "config.yml")
    with torch.no_grad():
        logits = model(expected["input_ids"])
    scale = expected["logits"].abs().max()
    assert (logits - expected["logits"]).abs().max() <= 1e-4 * scale


def test_a_weights_file_takes_its_configuration_from_anywhere(folder: Path, tmp_path_factory: Any) -> None:
    weights = shutil.move(folder / "model.safetensors", tmp_path_factory.mktemp("elsewhere") / "w.safetensors")
    config = golden_config("sh-tiny")
    for given in (config, folder / "config.yml", str(folder / "config.yml")):
        assert load_model(weights, given).config == config
    assert "no config.json and no config.yml beside the weights: name one with config=" in refusal(weights)


def test_the_only_yaml_of_a_folder_is_its_configuration(folder: Path) -> None:
    (folder / "config.yml").rename(folder / "7b-sh-32k-v1.yml")
    assert load_model(folder).config == golden_config("sh-tiny")
    (folder / "other.yml").write_text("a: 1")
    assert "several configurations (7b-sh-32k-v1.yml, other.yml): name one with config=" in refusal(folder)


def test_the_dtype_is_the_embeddings_unless_told(folder: Path) -> None:
    change(
        folder, {"embedding_layer.weight": load_file(folder / "model.safetensors")["embedding_layer.weight"].bfloat16()}
    )
    dtypes = {name: p.dtype for name, p in load_model(folder).named_parameters()}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if name.endswith((".poles", ".residues")) else torch.bfloat16), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16, torch.float64])
def test_poles_and_residues_stay_exact_in_every_dtype(folder: Path, dtype: Any) -> None:
    exact = dict(load_model(folder).named_parameters())
    model = load_model(folder, dtype=dtype)
    asked = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == asked
    for name, parameter in model.named_parameters():
        if name.endswith((".poles", ".residues")):
            assert parameter.dtype == (torch.float64 if asked == torch.float64 else torch.float32)
            assert torch.equal(parameter.float(), exact[name])
        else:
            assert parameter.dtype == asked, name


def test_stored_keeps_every_dtype_but_those_of_poles(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    narrow = {key: state[key].bfloat16() for key in ("norm.scale", "blocks.0.filter.poles", "blocks.1.mlp.l1.weight")}
    change(folder, narrow)
    model = load_model(folder, dtype="stored")
    bfloat16 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert bfloat16 == {"norm.weight", "layers.1.mlp.gate_proj.weight"}


def test_some_tensors_can_be_read_alone(checkpoint: Path, case: str) -> None:
    found = read_tensors(find(checkpoint), lambda name: name.endswith(".poles"))
    expected = state_to_ours(load_file(GOLDEN / case / "model.safetensors"), golden_config(case))
    assert found.keys() == {name for name in expected if name.endswith(".poles")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_tied_models_accept_their_head_again(tmp_path: Path) -> None:
    state = load_file(GOLDEN / "evo-tiny" / "model.safetensors")
    torch.save(state | {"unembed.weight": state["embedding_layer.weight"]}, tmp_path / "pytorch-model.bin")
    assert load_model(tmp_path, GOLDEN / "evo-tiny" / "config.yml").lm_head is None
    other = state["embedding_layer.weight"].flip(0).contiguous()
    torch.save(state | {"unembed.weight": other}, tmp_path / "pytorch-model.bin")
    message = refusal(tmp_path, GOLDEN / "evo-tiny" / "config.yml")
    assert "unembed.weight differs from embedding_layer.weight: set tie_embeddings to false" in message


def test_the_model_does_not_depend_on_the_file_afterwards(folder: Path) -> None:
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (folder / "model.safetensors").open("r+b") as file:  # the same inode: a mapping would see it
        file.seek(4096)
        file.write(b"\xff" * (os.path.getsize(file.name) - 4096))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")
@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"weights": "int8"}])
def test_all_weights_begin_with_a_large_page(folder: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    """Those that were read, those that were cast and those that were made narrow; ``PAGE`` is that of a small model."""
    before = load_model(folder, **options).state_dict()
    monkeypatch.setattr(memory, "PAGE", mmap.PAGESIZE)
    model = load_model(folder, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    large = [name for name, tensor in before.items() if tensor.nbytes >= mmap.PAGESIZE and not name.endswith("scale")]
    assert len(large) > 3
    assert all(model.state_dict()[name].data_ptr() % mmap.PAGESIZE == 0 for name in large)


MEMORY_TEST = """
import sys, torch
from hyaena.checkpoints import load_model

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

load_model(sys.argv[1], sys.argv[2])  # a small one, so that lazy imports and buffers are paid for
before = peak()
load_model(sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_peak_memory_is_the_model_and_one_shard(tmp_path: Path, suffix: str) -> None:
    """Loading a state dict whole and copying it into a model would peak at twice the model."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=512,
        layer_types=("hyena",) * 8,
        intermediate_size=2048,
        num_attention_heads=4,
        num_key_value_heads=4,
        state_size=2,
        tie_embeddings=True,
    )
    from hyaena.checkpoints import save_model
    from hyaena.model import StripedHyena

    torch.manual_seed(0)
    save_model(StripedHyena(config), tmp_path, layout="original", max_shard_size=18_000_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) >= 8
    model_bytes, shard_bytes = 4 * ModelSizes(config).parameters, max(path.stat().st_size for path in shards)
    if suffix == "bin":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        index["weight_map"] = {key: file.replace("safetensors", "bin") for key, file in index["weight_map"].items()}
        for path in shards:
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        (tmp_path / "model.safetensors.index.json").unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    small = GOLDEN / "sh-tiny"
    command = [sys.executable, "-c", MEMORY_TEST, small / "model.safetensors", small / "config.yml", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    grown = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert 0.8 * model_bytes < grown < model_bytes + shard_bytes + 12_000_000  # allocator, tables, ends of large pages
    assert model_bytes > 5 * shard_bytes  # so that the bound says something


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.backbone."])
def test_prefixes_that_all_names_have_are_taken_off(folder: Path, prefix: str) -> None:
    expected = load_model(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    save_file({prefix + key: tensor for key, tensor in state.items()}, folder / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(folder).state_dict().items())


def test_a_prefix_that_some_names_lack_is_part_of_the_names(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    renamed = {f"module.{key}" if key.startswith("blocks.0.") else key: tensor for key, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors")
    message = refusal(folder)
    assert "missing: blocks.0." in message and "unexpected: module.blocks.0." in message


def test_names_of_wrapped_layers_are_known(folder: Path) -> None:
    expected = load_model(folder).state_dict()
    state = load_file(folder / "model.safetensors")
    for infix in ("_orig_mod.", "_checkpoint_wrapped_module."):
        renamed = {key.replace("blocks.1.", f"blocks.1.{infix}"): tensor for key, tensor in state.items()}
        save_file(renamed, folder / "model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(folder).state_dict().items())


def test_poles_that_are_stored_as_a_view_load_contiguous(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    poles = state["blocks.0.filter.poles"]
    strided = poles.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    assert not strided.is_contiguous()
    torch.save(state | {"blocks.0.filter.poles": strided}, folder / "pytorch-model.bin")
    model = load_model(folder)
    assert model.layers[0].mixer.long_filter.poles.is_contiguous()
    assert torch.equal(model.layers[0].mixer.long_filter.poles, poles.squeeze(2))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))


def test_every_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyaena.checkpoints import save_model, weights

    save_model(load_model(GOLDEN / "sh-tiny"), tmp_path, max_shard_size=200_000)
    opened: list[Path] = []
    open_shard = weights.open_shard
    monkeypatch.setattr(weights, "open_shard", lambda path: opened.append(path) or open_shard(path))
    load_model(find(tmp_path))
    assert len(opened) > 1 and sorted(opened) == sorted(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("half", "float16"), ("fp32", "float32")])
def test_short_names_of_dtypes(folder: Path, name: str, dtype: str) -> None:
    assert load_model(folder, dtype=name).dtype == getattr(torch, dtype)


def test_a_progress_bar_is_drawn_for_large_files_on_a_terminal_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(folder)
    monkeypatch.setattr(load, "_LARGE", 1)
    load_model(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    load_model(folder)
    assert "loading: " in capsys.readouterr().err


# --- what does not ---------------------------------------------------------------------------------------------------


def test_all_misfits_are_reported_by_name_at_once(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    change(
        folder,
        {
            "blocks.0.filter.D": None,
            "unembed.weight": None,
            "blocks.9.filter.D": torch.zeros(3),
            "surprise": torch.zeros(3),
            "blocks.0.projections.weight": torch.zeros(5, 64),
            "blocks.2.filter.poles": torch.zeros(64, 3, 1, 2),
            "norm.scale": torch.full((64,), float("nan")),
            "blocks.1.mlp.l1.weight": state["blocks.1.mlp.l1.weight"].index_fill(0, torch.tensor([3]), float("inf")),
            "blocks.1.mlp.l2.weight": state["blocks.1.mlp.l2.weight"].to(torch.int8),
            "blocks.1.mlp.l3.weight": state["blocks.1.mlp.l3.weight"].to(torch.float8_e4m3fn),
        },
    )
    message = refusal(folder)
    for words in (
        "blocks.0.projections.weight is [5, 64], expected [192, 64]",
        "blocks.2.filter.poles is [64, 3, 1, 2], expected [64, 2, 1, 2]",
        "quantized weights (save them as bfloat16 or float32): ",
        "blocks.1.mlp.l2.weight is int8",
        "blocks.1.mlp.l3.weight is float8_e4m3fn",
    ):
        assert words in message

    def names(what: str) -> set[str]:
        return set(message.split(f"{what}: ")[1].split(";")[0].split(", "))

    assert names("missing") == {"blocks.0.filter.D", "unembed.weight"}
    assert names("unexpected") == {"blocks.9.filter.D", "surprise"}
    assert names("not finite") == {"norm.scale", "blocks.1.mlp.l1.weight"}


def test_our_own_files_are_reported_in_our_names(folder: Path) -> None:
    config = golden_config("sh-tiny")
    state = state_to_ours(load_file(folder / "model.safetensors"), config)
    state["layers.0.mixer.in_proj.weight"] = torch.zeros(2, 2)
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items() if key != "norm.weight"},
        folder / "model.safetensors",
    )
    message = refusal(folder)
    assert "missing: norm.weight;" in message
    assert "layers.0.mixer.in_proj.weight is [2, 2], expected [192, 64]" in message


def test_a_finite_tensor_with_an_overflowing_sum_loads(folder: Path) -> None:
    change(folder, {"norm.scale": torch.full((64,), 3e38)})
    assert load_model(folder).norm.weight[0] == 3e38


def test_what_overflows_the_dtype_asked_for_is_told(folder: Path) -> None:
    change(folder, {"norm.scale": torch.full((64,), 1e6)})
    assert "not finite: norm.scale (as torch.float16: choose a wider dtype)" in refusal(folder, dtype="float16")


def test_tensors_in_two_shards_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({"norm.scale": state["norm.scale"]}, folder / "more.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model.safetensors") | {"norm.scale": "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "its index and its files disagree about norm.weight" in refusal(folder)


def test_weights_of_another_kind_of_model_are_refused(folder: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert "holds no tensor of a StripedHyena model" in refusal(folder)


class Opens:
    """A pickle that opens a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_wants_code_is_refused_and_not_run(folder: Path, new_format: bool) -> None:
    (folder / "model.safetensors").unlink()
    made = folder / "made-by-the-pickle"
    torch.save({"norm.scale": Opens(made)}, folder / "x.pt", _use_new_zipfile_serialization=new_format)
    message = refusal(folder)
    assert "wants to run code (" in message and "open" in message and "save it again as a state dict" in message
    assert not made.exists()


@pytest.mark.parametrize("kept", [0, 5, 1000, -1000])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch-model.bin"])
def test_truncated_files_are_told(folder: Path, name: str, kept: int) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch-model.bin")
    content = (folder / name).read_bytes()
    for weights in ("model.safetensors", "pytorch-model.bin"):
        (folder / weights).unlink()
    (folder / name).write_bytes(content[:kept])
    message = refusal(folder)
    assert message.startswith(str(folder / name)) and "truncated or corrupt: download or write it again" in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch-model.bin"])
@pytest.mark.parametrize("content", [b"<html>not found</html>", bytes(range(256)) * 40, b"\x80\x02}q\x00."])
def test_files_that_are_something_else_are_told(folder: Path, name: str, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    message = refusal(folder)
    assert str(folder) in message and ("truncated or corrupt" in message or "holds no tensor" in message)


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "git lfs pull" in refusal(folder)


def test_pickles_that_hold_something_else_are_told(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([1, 2], folder / "x.pt")
    assert "holds a list, not a state dict" in refusal(folder)
    torch.save({"norm.scale": torch.ones(3), "step": 3}, folder / "x.pt")
    assert "not tensors: step (int)" in refusal(folder)


def test_what_is_not_there_is_told(folder: Path) -> None:
    assert "no such file or folder" in refusal(folder / "nothing")
    assert "not a weights file" in refusal(folder / "config.yml")
    (folder / "model.safetensors").unlink()
    assert "no weights here: expected model.safetensors or pytorch-model.bin" in refusal(folder)
    for name in ("a.pt", "b.pt"):
        torch.save({}, folder / name)
    assert "several weights files and no index (a.pt, b.pt): name one of them" in refusal(folder)


def test_broken_indices_are_told(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert "shards are missing (model-1.safetensors, model-2.safetensors): download them" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "names shards outside its own folder" in refusal(folder)
    for text in ("{", "[]", '{"weight_map": []}', "{}"):
        index.write_text(text)
        assert "not an index of shards, or truncated" in refusal(folder)


def test_configuration_errors_stay_configuration_errors(folder: Path) -> None:
    (folder / "config.yml").write_text("vocab_size: 3\n")
    with pytest.raises(ConfigError, match=r"config\.yml: .*layer_types is missing"):
        find(folder)


@pytest.mark.parametrize("dtype", ["int8", "float8", torch.int64, "bf17"])
def test_dtypes_that_cannot_hold_a_model_are_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match=r"cannot hold a model: choose one of float64, float32, bfloat16, float16"):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["warp", "", "cpu:x", "meta"])
def test_devices_that_are_not_there_are_refused(folder: Path, device: str) -> None:
    message = f"device {device} (cannot be used|has no memory)" if device else "the device is empty: name one"
    with pytest.raises(InputError, match=message):
        load_model(folder, device=device)


def test_the_error_for_a_bad_checkpoint_is_a_checkpoint_error(folder: Path) -> None:
    change(folder, {"norm.scale": None})
    with pytest.raises(CheckpointError, match=r"missing: norm\.scale"):
        load_model(folder)
