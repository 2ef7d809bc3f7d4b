"""``hyaena quantize``: what is read, what is written, and where it ends in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import TINY
from hyaena import checkpoints
from hyaena.cli import main
from hyaena.model import StripedHyena
from hyaena.train import documents


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    config = replace(TINY, hidden_size=64, intermediate_size=96, tokenizer="bytes", vocab_size=264)
    return checkpoints.save_model(StripedHyena(config), folder / "wide")


def test_calibration_reads_the_beginning_of_a_text_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["quantize", str(saved(tmp_path)), "--weights", "int4", "--calibrate", f"{tmp_path}/text.txt"]
    monkeypatch.setattr("hyaena.train.documents.BLOCK", 1 << 10)
    monkeypatch.setattr("hyaena.cli.quantize.CALIBRATION_TOKENS", 1 << 12)
    monkeypatch.setattr("hyaena.cli.quantize.CALIBRATION_CHARACTERS", 1 << 16)
    found = []
    for size in (1 << 17, 1 << 18):  # both longer than what is looked at
        (tmp_path / "text.txt").write_text("some text to read " * (size // 18))
        reads, read = [], documents._read_text

        def counted(*args: object, reads: list = reads, read: Callable = read) -> Iterator[object]:
            for piece in read(*args):
                reads.append(piece)
                yield piece

        with monkeypatch.context() as patch:
            patch.setattr(documents, "_read_text", counted)
            assert main([*arguments, "--output", f"{tmp_path}/{size}"]) == 0
        found.append(checkpoints.load_model(tmp_path / str(size)).state_dict())
        assert sum(len(piece.text) for piece in reads) == 1 << 16
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_numbers_that_are_not_finite_weigh_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.load_model(saved(tmp_path))
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1e30)  # type: ignore[union-attr]
    checkpoints.save_model(model, tmp_path / "large")
    (tmp_path / "text.txt").write_text("some text to read " * 20)
    arguments = ["quantize", f"{tmp_path}/large", "--weights", "int8", "--output", f"{tmp_path}/o"]
    assert main([*arguments, "--calibrate", f"{tmp_path}/text.txt"]) == 2
    assert "layers.0.mlp.down_proj reads numbers in the calibration text that are not" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert main(arguments) == 0


def test_what_concerns_the_calibration_text_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the weights are read."""
    arguments = ["quantize", str(saved(tmp_path)), "--weights", "int4", "--output", f"{tmp_path}/o"]
    (tmp_path / "text.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "text.txt").write_text("some text to read ")
    (tmp_path / "file").touch()
    (tmp_path / "latin.txt").write_bytes(b"a\xff")
    (tmp_path / "empty").mkdir()
    calibrated = ["--calibrate", f"{tmp_path}/text.txt"]
    assert main(["quantize", arguments[1], "--weights", "int8", "--output", f"{tmp_path}/narrow"]) == 0
    monkeypatch.setattr("hyaena.hub.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    for options, message in (
        (["--device", "cpu"], "--device is where --calibrate reads its text"),
        (["--calibrate", ""], "--calibrate is empty: name a path"),
        (["--calibrate", f"{tmp_path}/no"], "no: no such file or folder; check its name\n"),
        (["--calibrate", f"{tmp_path}/text.jsonl"], "text.jsonl, line 1: an unpaired surrogate"),
        (["--calibrate", f"{tmp_path}/latin.txt"], "latin.txt is not UTF-8 text; convert it, or leave it out\n"),
        (["--calibrate", f"{tmp_path}/empty"], "/empty holds no file: name another\n"),
        ([*calibrated, "--device", ""], "--device is empty"),
        ([*calibrated, "--weights", "int4-128"], "which do not divide by the groups of 128 of int4-128"),
        ([*calibrated, "--output", f"{tmp_path}/file/o"], "/file/o: cannot be written (Not a directory)"),
    ):
        assert main([*arguments, *options]) == 2
        assert message in capsys.readouterr().err
    again = ["quantize", f"{tmp_path}/narrow", "--weights", "int8", *calibrated, "--output", f"{tmp_path}/o"]
    assert main(again) == 2
    assert "has int8 weights already: there is nothing to do" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_model_itself_can_be_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = checkpoints.load_model(saved(tmp_path))
    checkpoints.save_model(wide, tmp_path / "m", max_shard_size=20_000)
    shards = checkpoints.find(tmp_path / "m").shards
    size = sum(path.stat().st_size for path in shards)
    assert len(shards) > 1
    assert main(["quantize", f"{tmp_path}/m", "--weights", "int8", "--output", f"{tmp_path}/m", "--force"]) == 0
    assert f" of {size / 1000:.2f} kB" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
