"""``generate.py``: the original's command line, its YAML and its checkpoint layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import generate
import pytest
import yaml
from safetensors.torch import load_file

import hyaena
from hyaena.formats import read_config
from hyaena.tokenizers import CharacterTokenizer


@pytest.fixture
def original(golden: Path, tmp_path: Path) -> Path:
    """A checkpoint of the original with characters for a tokenizer, and a prompt."""
    for name in ("config.yml", "model.safetensors"):
        shutil.copy(golden / "evo-tiny" / name, tmp_path)
    (tmp_path / "prompt.txt").write_text("ACGTTGCA")
    return tmp_path


def restyle(folder: Path, style: str) -> None:
    values = yaml.safe_load((folder / "config.yml").read_text())
    (folder / "config.yml").write_text(yaml.safe_dump(values | {"prefill_style": style}))


def flags(folder: Path) -> list[str]:
    return [
        *("--config_path", str(folder / "config.yml"), "--checkpoint_path", str(folder / "model.safetensors")),
        *("--cached_generation", "--prompt_file", str(folder / "prompt.txt"), "--num_tokens", "6"),
    ]


def expected(folder: Path) -> str:
    model = hyaena.StripedHyena(read_config(folder / "config.yml"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    tokenizer = CharacterTokenizer(model.config.vocab_size)
    return hyaena.generate(model, tokenizer, "ACGTTGCA", max_new_tokens=6).text


def test_the_originals_command_runs(original: Path) -> None:
    script = Path(generate.__file__)
    done = subprocess.run([sys.executable, str(script), *flags(original)], capture_output=True, check=True)
    assert done.stdout.decode() == expected(original) + "\n"
    assert b"time to first token" in done.stderr


@pytest.mark.parametrize(
    ("style", "method"),
    [
        ("fft", "fft"),
        ("recurrence", "recurrence"),
        ("modal-fft", "fft"),
        ("hybrid-modal-recurrence", "blocked"),
        ("modal-scan", "scan"),
        ("canonical-fft", "canonical-fft"),
        ("iir-fir-caching", "truncated"),
    ],
)
def test_the_prefill_style_of_the_yaml_is_honoured(
    original: Path, style: str, method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    restyle(original, style)
    asked = []
    forward = hyaena.StripedHyena.forward

    def note(self: hyaena.StripedHyena, *args: object, **kwargs: object) -> object:
        asked.append(kwargs.get("method", "auto"))
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(hyaena.StripedHyena, "forward", note)
    assert generate.main(flags(original)) == 0
    assert asked in ([method], [method] + ["auto"] * 5)  # single steps are compiled, or choose for themselves
    captured = capsys.readouterr()
    assert captured.out == expected(original) + "\n"
    assert ("of a filter's energy" in captured.err) == (method == "truncated")  # nothing is cut without a word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config_path", "c.yml"], "no --checkpoint_path"),
        ([], "run the bundled --demo"),
        (["--checkpoint_path", "p.bin"], "no --config_path"),
        (["--demo", "--checkpoint_path", "p.bin"], "--demo brings its own"),
        (["--demo", "--penalty_alpha", "0.6"], "unrecognized arguments: --penalty_alpha"),
        (["--demo", "--prompt", "x"], "unrecognized arguments: --prompt x: did you mean --prompt_file?"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_demo_brings_a_prompt_and_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--demo", "--num_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith(generate.DEMO_PROMPT)
    (tmp_path / "own.txt").write_text("def main(")
    assert generate.main(["--demo", "--num_tokens", "3", "--prompt_file", "own.txt"]) == 0
    assert capsys.readouterr().out.startswith("def main(")


def test_without_a_prompt_file_there_is_the_originals(
    original: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(original)
    arguments = flags(original)
    at = arguments.index("--prompt_file")
    assert generate.main(arguments[:at] + arguments[at + 2 :]) == 0
    assert capsys.readouterr().out == expected(original) + "\n"


def test_a_config_that_cannot_be_read_is_one_line(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (original / "config.yml").write_text(json.dumps({"vocab_sise": 3}))
    assert generate.main(flags(original)) == 2
    error = capsys.readouterr().err
    assert error.startswith("generate.py: error: ")
    assert error.count("\n") == 1
