"""The tests of ``hyaena.hf`` with the oldest version of transformers that it supports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import transformers

from hyaena.hf.versions import OLDEST

ROOT = Path(__file__).parent.parent.parent


def test_everything_works_with_the_oldest_version() -> None:
    assert transformers.__version__ == ".".join(map(str, OLDEST))
    tests = ["tests/hf", "tests/test_generate_transformers_script.py", "-m", "not integration"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
