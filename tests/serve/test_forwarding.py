"""Requests that another process answers, with servers that are lost; the servers are functions here."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import Message

from hyaena.errors import UnsupportedError
from hyaena.serve.app import add_errors
from hyaena.serve.forwarding import ATTEMPTS, Forwarder, ServerLostError, answer
from hyaena.serve.metrics import Metrics, merged


async def echo(request: Request) -> Response:
    body = await request.body()
    found = {"body": body.decode(), "path": request.url.path, "query": request.url.query}
    return JSONResponse(found, status_code=201, headers={"X-Request-Id": "mine"})


async def count(request: Request) -> Response:
    async def events() -> AsyncGenerator[str]:
        for number in range(4):
            yield f"data: {number}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


SERVER = Starlette(routes=[Route("/v1/echo", echo, methods=["POST"]), Route("/v1/count", count)])


def client(
    lose: Callable[[int, int], bool] = lambda attempt, sent: False, server: Any = SERVER, **options: Any
) -> TestClient:
    """A client of a forwarder; ``lose`` says whether a server is lost in an attempt after so many messages."""
    attempts = iter(range(100))

    async def ask(scope: dict[str, Any], body: bytes, starts: Sequence[bytes]) -> AsyncGenerator[Message]:
        attempt, sent = next(attempts), 0
        json.dumps({key: str(value) for key, value in scope.items()})
        async for message in answer(server, f"server {attempt}", scope, body):
            if lose(attempt, sent):
                raise ServerLostError
            yield message
            sent += 1

    app = Starlette(routes=[Mount("/", Forwarder(ask, **options))])
    add_errors(app)
    return TestClient(app, raise_server_exceptions=False)


def test_an_answer_is_that_of_the_server() -> None:
    found = client().post("/v1/echo?a=b", content=b"x" * 100_000)
    assert found.status_code == 201 and found.headers["X-Replica"] == "server 0"
    assert found.json() == {"body": "x" * 100_000, "path": "/v1/echo", "query": "a=b"}
    assert "X-Request-Id" not in found.headers  # it is for the server before this one to name requests
    assert client().get("/v1/count").text == "".join(f"data: {number}\n\n" for number in range(4))
    assert client().get("/nothing").status_code == 404


@pytest.mark.parametrize("after", [0, 1, 2])
def test_another_server_answers_where_one_is_lost_before_it_answered(after: int) -> None:
    found = client(lambda attempt, sent: attempt < ATTEMPTS - 1 and sent == after).post("/v1/echo", content=b"x")
    assert found.status_code == 201 and found.headers["X-Replica"] == f"server {ATTEMPTS - 1}"


def test_a_stream_whose_server_is_lost_ends_with_an_error_event() -> None:
    found = client(lambda attempt, sent: sent == 4).get("/v1/count")
    *events, error, done = found.text.removesuffix("\n\n").split("\n\n")
    assert events == ["data: 0", "data: 1"] and done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "generation_failed"


def test_a_server_whose_application_fails_is_not_a_client_that_waits() -> None:
    """After nothing, after the head, and in the middle of a stream and of another answer."""

    def failing(*messages: Message) -> Callable[..., Any]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            for message in messages:
                await send(message)
            raise RuntimeError

        return app

    def head(kind: bytes) -> Message:
        return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}

    part: Message = {"type": "http.response.body", "body": b"data: 0\n\n", "more_body": True}
    for messages in ((), (head(b"text/plain"),)):
        found = client(server=failing(*messages)).get("/v1/count")
        assert found.status_code == 500 and found.json()["error"]["code"] == "generation_failed"
    events = client(server=failing(head(b"text/event-stream"), part)).get("/v1/count").text.split("\n\n")
    assert events[0] == "data: 0" and "generation_failed" in events[1] and events[2] == "data: [DONE]"


def test_without_a_server_the_answer_is_503() -> None:
    found = client(lambda attempt, sent: True).post("/v1/echo")
    assert found.status_code == 503 and found.headers["Retry-After"]
    assert found.json()["error"]["type"] == "server_error"


def test_a_server_that_takes_nothing_is_not_waited_for() -> None:
    async def ask(scope: dict[str, Any], body: bytes, starts: Sequence[bytes]) -> AsyncGenerator[Message]:
        await asyncio.Event().wait()
        yield {}

    app = Starlette(routes=[Mount("/", Forwarder(ask, patience=0.1))])
    add_errors(app)
    assert TestClient(app).post("/v1/echo").status_code == 503


def test_a_request_that_is_closed_is_cancelled_in_the_server() -> None:
    state: list[str] = []

    async def endless(request: Request) -> Response:
        async def events() -> AsyncGenerator[str]:
            try:
                while True:
                    yield "data: x\n\n"
                    await asyncio.sleep(0)
            finally:
                state.append("ended")

        return StreamingResponse(events())

    async def run() -> None:
        app = Starlette(routes=[Route("/", endless)])
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [], "root_path": ""}
        messages = answer(app, "a", scope, b"")
        for _ in range(5):
            await anext(messages)
        await messages.aclose()

    asyncio.run(run())
    assert state == ["ended"]


def test_metrics_of_several_servers_are_told_apart() -> None:
    texts = {}
    for name, tokens in (("a", 3), ("b", 5)):
        metrics = Metrics("cub")
        for _ in range(tokens):
            metrics.tokens(1, 0.1, first=False)
        texts[name] = metrics.text().decode()
    lines = merged(texts).decode().splitlines()
    assert 'hyaena:generation_tokens_total{model_name="cub",replica="a"} 3.0' in lines
    assert 'hyaena:generation_tokens_total{model_name="cub",replica="b"} 5.0' in lines
    assert sum(line.startswith("# TYPE hyaena:inter_token_latency_seconds histogram") for line in lines) == 1


def test_without_ray_the_deployment_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hyaena.serve.ray", raising=False)
    with pytest.raises(UnsupportedError, match=r"hyaena\.serve\.ray needs ray: pip install 'hyaena\[ray\]'"):
        importlib.import_module("hyaena.serve.ray")
