"""``docs/vortex.md``: its programs run, from top to bottom, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import evo2.models
import pytest

import pages

PAGE = pages.ROOT / "docs" / "vortex.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kind for kind, _ in pages.blocks(PAGE)} == {"python", "console"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evo2.models, "CONFIG_MAP", dict(evo2.models.CONFIG_MAP))
    pages.run(PAGE, monkeypatch)


def test_every_difference_has_its_test() -> None:
    told = set(re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    tests = (Path(__file__).parent / "test_defects.py").read_text(encoding="utf-8")
    numbers = set(re.findall(r"def test_(\d+)_", tests))
    assert told == numbers | {"9", "19"} == set(map(str, range(1, 20)))
