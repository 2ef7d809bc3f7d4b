"""One torch thread, fixed seeds and the golden cases."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from integrations.evo.cases import Case

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["sh-tiny", "evo-tiny", "evo8k-tiny"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case.named(request.param)


@pytest.fixture
def evo_case() -> Case:
    return Case.named("evo-tiny")


@pytest.fixture
def sh_case() -> Case:
    return Case.named("sh-tiny")
