"""A server on a socket of this machine, in a thread of the tests: real connections, and a look at the engine behind."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from hyaena.model import StripedHyena
from hyaena.serve.app import Server, make_app
from hyaena.serve.conversation import ChatTemplate
from hyaena.serve.delivery import STREAM_INTERVAL
from hyaena.serve.engine import Engine, EngineSettings
from hyaena.serve.metrics import Metrics
from hyaena.serve.run import HttpServer, listen
from hyaena.serve.service import Limits, Served
from hyaena.tokenizers import ByteTokenizer
from hyaena.tokenizers.chat import TEMPLATES
from serve.clients import PATIENCE, until


@dataclass
class Live:
    """A running server.

    Attributes:
        engine: of its only model, ``tiny``.
        port: on 127.0.0.1.
        server: that is stopped by ``end``.
    """

    engine: Engine
    port: int
    server: HttpServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, **options)

    def connect(self, timeout: float = PATIENCE) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def wait_idle(self) -> None:
        """Wait until the engine has nothing to do, and all pages are free or belong to the prefix cache."""
        scheduler = self.engine.scheduler
        pages = scheduler.pages
        until(
            lambda: not scheduler.jobs and scheduler.idle and pages.free + scheduler.prefix.cached_pages == pages.count,
            "idleness",
        )


@contextmanager
def live(
    model: StripedHyena,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    drain: float = 10,
    stream_interval: float = STREAM_INTERVAL,
    **settings: Any,
) -> Iterator[Live]:
    """Serve a model of bytes, with the Nous template, until the block ends."""
    metrics, tokenizer = Metrics(), ByteTokenizer()
    engine = Engine(model, tokenizer, EngineSettings(**settings), metrics)
    served = Served(name="tiny", engine=engine, tokenizer=tokenizer, template=ChatTemplate(TEMPLATES["nous"]))
    app = make_app(Server([served], metrics, limits, stream_interval=stream_interval), keys=keys)
    opened = listen("127.0.0.1", 0)
    port = opened.getsockname()[1]
    engine.start()
    server = HttpServer(app, [engine], drain=drain)
    thread = threading.Thread(target=server.serve_on, args=(opened,))
    thread.start()
    try:
        yield Live(engine, port, server)
    finally:
        server.end()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not stop"
