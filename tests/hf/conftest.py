"""Small models of every kind of layer, without the noise of transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.utils import logging

from hf_models import CONFIGS, build
from hyaena import StripedHyena


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)


@pytest.fixture(params=CONFIGS)
def native(request: pytest.FixtureRequest) -> StripedHyena:
    return build(CONFIGS[request.param])


@pytest.fixture
def tiny() -> StripedHyena:
    return build(CONFIGS["sh"])
