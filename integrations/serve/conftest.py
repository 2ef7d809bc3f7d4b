"""One server of cub, which all clients ask."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[2] / "tests"))  # pages

import pytest
from benchmarks.serve.process import ServerProcess, serving

import hyaena


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    with serving("--chat-template", "nous", "--kv-memory", "0.1", "--max-new-tokens", "24", "--quiet") as found:
        yield found


@pytest.fixture(scope="session")
def cub() -> Any:
    return hyaena.load("cub", dtype="float32")
