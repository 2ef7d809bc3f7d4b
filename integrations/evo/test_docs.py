"""``docs/evo.md``: its programs run, from top to bottom, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pages

PAGE = pages.ROOT / "docs" / "evo.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kind for kind, _ in pages.blocks(PAGE)} == {"python", "console"}
    monkeypatch.chdir(tmp_path)
    pages.run(PAGE, monkeypatch)


def test_every_difference_has_its_test() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    tests = (Path(__file__).parent / "test_defects.py").read_text(encoding="utf-8")
    names = re.findall(r"def test_(\d+)_(?:and_(\d+)_)?", tests)
    told = {number for row in rows for number in row.split(", ")}
    assert told == {number for name in names for number in name if number} == set(map(str, range(1, 17)))
