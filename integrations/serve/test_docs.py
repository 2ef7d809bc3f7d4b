"""``docs/serving.md`` runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

import pages


def test_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages.run(pages.ROOT / "docs" / "serving.md", monkeypatch)
