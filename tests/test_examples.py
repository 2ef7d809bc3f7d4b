"""The short programs in ``examples/`` run from any folder, and print what they promise.

``examples/finetune.py`` and ``examples/finetune_lora.py`` train, and have tests of their own in ``tests/train`` and
``tests/hf``. ``examples/serve_ray.py`` needs Ray: ``integrations/ray-serve``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
PRINTED = {
    "generate_text.py": "24 tokens, ended by length",
    "batch_and_seeds.py": "import collections",
    "stream_with_stop.py": "-- ended by stop",
    "continue_from_cache.py": "3 rows of [40, 40, 40] tokens",
    "long_convolution.py": "state: (1, 4, 2) torch.complex64",
    "own_layer.py": "parameters, untrained, write",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {
        *PRINTED,
        "finetune.py",
        "finetune_lora.py",
        "serve_ray.py",
    }


@pytest.mark.parametrize("name", PRINTED)
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_no_example_hides_a_module_of_the_standard_library() -> None:
    """The folder of a program comes first on its path: an ``operator.py`` there breaks every program beside it."""
    assert not {path.stem for path in FOLDER.glob("*.py")} & sys.stdlib_module_names
