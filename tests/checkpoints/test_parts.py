"""Files in parts are read as one, without a copy; models that are published without a configuration are recognised."""

from __future__ import annotations

import io
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyaena.checkpoints import find, has_weights, inspect, load_model, save_model
from hyaena.checkpoints.known import recognise
from hyaena.checkpoints.parts import JoinedFile, grouped, parts_of
from hyaena.cli import main
from hyaena.config import ModelConfig, preset_names
from hyaena.errors import CheckpointError, ConfigError, HyaenaError
from hyaena.formats import read_config
from hyaena.formats.tensors import state_to_theirs
from hyaena.model import StripedHyena

GOLDEN = Path(__file__).parents[1] / "golden" / "evo2-tiny"


def cut(file: Path, sizes: list[int]) -> list[Path]:
    """Cut a file into parts of these sizes and the rest; the file itself is removed."""
    content, parts = file.read_bytes(), []
    file.unlink()
    for number, size in enumerate([*sizes, len(content)]):
        parts.append(file.with_name(f"{file.name}.part{number}"))
        parts[-1].write_bytes(content[:size])
        content = content[size:]
    return parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden case as a ``.pt`` file in three parts beside its configuration."""
    shutil.copy(GOLDEN / "config.yml", tmp_path)
    torch.save(load_file(GOLDEN / "model.safetensors"), tmp_path / "evo2_tiny.pt")
    cut(tmp_path / "evo2_tiny.pt", [1, 500_000])
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(HyaenaError) as error:
        load_model(path)
    message = str(error.value)
    assert message.isprintable()
    return message


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_read_as_the_file_that_they_are_of(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(1000)
    (tmp_path / "a").write_bytes(content)
    parts = cut(tmp_path / "a", [0, 1, 99, 300, 0])
    with io.BufferedReader(JoinedFile([path.open("rb") for path in parts]), buffer_size=16) as file:
        assert file.seek(0, io.SEEK_END) == 1000
        draw = random.Random(1)
        for _ in range(200):
            start, count = draw.randrange(1100), draw.randrange(300)
            file.seek(start)
            assert file.read(count) == content[start : start + count]
            assert file.tell() == start + len(content[start : start + count])
        file.seek(-5, io.SEEK_END)
        assert file.read() == content[-5:]
        with pytest.raises(ValueError, match="before the beginning"):
            file.seek(-1)


def test_parts_are_ordered_by_number(tmp_path: Path) -> None:
    names = [f"x.pt.part{i}" for i in (10, 2, 0, 1, 9, 8, 7, 6, 5, 4, 3)] + ["y.pt.part0", "x.pt.part", "x.pt"]
    found = parts_of(tmp_path / "x.pt.part0", names)
    assert [path.name for path in found] == [f"x.pt.part{i}" for i in range(11)]
    assert grouped([*found, tmp_path / "z.bin"]) == [list(found), [tmp_path / "z.bin"]]
    assert parts_of(tmp_path / "z.pt", names) == ()


@pytest.mark.parametrize("named", [".", "evo2_tiny.pt.part0", "evo2_tiny.pt.part2"])
def test_a_folder_or_any_part_names_the_whole(folder: Path, named: str) -> None:
    checkpoint = find(folder / named)
    assert [path.name for path in checkpoint.shards] == [f"evo2_tiny.pt.part{i}" for i in range(3)]
    assert has_weights(folder) and inspect(checkpoint).in_original_names
    model = load_model(checkpoint)
    expected = load_file(GOLDEN / "expected.safetensors")
    with torch.inference_mode():
        logits = model(expected["input_ids"])
    assert (logits - expected["logits"]).abs().max() <= 1e-5 * expected["logits"].abs().max()
    assert {path.name for path in folder.iterdir()} == {"config.yml", *(f"evo2_tiny.pt.part{i}" for i in range(3))}


def test_the_whole_file_is_taken_where_it_lies_beside_its_parts(folder: Path) -> None:
    torch.save(load_file(GOLDEN / "model.safetensors"), folder / "evo2_tiny.pt")
    assert [path.name for path in find(folder).shards] == ["evo2_tiny.pt"]
    assert [path.name for path in find(folder / "evo2_tiny.pt.part1").shards] == ["evo2_tiny.pt"]


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "evo2_tiny.pt.part1").unlink()
    words = "part 1 of it is missing (evo2_tiny.pt.part1): download it"
    assert refusal(folder) == f"{folder}/evo2_tiny.pt: {words}"
    assert words in refusal(folder / "evo2_tiny.pt.part2")


def test_a_missing_first_part_is_named(folder: Path) -> None:
    (folder / "evo2_tiny.pt.part0").unlink()
    assert "part 0 of it is missing" in refusal(folder)


@pytest.mark.parametrize("damage", ["last missing", "last cut short", "middle cut short", "empty", "swapped"])
def test_parts_that_make_no_file_are_refused(folder: Path, damage: str) -> None:
    first, middle, last = (folder / f"evo2_tiny.pt.part{i}" for i in range(3))
    if damage == "last missing":
        last.unlink()
    elif damage == "last cut short":
        last.write_bytes(last.read_bytes()[:-100])
    elif damage == "middle cut short":
        middle.write_bytes(middle.read_bytes()[:-100])
    elif damage == "empty":
        first.write_bytes(b"")
    else:
        content = middle.read_bytes()
        middle.write_bytes(last.read_bytes())
        last.write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder}/evo2_tiny.pt: ") and "download them again" in message


def test_parts_become_safetensors(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    out = save_model(model, tmp_path / "out")
    again = load_model(out)
    assert again.config == model.config
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- models without a configuration ----------------------------------------------------------------------------------


def write_meta(config: ModelConfig, path: Path) -> None:
    """A file with all names and shapes of a model's checkpoint: of each tensor one number, repeated."""
    with torch.device("meta"):
        state = state_to_theirs(StripedHyena(config).state_dict(), config)
    torch.save({key: torch.zeros(1).expand(tensor.shape) for key, tensor in state.items()}, path)


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("evo2-")])
def test_a_published_file_is_recognised(name: str, tmp_path: Path) -> None:
    config = ModelConfig.from_name(name)
    file = tmp_path / f"{name.replace('-', '_')}.pt"
    write_meta(config, file)
    assert recognise([file]) == config
    assert recognise(cut(file, [100, 2000])) == config
    assert find(tmp_path).config == config


