"""``examples/finetune_lora.py``, a few steps of it: what they learn is the example's business, not the test's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytestmark = pytest.mark.integration  # trains, and starts a process: half a minute of a core

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_lora.py"


def test_the_example_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("finetune_lora", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(tmp_path, steps=4)
    lines = capfd.readouterr().out.splitlines()
    before, after = (float(line.split()[3]) for line in lines if line.startswith("held-out loss"))
    assert after < before
    assert any(line.startswith(f"the adapter is {tmp_path}/adapter, ") for line in lines)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
