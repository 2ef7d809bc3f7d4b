"""What is saved is what is loaded, bit for bit, and nothing that was there before is lost when a save fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hyaena.checkpoints import load_model, save, save_model
from hyaena.errors import CheckpointError
from hyaena.formats import read_config
from hyaena.model import StripedHyena

GOLDEN = Path(__file__).parents[1] / "golden"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_original_to_ours_to_original_is_bit_exact(case: str, tmp_path: Path, limit: int) -> None:
    start = load_model(GOLDEN / case / "model.safetensors", GOLDEN / case / "config.yml")
    save_model(start, tmp_path / "ours", max_shard_size=limit)
    ours = load_model(tmp_path / "ours")
    assert ours.config == start.config and equal(ours.state_dict(), start.state_dict())
    save_model(ours, tmp_path / "original", layout="original", max_shard_size=limit)
    golden, written = load_file(GOLDEN / case / "model.safetensors"), weights(tmp_path / "original")
    if start.config.tie_embeddings:  # the original does not open a checkpoint without its head
        golden["unembed.weight"] = golden["embedding_layer.weight"]
    assert equal(written, golden)
    assert read_config(tmp_path / "original" / "config.yml") == start.config
    again = load_model(tmp_path / "original")
    assert equal(again.state_dict(), start.state_dict())


def test_a_saved_folder_holds_exactly_one_configuration_and_one_file(model: StripedHyena, tmp_path: Path) -> None:
    save_model(model, tmp_path / "deep" / "down")
    assert files(tmp_path / "deep" / "down") == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "deep" / "down" / "config.json").read_text())["format"] == "hyaena"


def test_weights_are_as_readable_as_any_file(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    save_model(model, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_shards_stay_below_the_limit_and_the_index_names_them(model: StripedHyena, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=6_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and {path.name for path in shards} == set(index["weight_map"].values())
    for path in shards:
        state = load_file(path)
        assert sum(tensor.nbytes for tensor in state.values()) <= 6_000 or len(state) == 1
        assert all(index["weight_map"][key] == path.name for key in state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(tmp_path).values())
    assert equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_a_tied_matrix_is_saved_once_in_our_layout(tmp_path: Path) -> None:
    start = load_model(GOLDEN / "evo-tiny" / "model.safetensors", GOLDEN / "evo-tiny" / "config.yml")
    for layout, copies in (("hyaena", 1), ("original", 2)):  # the original does not open a checkpoint without its head
        save_model(start, tmp_path / layout, layout=layout)
        matrices = [key for key, tensor in weights(tmp_path / layout).items() if tensor.shape[0] == 512]
        assert len(matrices) == copies


@pytest.mark.parametrize("layout", ["hyaena", "original"])
def test_a_cast_leaves_poles_and_residues_alone(model: StripedHyena, tmp_path: Path, layout: Any) -> None:
    save_model(model, tmp_path, layout=layout, dtype=torch.bfloat16)
    for key, tensor in weights(tmp_path).items():
        exact = key.endswith((".poles", ".residues", ".inv_freq"))
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), key
    loaded, exact = load_model(tmp_path), dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if name.endswith((".poles", ".residues")):
            assert torch.equal(parameter, exact[name])


def test_weights_that_are_views_of_something_larger_are_saved_alone(model: StripedHyena, tmp_path: Path) -> None:
    large = torch.randn(10, *model.norm.weight.shape)
    model.norm.weight = torch.nn.Parameter(large[3])
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).norm.weight, large[3])


def test_extra_files_go_with_it_and_strangers_stay(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save_model(model, tmp_path, extra_files={"tokenizer.json": b"{}"})
    assert files(tmp_path) == {"config.json", "model.safetensors", "tokenizer.json", "notes.txt"}


def altered(model: StripedHyena) -> StripedHyena:
    with torch.no_grad():
        model.norm.weight.add_(1)
    return model


@pytest.mark.parametrize("first", [{}, {"max_shard_size": 6_000}, {"layout": "original"}])
@pytest.mark.parametrize("second", [{}, {"max_shard_size": 6_000}, {"max_shard_size": 9_000, "layout": "original"}])
def test_a_save_replaces_the_previous_one_entirely(
    model: StripedHyena, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    save_model(model, tmp_path, **first)
    save_model(altered(model), tmp_path, **second)
    assert equal(load_model(tmp_path).state_dict(), model.state_dict())
    save_model(model, tmp_path.with_name("fresh"), **second)
    shards = [len(list(folder.glob("*.safetensors"))) for folder in (tmp_path, tmp_path.with_name("fresh"))]
    assert shards[0] == shards[1] and len(files(tmp_path)) == len(files(tmp_path.with_name("fresh")))


@pytest.mark.parametrize("first", [{}, {"max_shard_size": 6_000}])
@pytest.mark.parametrize("second", [{}, {"max_shard_size": 6_000}])
def test_at_every_interruption_one_whole_checkpoint_is_there(
    model: StripedHyena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], second: dict[str, Any]
) -> None:
    """The machine stops before the n-th change to the folder, for every n: old weights or new ones, never a mixture."""

    class Stopped(BaseException):
        pass

    replace, unlink, before = os.replace, Path.unlink, {k: v.clone() for k, v in model.state_dict().items()}
    after = {k: v.clone() for k, v in altered(model).state_dict().items()}
    seen = set()
    for stop in range(100):
        folder = tmp_path / str(stop)
        model.load_state_dict(before)
        save_model(model, folder, **first)
        model.load_state_dict(after)
        left = [stop]

        def counted(function: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not left[0]:
                    raise Stopped
                left[0] -= 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(replace))
            patch.setattr(Path, "unlink", counted(unlink))
            try:
                save_model(model, folder, **second)
                finished = True
            except Stopped:
                finished = False
        loaded = load_model(folder).state_dict()
        seen.add("new" if equal(loaded, after) else "old")
        assert equal(loaded, after) or equal(loaded, before)
        if finished:
            assert equal(loaded, after)
            break
    assert finished and seen == {"old", "new"}


@pytest.mark.parametrize("function", ["save_file", "_write_bytes"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    model: StripedHyena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save_model(model, tmp_path)
    before, listed = {k: v.clone() for k, v in model.state_dict().items()}, files(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save, function, full)
    with pytest.raises(CheckpointError, match=r"could not save \(No space left on device\); nothing there is lost"):
        save_model(altered(model), tmp_path)
    assert files(tmp_path) == listed and equal(load_model(tmp_path).state_dict(), before)
    with pytest.raises(CheckpointError, match="could not save"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


LIMITED = """
import resource, sys, torch
from hyaena.checkpoints import load_model, save_model
from hyaena.errors import CheckpointError
model = load_model(sys.argv[1])
with torch.no_grad():
    model.norm.weight.add_(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_model(model, sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_write_that_really_fails_leaves_the_previous_checkpoint(model: StripedHyena, tmp_path: Path) -> None:
    """The kernel refuses every byte of a file beyond 10,000, as it would on a full disk."""
    save_model(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 10_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    assert "could not save" in result.stdout and "nothing there is lost" in result.stdout
    assert files(tmp_path) == {"config.json", "model.safetensors"}
    assert equal(load_model(tmp_path).state_dict(), model.state_dict())


def test_leftovers_of_a_killed_save_are_removed_by_the_next(model: StripedHyena, tmp_path: Path) -> None:
    (tmp_path / ".unfinished-abc").mkdir()
    (tmp_path / ".unfinished-abc" / "model.safetensors").write_bytes(b"half")
    save_model(model, tmp_path)
    assert files(tmp_path) == {"config.json", "model.safetensors"}


def test_what_cannot_be_saved_is_told(model: StripedHyena, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layout 'other' is unknown: choose one of hyaena, original"):
        save_model(model, tmp_path / "a", layout="other")  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = StripedHyena(model.config)
    with pytest.raises(CheckpointError, match="on the meta device and has no weights to save"):
        save_model(empty, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not save"):
        save_model(model, tmp_path / "file")
    assert files(tmp_path) == {"file"}
