"""The end of a server: what runs is finished or ends with an error, and nothing hangs."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from configs import TINY
from hyaena.model import StripedHyena
from serve.clients import once
from serve.live import Live, live

MODEL = StripedHyena(replace(TINY, vocab_size=259, max_length=100_000))


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


@pytest.mark.parametrize(("drain", "count", "signals"), [(30.0, 40, 1), (0.2, 10_000, 1), (30.0, 10_000, 2)])
def test_eight_streams_finish_or_end_with_an_error(drain: float, count: int, signals: int) -> None:
    with live(MODEL, drain=drain, kv_bytes=2**24) as server:
        streams = [Stream(server, count) for _ in range(8)]
        for stream in streams:
            assert stream.begun.wait(30)
        began = time.monotonic()
        for _ in range(signals):
            server.server.end()
            time.sleep(0.2)
        for stream in streams:
            stream.join(30)
            assert not stream.is_alive() and stream.whole
            if count == 40:
                assert stream.error is None and len(stream.events) == 40
            else:
                assert stream.error == "the server is stopping"
        if count != 40:
            assert time.monotonic() - began < 10


def test_nothing_is_accepted_while_the_server_drains() -> None:
    with live(MODEL, kv_bytes=2**22) as server:
        stream = Stream(server, 200)
        assert stream.begun.wait(30)
        with server.client() as client:
            assert client.get("/health").status_code == 200
            server.server.end()
            time.sleep(0.3)
            with pytest.raises(Exception, match=r"refused|reset|disconnected"):
                client.get("/health")
        stream.join(30)
        assert stream.whole and stream.error is None


def test_a_failed_engine_is_reported() -> None:
    with live(MODEL, kv_bytes=2**22) as server, server.client() as client:
        stream = Stream(server, 5000)
        assert stream.begun.wait(30)

        def fail(*_: object) -> None:
            raise MemoryError

        server.engine.runner.run = fail  # type: ignore[method-assign, assignment]
        stream.join(30)
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

        want = [ask(prompt).json()["choices"] for prompt in good]
        server.wait_idle()
        with torch.no_grad():
            model.embed_tokens.weight[250] = float("nan")
        for _ in range(3):
            prompts = [*good[:3], [3, 250] * 50, *good[3:], [250]]
            server.engine.call(once(lambda: time.sleep(0.2)))  # so that they are read in one pass
            with ThreadPoolExecutor(len(prompts)) as threads:
                answers = list(threads.map(ask, prompts))
            rest = [answer for i, answer in enumerate(answers) if i not in {3, 7}]
            assert [answer.json().get("choices") for answer in rest] == want
            for i in (3, 7):
                assert answers[i].status_code == 500
                assert "NaN" in answers[i].json()["error"]["message"]
        server.wait_idle()
