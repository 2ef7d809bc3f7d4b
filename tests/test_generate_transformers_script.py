"""``generate_transformers.py``: the original's command line over transformers."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

import hyaena
from pages import ROOT

pytest.importorskip("transformers")

import generate_transformers

PROMPT = "import argparse\n"


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    return str(tmp_path / "prompt.txt")


def expected(text: str, count: int) -> str:
    return text + hyaena.generate(*hyaena.load("cub"), text, max_new_tokens=count).text


def test_a_file_is_continued(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model_id", "cub", "--input-file", prompt, "--max-new-tokens", "12"]
    assert generate_transformers.main(arguments) == 0
    assert capsys.readouterr().out == expected(PROMPT, 12) + "\n"


def test_prompts_are_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("class A\n\ndef f\n"))
    assert generate_transformers.main(["--model-name", "cub", "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert expected("class A", 5) in out and expected("def f", 5) in out and out.count("> ") >= 4


def test_samples_follow_the_seed(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.95", "--repetition-penalty", "1.1", "--seed"]
    texts = []
    for seed in ("3", "3", "4"):
        arguments = ["--model_id", "cub", "--input_file", prompt, "--max-new-tokens", "12", *sampling, seed]
        assert generate_transformers.main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model_id"),
        (["--model_id", "cub", "--penalty-alpha", "0.6"], "--penalty-alpha is not supported"),
        (["--model_id", "cub", "--input-fil", "x"], "did you mean --input-file?"),
        (["--model_id", "cub", "--top-k", "5"], "--top-k is for sampling: add --temperature"),
        (["--model_id", "cub", "--input-file", "no such file"], "cannot read the input file"),
        (["--model_id", "no-such-model"], "no such model"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert generate_transformers.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_originals_command_runs() -> None:
    """As its README has it, with the prompt that is there."""
    command = [sys.executable, "generate_transformers.py", "--model_id", "cub", "--input-file", "test_prompt.txt"]
    done = subprocess.run([*command, "--max-new-tokens", "4"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The four species of hyenas are")
