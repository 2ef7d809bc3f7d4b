"""Which files make up a checkpoint, and everything that makes that a question is refused with the names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyaena.checkpoints import find, is_run, load_model, save_model
from hyaena.errors import CheckpointError, ConfigError, HyaenaError
from hyaena.model import StripedHyena

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A golden case that a test may damage."""
    (tmp_path / "m").mkdir()
    for name in ("config.yml", "model.safetensors"):
        shutil.copy(GOLDEN / "sh-tiny" / name, tmp_path / "m" / name)
    return tmp_path / "m"


def refusal(path: Path | str) -> str:
    with pytest.raises(HyaenaError) as error:
        load_model(path)
    assert str(error.value).isprintable() and len(str(error.value)) <= 1920
    return str(error.value)


def half(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


SECOND: dict[str, Callable[[Path], object]] = {
    "pytorch-model.bin": lambda folder: torch.save(half(folder), folder / "pytorch-model.bin"),
    "pytorch_model.bin.index.json": lambda folder: (folder / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "a.bin"}}'
    ),
    "other.safetensors": lambda folder: shutil.copy(folder / "model.safetensors", folder / "other.safetensors"),
    "step-500.pt": lambda folder: torch.save({"state_dict": half(folder)}, folder / "step-500.pt"),
    "adapter_model.safetensors": lambda folder: save_file(
        {"lora_A": torch.zeros(1)}, folder / "adapter_model.safetensors"
    ),
}


@pytest.mark.parametrize("name", SECOND)
def test_two_sets_of_weights_are_refused_with_both_names(folder: Path, name: str) -> None:
    SECOND[name](folder)
    message = refusal(folder)
    assert "model.safetensors" in message and name in message
    load_model(folder / "model.safetensors")  # naming one is the cure


def test_files_of_other_kinds_are_no_second_set(folder: Path) -> None:
    save_file({"logits": torch.zeros(2)}, folder / "expected.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}, folder / "optimizer.pt")
    (folder / "model-fp32-00001-of-00002.safetensors").write_bytes(b"mine")
    load_model(folder)


def test_an_adapter_alone_and_parts_without_an_index_are_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter without its model" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "parts of a sharded checkpoint without their index" in refusal(tmp_path)


def test_two_configurations_must_say_the_same(folder: Path) -> None:
    save_model(load_model(folder), folder.parent / "ours")
    shutil.copy(folder.parent / "ours" / "config.json", folder)
    load_model(folder)
    values = json.loads((folder / "config.json").read_text()) | {"rope_theta": 77.0}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"several configurations \(config\.json, config\.yml\), which differ"):
        load_model(folder)


def test_a_training_run_says_which_of_its_folders_is_the_model(model: StripedHyena, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"model": {}, "optimizer": {}, "rng": 0, "step": 1}, run / "last.pt")
    assert not is_run(run)
    (run / "metrics.jsonl").write_text("")
    (run / "config.yml").write_text("steps: 3")
    assert is_run(run) and is_run(run / "last.pt") and not is_run(run / "best")
    for path in (run, run / "last.pt"):
        assert f"a training run, not a model: write its newest model with `hyaena convert {run} OUT`" in refusal(path)
    save_model(model, run / "best")
    assert f"load {run}/best, or write its newest" in refusal(run)
    shutil.copy(run / "last.pt", tmp_path / "moved.pt")
    shutil.copy(run / "best" / "config.json", tmp_path)
    assert "is the state of a training run: load the run's folder best or final" in refusal(tmp_path / "moved.pt")


KINDS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(
    folder: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    monkeypatch.chdir(folder)  # the name of a socket must be short
    KINDS[kind](Path(name))
    message = refusal(folder)
    assert "not a regular file" in message or "cannot be read" in message


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "a\udcffb", "a\x1b[31m"])
def test_paths_that_cannot_be_are_one_line(path: str) -> None:
    refusal(path)


@pytest.mark.parametrize("name", ["model.safetensors", ""])
def test_a_folder_that_may_be_listed_and_not_entered_is_one_line(folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory() as outside:  # the parents of pytest's own folders are closed to other users
        os.chmod(outside, 0o755)
        shutil.copytree(folder, closed := Path(outside) / "closed")
        os.chmod(closed, 0o444)
        user = os.geteuid()
        try:
            if user == 0:  # whose rights nothing limits
                os.seteuid(65534)
            assert refusal(closed / name) == f"{closed / name}: cannot be read: Permission denied"
        finally:
            os.seteuid(user)
            os.chmod(closed, 0o755)


def test_an_index_names_what_the_files_hold(folder: Path) -> None:
    model = load_model(folder)
    save_model(model, folder.parent / "s", max_shard_size=200_000)
    path = folder.parent / "s" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    for changed in (
        {key: file for key, file in index["weight_map"].items() if key != "norm.weight"},
        index["weight_map"] | {"zz": first},
        index["weight_map"] | {"norm.weight": first if index["weight_map"]["norm.weight"] == last else last},
    ):
        path.write_text(json.dumps({"weight_map": changed}))
        assert "its index and its files disagree about " in refusal(folder.parent / "s")
    path.write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')
    assert "not an index of shards" in refusal(folder.parent / "s")
    path.write_text("[" * 100_000)
    assert "not an index of shards" in refusal(folder.parent / "s")
    path.write_text(json.dumps({"weight_map": {f"k{i}": f"{i}\x1b.safetensors" for i in range(5_000)}}))
    message = refusal(folder.parent / "s")
    assert "shards are missing" in message and "and 4,994 more" in message


def test_the_originals_name_of_an_index_of_bin_files(folder: Path) -> None:
    state = half(folder)
    keys = list(state)
    parts = {"pytorch-model-1.bin": keys[::2], "pytorch-model-2.bin": keys[1::2]}
    for file, names in parts.items():
        torch.save({name: state[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "pytorch-model.bin.index.json").write_text("\ufeff" + json.dumps({"weight_map": weight_map}))
    expected = load_model(folder / "model.safetensors").state_dict()
    (folder / "model.safetensors").unlink()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(folder).state_dict().items())


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_a_mixture(model: StripedHyena, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    checkpoint = find(tmp_path)
    save_model(model, tmp_path, max_shard_size=6_000)
    with pytest.raises(CheckpointError, match="was replaced while it was being read: load it again"):
        load_model(checkpoint)
    load_model(tmp_path)
