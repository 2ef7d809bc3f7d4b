from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hyaena.errors import HyaenaError
from hyaena.train.plot import loss_curve, plot_metrics

ROWS: list[dict[str, Any]] = [
    {"kind": "heldout", "step": 0, "bits_per_byte": 8.0, "loss": 5.5},
    {"kind": "train", "step": 3, "loss": 2.0, "losses": [3.0, 2.0, 1.0], "bits_per_byte": 3.0, "lr": 1e-3},
    {"kind": "train", "step": 5, "loss": 0.0, "losses": [0.0, 0.0], "bits_per_byte": 0.0, "lr": 2e-3},
    {"kind": "heldout", "step": 5, "bits_per_byte": 2.0, "loss": 1.4},
    {"kind": "train", "step": 6, "loss": 1.0, "losses": [1.0], "bits_per_byte": 1.5, "lr": 1e-3},
]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "metrics.jsonl"


def test_the_curve_has_every_step() -> None:
    assert loss_curve(ROWS) == ([1, 2, 3, 4, 5, 6], [4.5, 3.0, 1.5, 0.0, 0.0, 1.5])


def test_the_picture_has_steps_on_its_axis(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k))[1])
    plot_metrics({"a": metrics, "b": metrics}, tmp_path / "loss.png", title="two runs")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    upper, lower = drawn[0].axes
    assert lower.get_xlabel() == "optimizer steps" and upper.get_ylabel() == "bits per byte"
    training, held_out, *_ = upper.lines
    assert list(training.get_xdata()) == [1, 2, 3, 4, 5, 6] and list(held_out.get_xdata()) == [0, 5]
    assert all(float(tick).is_integer() for tick in lower.get_xticks())
    assert [text.get_text() for text in upper.get_legend().get_texts()][1] == "a, held out (best 2.000)"


def test_a_missing_library_is_named(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HyaenaError, match=r"pip install 'hyaena\[train\]'"):
        plot_metrics({"a": metrics}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
