"""The README's picture: what it reads of the GPU page, what it draws, and that the file is of today's figures."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "readme_picture.py"


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_picture", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["readme_picture"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(svg: str) -> list[tuple[float, float]]:
    """The share in percent and the rate of every bar."""
    found = re.findall(r"(\d+)%\s+([\d,]+) tokens/s", svg)
    return [(float(share), float(rate.replace(",", ""))) for share, rate in found]


def test_the_picture_shows_the_figures_of_the_page(picture: ModuleType) -> None:
    """Within 5 % of the page: that much a repeated run may differ."""
    bars = picture.read_bars()
    assert {bar.kind for bar in bars} == {"decode", "prefill"} and all(0 < bar.share < 1 for bar in bars)
    drawn = numbers(picture.PICTURE.read_text(encoding="utf-8"))
    assert len(drawn) == len(bars)
    for bar, (share, rate) in zip(bars, drawn, strict=True):
        assert share == pytest.approx(100 * bar.share, rel=0.05)
        assert rate == pytest.approx(bar.tokens_per_second, rel=0.05)


def test_it_draws_each_bar_with_its_rate_and_its_share(picture: ModuleType, tmp_path: Path) -> None:
    bars = [
        picture.Bar("decode", "decoding, batch 3, context 77", 1234.4, 0.5),
        picture.Bar("prefill", "prefill of 99 tokens", 7.0, 0.25),
    ]
    picture.draw(bars, tmp_path / "new" / "p.svg")
    svg = (tmp_path / "new" / "p.svg").read_text(encoding="utf-8")
    assert numbers(svg) == [(50.0, 1234.0), (25.0, 7.0)]
    assert "batch 3, context 77" in svg and "prefill of 99 tokens" in svg
    picture.draw(bars, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text(encoding="utf-8") == svg  # nothing of the time or the machine
