"""One server and one browser for all tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from integrations.playground.browser import Server, browsing, serving
from selenium.webdriver import Chrome


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving("--chat-template", "nous") as started:
        yield started


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    with browsing() as started:
        yield started


@pytest.fixture
def until(browser: Chrome) -> Callable[..., None]:
    """Wait for something to become true."""

    def wait(condition: Callable[[], object], seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not condition():
            errors = browser.find_element("id", "error").text
            assert time.monotonic() < end, f"it did not come; the page says {errors!r}"
            time.sleep(0.05)

    return wait
