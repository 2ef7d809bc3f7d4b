"""A server with cub on loopback, and a browser without a window."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

import hyaena

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


class Server(NamedTuple):
    """A process of ``hyaena serve``."""

    url: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serving(*options: str, seconds: float = 200) -> Iterator[Server]:
    """Serve cub at a free port of loopback."""
    command = [sys.executable, "-m", "hyaena", "serve", "--port", "0", "--quiet", *options]
    env = os.environ | {"PYTHONPATH": str(Path(hyaena.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=env)
        try:
            end = time.monotonic() + seconds
            while not (found := re.search(r"http://127[.0-9]+:\d+", Path(log.name).read_text())):
                assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()
                time.sleep(0.2)
            yield Server(found[0], process)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def browsing(width: int = 1280, height: int = 800, *flags: str) -> Iterator[Chrome]:
    """Start a Chromium with a profile of its own."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}", *flags):
            options.add_argument(flag)
        browser = Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))
        try:
            yield browser
        finally:
            browser.quit()
