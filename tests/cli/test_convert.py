"""``hyaena convert``: both layouts, bit for bit, and nothing overwritten unasked."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hyaena.checkpoints import load_model
from hyaena.cli import main
from hyaena.cli.formatting import binary_bytes, decimal_bytes, parse_size, short_count
from hyaena.errors import InputError
from hyaena.train.filters import parametrize_filters
from hyaena.train.storage import save_checkpoint

COMMANDS = {"convert": "hyaena.cli.convert"}


def convert(*args: object) -> int:
    return main(["convert", *map(str, args)], commands=COMMANDS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.pt").exists():
        return torch.load(folder / "model.pt", weights_only=True)
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_there_and_back_is_bit_exact(golden_case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(golden_case, tmp_path / "ours") == 0
    assert convert(tmp_path / "ours", tmp_path / "theirs", "--layout", "original", "--max-shard-size", "200kB") == 0
    out = capsys.readouterr().out.splitlines()
    assert "in the hyaena layout" in out[0] and out[0].endswith("in 1 file")
    evo2 = "evo2-tiny" in golden_case.parts
    assert "in the original layout" in out[1] and out[1].endswith("in 1 file" if evo2 else "files")
    original = load_file(golden_case / "model.safetensors")
    if load_model(golden_case).config.tie_embeddings:  # the original's head is a module of its own
        original["unembed.weight"] = original["embedding_layer.weight"]
    stray = ("filter.t", "_extra_state")  # what Evo 2's files hold and nobody reads
    assert same(weights(tmp_path / "theirs"), {k: t for k, t in original.items() if not k.endswith(stray)})
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) is not evo2
    assert same(load_model(tmp_path / "theirs").state_dict(), load_model(golden_case).state_dict())


def test_stored_dtypes_survive_where_none_is_asked_for(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "sh-tiny" / "model.safetensors")
    exact = (".poles", ".residues", ".inv_freq", "filter.D", "norm.scale")
    state = {key: tensor if key.endswith(exact) else tensor.bfloat16() for key, tensor in state.items()}
    torch.save(state, tmp_path / "pytorch-model.bin")
    shutil.copy(golden / "sh-tiny" / "config.yml", tmp_path)
    assert convert(tmp_path, tmp_path / "out", "--layout", "original") == 0
    assert same(weights(tmp_path / "out"), state)


def test_a_dtype_casts_all_but_poles_and_residues(golden: Path, tmp_path: Path) -> None:
    assert convert(golden / "sh-tiny", tmp_path / "out", "--dtype", "bfloat16") == 0
    narrow = {key for key, tensor in weights(tmp_path / "out").items() if tensor.dtype == torch.bfloat16}
    assert narrow == {key for key in weights(tmp_path / "out") if not key.endswith((".poles", ".residues"))}


def test_tokenizer_files_go_along(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "sh-tiny", tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (tmp_path / "in" / name).write_text(name)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_folder_with_files_is_left_alone_unless_forced(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    assert convert(golden / "sh-tiny", tmp_path) == 2
    assert "is not empty: name another folder, or add --force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "precious"
    assert convert(golden / "sh-tiny", tmp_path, "--force") == 0
    assert load_model(tmp_path).config.num_layers == 4


def test_a_model_can_be_converted_in_place(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "evo-tiny", tmp_path / "m")
    (tmp_path / "m" / "expected.safetensors").unlink()
    assert convert(tmp_path / "m", tmp_path / "m", "--force") == 0
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
    assert same(dict(load_model(tmp_path / "m").state_dict()), dict(load_model(golden / "evo-tiny").state_dict()))


def test_what_a_killed_save_left_is_not_in_the_way(golden: Path, tmp_path: Path) -> None:
    (tmp_path / ".unfinished-12345678").mkdir()
    (tmp_path / ".unfinished-12345678" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".hyaena.lock").write_text("")
    assert convert(golden / "sh-tiny", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing_behind(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from hyaena.checkpoints import save

    def interrupted(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), number)

    monkeypatch.setattr(save, "write_tensors", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    if number == signal.SIGINT:
        assert convert(golden / "sh-tiny", tmp_path / "deep" / "out") == 130
    else:
        with pytest.raises(SystemExit) as exit:
            convert(golden / "sh-tiny", tmp_path / "deep" / "out")
        assert exit.value.code == 143
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == before


def test_the_newest_model_of_a_killed_run_is_written(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, start = tmp_path / "run", load_model(golden / "evo-tiny")
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    trained = load_model(golden / "evo-tiny")
    parametrize_filters(trained)
    state = {"optimizer": {}, "rng": torch.get_rng_state(), "step": 1_700, "model": trained.state_dict()}
    state |= {"model_config": json.dumps(start.config.to_dict()), "tokenizer": {"tokenizer.json": "{}"}}
    state |= {"config": '{"steps": 2000}', "data": 0, "elapsed": 1.0}
    save_checkpoint(run, state | dict.fromkeys(("best", "latest", "initial", "scored")))
    for source, options in ((run, []), (run / "last.pt", ["--layout", "original", "--dtype", "bfloat16"])):
        out = tmp_path / f"out-{source.name}"
        assert convert(source, out, *options) == 0
        assert "the model of step 1,700" in capsys.readouterr().err
        assert (out / "tokenizer.json").read_text() == "{}"
        loaded = load_model(out)
        assert loaded.dtype == (torch.bfloat16 if options else torch.float32)
        for name, tensor in start.named_parameters():
            # Trainable poles are rounded once to decay and phase and back.
            torch.testing.assert_close(
                loaded.get_parameter(name), tensor.to(loaded.get_parameter(name)), atol=1e-6, rtol=0
            )
    assert convert(run, tmp_path / "x", "--config", golden / "evo-tiny" / "config.yml") == 2
    assert "is a training run, which has its own configuration" in capsys.readouterr().err
    assert convert(tmp_path / "nothing" / "last.pt", tmp_path / "x") == 2 and not (tmp_path / "x").exists()


def test_the_tokenizer_of_the_previous_model_does_not_stay(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "sh-tiny", tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert convert(golden / "evo-tiny", tmp_path / "out", "--force") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing", "out"], "nothing: no such model"),
        (["{golden}/sh-tiny", "{tmp}/file"], "is a file: name a folder to write"),
        (["{golden}/sh-tiny", "{tmp}/out", "--max-shard-size", "big"], "size 'big' is not understood"),
        (["{golden}/sh-tiny", "{tmp}/out", "--config", "{tmp}/none.yml"], "none.yml: no such file"),
        (["{golden}/sh-tiny", "{tmp}/out", "--config", "{golden}/evo-tiny/config.yml"], "missing: "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    args: list[str], words: str, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert convert(*(arg.format(golden=golden, tmp=tmp_path) for arg in args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("hyaena: error: ") and err.count("\n") == 1 and words in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_needs_no_weights_is_found_before_they_are_read(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hyaena import adapters, checkpoints, extras
    from hyaena.cli import convert as command
    from hyaena.cli import quantize

    small, narrow = golden / "sh-tiny", tmp_path / "int8"
    checkpoints.quantize_checkpoint(checkpoints.find(small), narrow, "int8")
    for name in ("evo-tiny", "sh-tiny"):
        adapted = load_model(golden / name)
        adapters.add_adapter(adapted, rank=1)
        adapters.save_adapter(adapted, tmp_path / f"{name}-lora")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    shutil.copy(small / "config.yml", tmp_path / "broken")
    shutil.copy(small / "model.safetensors", tmp_path / "broken")
    (tmp_path / "x.gguf").write_text("")
    for read in ("load_model", "quantize_checkpoint"):
        monkeypatch.setattr(checkpoints, read, lambda *_, **__: pytest.fail("read the weights"))
    before = sorted(tmp_path.rglob("*"))

    def fails(words: str, *args: object, run: str = "convert") -> None:
        modules = {"convert": command.__name__, "quantize": quantize.__name__}
        assert main([run, *map(str, args)], commands=modules) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err
        assert sorted(tmp_path.rglob("*")) == before

    out = tmp_path / "out"
    fails("GGUF has no blocks of int8 weights: quantize the model to q8_0 or q4_0", narrow, out, "--layout", "gguf")
    fails("our layout (--layout hyaena", narrow, out, "--layout", "original")
    fails("transformers reads no int8 weights", narrow, out, "--layout", "transformers")
    fails("into which no adapter is merged", narrow, out, "--adapter", tmp_path / "sh-tiny-lora")
    fails("changes layers that this model does not have", small, out, "--adapter", tmp_path / "evo-tiny-lora")
    fails("tokenizer.json", tmp_path / "broken", out, "--layout", "transformers")
    fails("other weights lie there", narrow, tmp_path / "sh-tiny-lora", "--force")
    options = ["--weights", "q8_0", "--output"]
    fails("other weights lie there", small, *options, tmp_path / "sh-tiny-lora", "--force", run="quantize")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda _: None)
    fails("needs gguf: pip install 'hyaena[gguf]'", small, out, "--layout", "gguf")
    fails("needs gguf: pip install 'hyaena[gguf]'", tmp_path / "x.gguf", out)
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    fails("cannot be written (Permission denied): change its permissions", small, out)
    fails("cannot be written (Permission denied): change its permissions", small, *options, out, run="quantize")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 mb", 1_500_000), ("700", 700), ("3k", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1TB", "0", "five"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="write one such as 5GB"):
        parse_size(text)


def test_sizes_as_people_read_them() -> None:
    assert decimal_bytes(15_290_000_000) == "15.29 GB" and decimal_bytes(12) == "12 bytes"
    assert binary_bytes(65_536) == "64.00 KiB" and short_count(7_646_023_680) == "7.65 B" and short_count(9) == "9"
