"""Runs the application on a socket: signals, draining, and the end of the engines."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from hyaena.errors import InputError, printable
from hyaena.serve.engine import Engine

GRACE = 5.0
"""Seconds between the end of draining and the end of the process, in which last answers are sent."""


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server; port 0 takes a free one.

    Raises:
        InputError: the address cannot be had.
    """
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


def serve(app: ASGIApp, opened: socket.socket, engines: Sequence[Engine], *, drain: float) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new requests and finish those that run.

    Args:
        app: the application.
        opened: where it listens.
        engines: that run; they are stopped at the end.
        drain: seconds after which requests that still run end with an error. A second signal ends them immediately.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(drain + GRACE), server_header=False
    )
    try:
        _Server(config, engines, drain).run(sockets=[opened])
    finally:
        for engine in engines:
            engine.stop(timeout=0)
        opened.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, engines: Sequence[Engine], drain: float) -> None:
        super().__init__(config)
        self.engines, self.drain = engines, drain

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals here; uvicorn would raise them again when it has ended."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, and end at the second."""
        seconds = 0.0 if self.should_exit else self.drain
        for engine in self.engines:
            threading.Thread(target=engine.stop, args=(seconds,), daemon=True).start()
        self.should_exit = True
