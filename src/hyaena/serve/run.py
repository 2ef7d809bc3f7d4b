"""Runs the application on a socket: signals, draining, and the end of the engines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from types import FrameType
from typing import NoReturn

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from hyaena.errors import InputError, printable, shown
from hyaena.serve.engine import Engine
from hyaena.serve.guards import log_request, new_request_id
from hyaena.serve.protocol import ApiError
from hyaena.signals import handled

GRACE = 5.0
"""Seconds between the end of draining and the end of the process, in which last answers are sent."""

LAST_SECONDS = 1.0
"""Seconds between a second signal and the end of the process."""

HEADER_SECONDS = 30.0
"""The longest time that a connection is kept open without a whole request."""

NEXT_BYTES = 2**16
"""Of requests behind the one that is answered; a client that sends more is not read until the answer has ended."""
READ_SECONDS = 60.0
"""The longest time in which a client reads nothing of what waits for it."""


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server; port 0 takes a free one.

    Raises:
        InputError: the address cannot be had.
    """
    if host in ("", "*"):
        raise InputError(f"{shown(host)} is no address to listen at: give 0.0.0.0 or :: for all of this machine")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{printable(host)} is no address to listen at: {error}") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)
    except OSError as error:
        opened.close()
        raise InputError(f"cannot listen at {printable(host)}, port {port}: {error.strerror}; choose another") from None
    return opened


def leave_out_of_collections() -> None:
    """Have the garbage collector look at what comes from now on only.

    What was loaded stays to the end. To look at all of it takes 0.16 s, in which every stream stands still.
    """
    gc.collect()
    gc.freeze()


def log_requests(*, quiet: bool = False) -> None:
    """Write the log to standard error; ``quiet`` leaves out requests that were answered."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level="WARNING")
    logging.getLogger("hyaena.access").setLevel("WARNING" if quiet else "INFO")
    logging.getLogger("hyaena.serve").setLevel("INFO")
    logging.getLogger("uvicorn.error").addFilter(_said_elsewhere)


def _said_elsewhere(record: logging.LogRecord) -> bool:
    """Whether uvicorn says something that our own lines do not say: each of these requests has one."""
    return not str(record.msg).startswith(("Invalid HTTP request", "Unsupported upgrade", "No supported WebSocket"))


class HttpServer(uvicorn.Server):
    """The application on a socket.

    Args:
        app: the application.
        engines: that run; they are stopped at the end.
        drain: seconds after which requests that still run end with an error.
    """

    def __init__(self, app: ASGIApp, engines: Sequence[Engine], *, drain: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_HttpConnection,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(drain + GRACE),
                server_header=False,
            )
        )
        self.engines, self.drain = engines, drain

    def serve_on(self, opened: socket.socket) -> bool:
        """Serve until ``end``; then finish the requests that run. Whether every engine has stopped."""
        try:
            self.run(sockets=[opened])
        finally:
            opened.close()
            patience = 0.0 if self.force_exit else None
            for engine in self.engines:
                engine.stop(timeout=0, abandon=patience)
        return all(engine.stopped for engine in self.engines)

    def end(self) -> None:
        """Refuse new requests and finish those that run. The second call ends them immediately, with an error."""
        seconds = 0.0 if self.should_exit else self.drain
        for engine in self.engines:
            threading.Thread(target=engine.stop, args=(seconds,), daemon=True).start()
        if self.should_exit:
            force = threading.Timer(LAST_SECONDS, setattr, (self, "force_exit", True))
            force.daemon = True
            force.start()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals here; uvicorn would raise them again when it has ended."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with handled(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, and end at the second."""
        self.end()


class _HttpConnection(H11Protocol):
    """A connection that is closed when its client does not send a whole request, or does not read the answer.

    httptools would parse sooner, but takes heads without end, and drops the bodies of requests that offer an upgrade.
    """

    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watching.cancel()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Go on reading behind a whole request, within bounds: a client that leaves is noticed by reading only."""
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < NEXT_BYTES:
            self.flow.resume_reading()  # type: ignore[attr-defined]

    def pause_writing(self) -> None:
        """The client has not read what was sent."""
        super().pause_writing()
        abort = self.transport.abort  # type: ignore[attr-defined]
        self._stalled = asyncio.get_running_loop().call_later(READ_SECONDS, abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def shutdown(self) -> None:
        """Close the connection, or have its answer be the last; a body that has not come would come too late."""
        cycle = self.cycle  # type: ignore[attr-defined]
        if cycle is not None and cycle.more_body and not cycle.response_started:
            self._refuse(503, "the server is stopping", new_request_id())
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser does not take in the form of the API, and log it: no application sees it."""
        name = new_request_id()
        log_request(name, (self.client or ("",))[0], None, None, 400, 0.0)
        self._refuse(400, msg, name)

    def _refuse(self, status: int, message: str, name: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else an answer has begun, or was given already
            body = json.dumps(ApiError(status, message).body).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"connection: close\r\nx-request-id: {name}\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)  # type: ignore[attr-defined]
        self.transport.close()  # type: ignore[attr-defined]

    def _watch(self, before: object) -> None:
        self._watching = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._check, before)

    def _check(self, before: object) -> None:
        cycle = self.cycle  # type: ignore[attr-defined]
        if cycle is before and (cycle is None or cycle.response_complete):
            self.transport.close()  # type: ignore[attr-defined]
        else:
            self._watch(cycle)


def serve(app: ASGIApp, opened: socket.socket, engines: Sequence[Engine], *, drain: float) -> NoReturn:
    """Serve until SIGTERM, SIGINT or SIGHUP, see ``HttpServer``, and end the process.

    Its status is 0, or 1 where an engine did not end after the second signal: it was in the middle of a long pass.
    The interpreter is not asked to free all that was loaded: on a busy machine it takes seconds for that.
    """
    leave_out_of_collections()
    ended = HttpServer(app, engines, drain=drain).serve_on(opened)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0 if ended else 1)
