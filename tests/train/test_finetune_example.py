from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hyaena.train import loop

pytestmark = pytest.mark.integration  # trains: half a minute of a core

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of it: what they learn is the example's business, not the test's."""
    monkeypatch.setattr(loop, "plot_metrics", lambda runs, output, title: output.write_bytes(b""))
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(tmp_path, steps=2)
    out = capsys.readouterr().out
    assert out.startswith("held-out answers: ") and f"the model is {tmp_path}/run/final" in out
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and set(rows[0]) == {"prompt", "completion"}
