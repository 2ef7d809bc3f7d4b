"""No GPU, one torch thread, fixed seeds, the golden cases, and lines that are logged anew in every test."""

from __future__ import annotations

import os
import random

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # evo2 on a CPU, wherever the tests run

import numpy as np
import pytest
import torch
from integrations.evo2.cases import Case

from vortex.model import generation

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setattr(generation, "_WARNED", set())


@pytest.fixture(params=["", "hcm128"], ids=["tiny", "hcm128"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case.named(request.param)


@pytest.fixture
def tiny() -> Case:
    return Case.named("")
