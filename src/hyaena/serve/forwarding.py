"""Requests that another process answers: its application runs there, and its messages come back one by one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyaena.serve.affinity import beginnings
from hyaena.serve.guards import while_connected
from hyaena.serve.protocol import ApiError

ACCEPTED = "hyaena.accepted"
"""Type of the message before those of the application: a server has taken the request. It names the server."""

ATTEMPTS = 3
"""Servers that are tried with a request of which nothing was answered yet."""

Ask = Callable[[dict[str, Any], bytes, Sequence[bytes]], AsyncGenerator[Message]]
"""Sends scope, body and the digests of the prompt's beginnings to a server; its messages. See ``answer``."""


class ServerLostError(Exception):
    """The server that had the request is gone."""


async def answer(app: ASGIApp, server: str, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
    """Run an application on a request whose body is known: its messages, after one that names the server.

    Closing the generator ends the request as a client that leaves does.
    """
    yield {"type": ACCEPTED, "server": server}
    queue: asyncio.Queue[Message | None] = asyncio.Queue()
    left, given = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, receive, queue.put)
        finally:
            queue.put_nowait(None)

    task = asyncio.ensure_future(run())
    try:
        while (message := await queue.get()) is not None:
            yield message
    finally:
        left.set()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # it has answered, or nobody reads its answer
            await task


class Forwarder:
    """An application that lets servers answer, and tries another one where a server is lost.

    Once a part of an answer was sent nothing can be repeated: a stream then ends with an error event.

    Args:
        ask: see ``Ask``; raises ServerLostError.
        patience: seconds until a server must have taken a request.
    """

    def __init__(self, ask: Ask, *, patience: float = 30.0) -> None:
        self.ask, self.patience = ask, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        work = self._forward(_plain(scope), bytes(body), send)
        try:
            await while_connected(Request(scope, receive), work)
        except ApiError as error:
            if error.code != "disconnected":
                raise

    async def _forward(self, scope: dict[str, Any], body: bytes, send: Send) -> None:
        starts = beginnings(scope["path"], body)
        for attempt in range(ATTEMPTS):
            answering = _Answering(send)
            try:
                async with contextlib.aclosing(self.ask(scope, body, starts)) as messages:
                    accepted = await asyncio.wait_for(anext(messages), self.patience)
                    answering.server = accepted["server"]
                    async for message in messages:
                        await answering.send(message)
                if not answering.complete:  # its application failed
                    await answering.end()
                return
            except TimeoutError:
                break
            except ServerLostError:
                if answering.started:
                    await answering.end()
                    return
                await asyncio.sleep(0.2 * attempt)
        raise ApiError(
            503, "no server has taken the request: try again later", code="unavailable", headers={"Retry-After": "10"}
        )


class _Answering:
    """Sends the messages of an answer. The first one, which has the status, waits for the second."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._first: Message | None = None
        self.server = ""
        self.started = self.complete = False
        self._streams = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers["X-Replica"] = self.server
            del headers["X-Request-Id"]  # who takes requests gives answers theirs, as Ray does
            self._streams = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            self._first = message
            return
        if self._first is not None:
            self.started = True
            await self._send(self._first)
            self._first = None
        self.complete = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """End an answer whose server is gone or failed: a stream by an error event, anything else by breaking off.

        Raises:
            ApiError: it has not begun.
            ServerLostError: it cannot be ended properly.
        """
        error = ApiError(500, "the server that wrote this answer is gone or failed", code="generation_failed")
        if not self.started:
            raise error
        if not self._streams:
            raise ServerLostError
        event = f"data: {json.dumps(error.body)}\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _plain(scope: Scope) -> dict[str, Any]:
    """What an application needs of a scope, without what only this process has."""
    names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    plain = {name: scope[name] for name in (*names, "client", "server") if name in scope}
    return plain | {"headers": [tuple(pair) for pair in scope["headers"]]}
