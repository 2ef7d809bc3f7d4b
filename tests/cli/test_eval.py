"""``hyaena eval`` where lm_eval is not installed; ``integrations/eval`` has the rest."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from hyaena.cli import main


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "lm_eval" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr("hyaena.hub.load", lambda *_, **__: pytest.fail("the weights were read"))
    assert main(["eval", "--tasks", "piqa"]) == 2
    assert capsys.readouterr().err == "hyaena: error: evaluation needs lm_eval: pip install 'hyaena[eval]'\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name tasks by --tasks, or a suite by --suite"),
        (["--tasks", "a", "--suite", "readme"], "one of the two only"),
        (["--suite", "other"], "unknown suite 'other': choose readme"),
        (["--tasks", "a", "--output", "/nowhere/out.json"], "name a file in a folder that exists"),
        (["--tasks", "a", "--limit", "0"], "limit must be a whole number, 1 or more, not 0"),
        (["--tasks", "a", "--num-fewshot", "-1"], "num_fewshot must be a whole number, 0 or more, not -1"),
        (["--suite", "readme", "--batch-size", "0"], "batch_size must be a whole number, 1 or more, not 0"),
        (["--tasks", "a", "--max-length", "1"], "max_length must be a whole number, 2 or more, not 1"),
    ],
)
def test_mistakes_are_found_without_it(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *flags]) == 2
    assert message in capsys.readouterr().err
