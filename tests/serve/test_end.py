"""The end of a server: what runs is finished or ends with an error, and nothing hangs."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from configs import TINY
from hyaena.model import StripedHyena
from serve.clients import PATIENCE, once, until
from serve.live import Live, live

MODEL = StripedHyena(replace(TINY, vocab_size=259, max_length=100_000))

LONG = 16_000
"""Tokens that no machine writes before a server is told to stop."""


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, server: Live, count: int) -> None:
        super().__init__(daemon=True)
        self.server, self.count = server, count
        self.begun = threading.Event()
        self.events: list[Any] = []
        self.whole = False
        self.start()

    def run(self) -> None:
        body = {"prompt": "ab", "max_tokens": self.count, "stream": True, "ignore_eos": True}
        body["stream_options"] = {"include_usage": True}
        with self.server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.whole = True
                elif line:
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.begun.set()

    @property
    def error(self) -> str | None:
        return self.events[-1].get("error", {}).get("message")


@pytest.mark.parametrize(("drain", "count", "signals"), [(PATIENCE, 40, 1), (0.2, LONG, 1), (PATIENCE, LONG, 2)])
def test_eight_streams_finish_or_end_with_an_error(drain: float, count: int, signals: int) -> None:
    with live(MODEL, drain=drain, kv_bytes=2**24) as server:
        streams = [Stream(server, count) for _ in range(8)]
        for stream in streams:
            assert stream.begun.wait(PATIENCE)
        for _ in range(signals):
            server.server.end()
        for stream in streams:
            stream.join(PATIENCE)
            assert not stream.is_alive() and stream.whole
            if count == 40:
                assert stream.error is None and stream.events[-1]["usage"]["completion_tokens"] == 40
            else:
                assert stream.error == "the server is stopping" and len(stream.events) < count


def test_nothing_is_accepted_while_the_server_drains() -> None:
    with live(MODEL, drain=PATIENCE, kv_bytes=2**22) as server:
        stream = Stream(server, 500)
        assert stream.begun.wait(PATIENCE)
        with server.client() as client:
            assert client.get("/health").status_code == 200
            server.server.end()
            until(lambda: refused(client))
        stream.join(PATIENCE)
        assert stream.whole and stream.error is None


def test_a_body_that_has_not_come_holds_no_server() -> None:
    with live(MODEL, drain=PATIENCE, kv_bytes=2**22) as server, server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        connections = server.server.server_state.connections
        until(lambda: any(one.cycle is not None for one in connections), "the request")
        server.server.end()
        got = b"".join(iter(lambda: connection.recv(4096), b""))
    assert got.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"the server is stopping" in got


def refused(client: httpx.Client) -> bool:
    try:
        client.get("/health")
    except httpx.TransportError:
        return True
    return False


def test_a_failed_engine_is_reported() -> None:
    with live(MODEL, kv_bytes=2**22) as server, server.client() as client:
        stream = Stream(server, 5000)
        assert stream.begun.wait(PATIENCE)

        def fail(*_: object) -> None:
            raise MemoryError

        server.engine.runner.run = fail  # type: ignore[method-assign, assignment]
        stream.join(PATIENCE)
        assert stream.whole and stream.error == "the engine has failed"
        assert client.get("/health").status_code == 503
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert client.post("/score", json={"input": "a"}).status_code == 503


def test_nan_ends_one_request_only_and_leaves_nothing_behind() -> None:
    model = StripedHyena(replace(TINY, vocab_size=259, tie_embeddings=False))
    good = [[i + 5 * j for j in range(1, 20)] for i in range(6)]
    with live(model, kv_bytes=2**22, chunk=256) as server, server.client() as client:

        def ask(prompt: list[int]) -> Any:
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            return client.post("/v1/completions", json=body)

        def together(prompts: list[list[int]]) -> list[Any]:
            """Answers to prompts that are read in one pass."""
            begun, release = threading.Event(), threading.Event()
            server.engine.call(once(lambda: begun.set() or release.wait(PATIENCE)))
            assert begun.wait(PATIENCE)  # before that the engine still takes requests
            with ThreadPoolExecutor(len(prompts)) as threads:
                asked = [threads.submit(ask, prompt) for prompt in prompts]
                until(lambda: server.engine._waiting == len(prompts))
                release.set()
                return [one.result() for one in asked]

        want = [ask(prompt).json()["choices"] for prompt in good]
        server.wait_idle()
        with torch.no_grad():
            model.embed_tokens.weight[250] = float("nan")
        for _ in range(3):
            prompts = [*good[:3], [3, 250] * 50, *good[3:], [250]]
            answers = together(prompts)
            rest = [answer for i, answer in enumerate(answers) if i not in {3, 7}]
            assert [answer.json().get("choices") for answer in rest] == want
            for i in (3, 7):
                assert answers[i].status_code == 500
                message = answers[i].json()["error"]["message"]
                assert "NaN" in message and "compute in float32" in message
        server.wait_idle()
