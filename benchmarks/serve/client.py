"""A client that costs little: it shares the machine with the server that it measures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0 where the client left before it came.
        began: when the request was sent, on ``time.perf_counter``.
        times: when each event with tokens came, where it was streamed.
        tokens: of the completion, where it was streamed and the request asks for its usage.
        text: of the completion, where it was streamed; of the body, else.
        error: message of an error event, or None.
        whole: whether the answer came to its end.
    """

    status: int = 0
    began: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    error: str | None = None
    whole: bool = False

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.began

    @property
    def seconds(self) -> float:
        """Seconds to the last token."""
        return self.times[-1] - self.began


async def post(
    port: int,
    body: Mapping[str, Any] | bytes,
    *,
    path: str = "/v1/completions",
    leave_after: float | None = None,
) -> Answer:
    """Send a request on a connection of its own, and read the answer.

    Args:
        port: on 127.0.0.1.
        body: JSON, or bytes as they are.
        path: of the request.
        leave_after: seconds after which the client closes the connection.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = Answer(began=time.perf_counter())
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        async with asyncio.timeout(leave_after):
            await writer.drain()
            await _read(reader, answer)
    except TimeoutError:
        pass
    finally:
        writer.close()
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    answer.status = int(head.split()[1])
    if b"text/event-stream" not in head:
        answer.text = (await reader.read()).decode()
        answer.whole = True
        return
    came: list[tuple[float, bytes]] = []  # looked at when all is there: until then the server needs the processor
    try:
        while data := await reader.read(2**16):
            came.append((time.perf_counter(), data))
    finally:
        _take(came, answer)


def _take(came: list[tuple[float, bytes]], answer: Answer) -> None:
    """The events of a stream; each came with the bytes that end its line."""
    line = b""
    for at, data in came:
        *lines, line = (line + data).split(b"\n")
        for one in lines:
            if one.startswith(b"data: "):  # others are the length of a chunk, or the end of an event
                _event(one[6:], at, answer)


def _event(data: bytes, at: float, answer: Answer) -> None:
    if data == b"[DONE]":
        answer.whole = True
        return
    event = json.loads(data)
    if "error" in event:
        answer.error = event["error"]["message"]
    elif event["choices"]:
        answer.times.append(at)
        answer.text += event["choices"][0].get("text") or ""
    elif event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]