def test_a_file_that_fits_several_models_is_refused_with_their_names(tmp_path: Path) -> None:
    write_meta(ModelConfig.from_name("evo2-7b-base"), tmp_path / "mine.pt")
    message = refusal(tmp_path)
    for name in ("evo2-7b-262k", "evo2-7b-base", "evo2-7b-microviridae"):
        assert name in message
    assert "evo2-7b " not in message and "config=" in message
    assert find(tmp_path, config="evo2-7b-262k").config == ModelConfig.from_name("evo2-7b-262k")


def test_a_file_that_fits_no_model_is_refused(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "model.safetensors", tmp_path)
    message = refusal(tmp_path)
    assert "no config.json and no config.yml beside the weights, and model.safetensors fits no published" in message
    assert "(vocabulary and width [512, 64], 6 layers, MLP 96): name one with config=" in message
    assert find(tmp_path, config=GOLDEN / "config.yml").config.num_layers == 6


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 5000}, {"se_filter_groups": 64}, {"state_size": 8}, {"vocab_size": 256}]
)
def test_one_other_size_is_another_model(changes: dict[str, int], tmp_path: Path) -> None:
    write_meta(replace(ModelConfig.from_name("evo2-1b-base"), **changes), tmp_path / "evo2_1b_base.pt")
    assert "fits no published Evo 2 model" in refusal(tmp_path)


def test_a_configuration_of_another_member_of_the_family_is_refused(tmp_path: Path) -> None:
    """Nothing is read: names and shapes do not fit."""
    file = tmp_path / "evo2_1b_base.pt"
    write_meta(ModelConfig.from_name("evo2-1b-base"), file)
    for config in ("evo2-7b", "evo-1-8k"):
        with pytest.raises(CheckpointError, match="do the configuration and the weights belong together"):
            load_model(find(file, config=config))
    with pytest.raises(ConfigError, match="contradict"):
        values = (GOLDEN / "config.yml").read_text() + "hyena_layer_idxs: [0]\n"
        (tmp_path / "config.yml").write_text(values)
        read_config(tmp_path / "config.yml")


@pytest.mark.parametrize("layout", ["hyaena", "original", "transformers"])
def test_a_failed_conversion_writes_nothing(
    folder: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "evo2_tiny.pt.part1").unlink()
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--layout", layout]) == 2
    assert not out.exists()
    message = capsys.readouterr().err
    assert "part 1 of it is missing" in message and message.count("\n") == 1


def test_a_conversion_reads_parts_and_gives_the_file_back(folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--layout", "original"]) == 0
    back, first = torch.load(tmp_path / "theirs" / "model.pt"), load_file(GOLDEN / "model.safetensors")
    kept = {key for key in first if not key.endswith(("filter.t", "_extra_state"))}
    assert back.keys() == kept and all(torch.equal(back[key], first[key]) for key in kept)
    assert read_config(tmp_path / "theirs" / "config.yml") == read_config(GOLDEN / "config.yml")
