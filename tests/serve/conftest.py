"""Kernels that decoding compiles for the CPU: compiled before a test begins, so that none waits for them."""

from __future__ import annotations

import pytest

from hyaena.model import StripedHyena
from serve.clients import CONFIGS, running, submit


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    for name in ("sh", "multi"):  # between them, filters of all kinds
        with running(StripedHyena(CONFIGS[name])) as engine:
            submit(engine, [1], count=2).wait()
