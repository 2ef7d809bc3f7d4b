"""``hyaena serve`` as a process: it starts, answers, and ends on SIGTERM."""

from __future__ import annotations

import gc
from typing import Any

import httpx
import pytest
from benchmarks.serve.process import serving

import hyaena
from hyaena.serve import run
from serve.clients import PATIENCE


def test_the_command_serves_cub_and_ends_on_sigterm() -> None:
    options = ("--kv-memory", "0.05", "--max-rows", "4")
    with serving(*options, environment={"OMP_NUM_THREADS": "1"}) as server:
        body = {"prompt": "import ", "max_tokens": 6, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE, trust_env=False)
        assert answer.status_code == 200
        want = hyaena.generate(*hyaena.load("cub", dtype="float32"), "import ", max_new_tokens=6)
        assert answer.json()["choices"][0]["text"] == want.text
        assert server.end() == 0
    assert any('"path": "/v1/completions", "status": 200' in line for line in server.log)
    assert not any("import " in line for line in server.log), "the log tells what was asked"


def test_what_was_loaded_is_left_out_of_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams stand still while the collector looks at objects, and these never go."""
    frozen: list[int] = []

    class Left(BaseException):
        pass

    class Server:
        def __init__(self, *given: Any, **options: Any) -> None:
            pass

        def serve_on(self, opened: Any) -> bool:
            frozen.append(gc.get_freeze_count())
            return True

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(run, "HttpServer", Server)
    monkeypatch.setattr(run.logging, "shutdown", lambda: None)
    monkeypatch.setattr(run.os, "_exit", leave)
    app: Any = None
    opened: Any = None
    gc.unfreeze()  # what conftest.py has left out
    with pytest.raises(Left):
        run.serve(app, opened, [], drain=1)
    assert frozen[0] > 10_000
