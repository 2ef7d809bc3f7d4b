"""What the first requests would wait for, done before any comes: kernels are compiled or loaded, graphs captured."""

from __future__ import annotations

import itertools
import logging
import queue
import time
import uuid
from collections.abc import Iterator

from hyaena.sampling import SamplingParams
from hyaena.serve.engine import Delta, Engine, EngineDeadError, Request
from hyaena.serve.metrics import Metrics
from hyaena.serve.work import Steps

log = logging.getLogger(__name__)

PARAMS = (SamplingParams(), SamplingParams(temperature=1.0, seed=0))
"""Greedy, and with chance. Less usual ways to choose a token are made ready when the first request wants them."""

PROMPTS = (16, 32, 64, 128, 256, 512)
"""Tokens of prompts that a GPU reads in a captured pass each, see ``decoding.short_passes``."""

STEPS = 16
"""Tokens of each of the rows that are decoded together: all have started by then, since an eighth starts together."""


def warm_up(engine: Engine) -> float:
    """Answer requests of our own, in the way in which all are answered; the seconds that it took.

    On a CPU one request compiles the kernels, or loads those that were compiled before. On a GPU prompts of all
    captured sizes and of a whole chunk are read, and 1, 2, 4, … ``max_rows`` rows are decoded, so that every bucket of
    rows has its graph. Nothing of it stays, in the metrics or in the prefix cache.

    Args:
        engine: that was started and has no other requests yet.

    Raises:
        EngineDeadError: the engine failed.
    """
    began, metrics = time.monotonic(), engine.metrics
    engine.metrics = Metrics()
    try:
        for group in _groups(engine):
            _answer(engine, group)
        engine.call(_forget(engine)).result()
    except EngineDeadError:
        message = "the engine failed while it warmed up: its log says why; --no-warm-up leaves that out"
        raise EngineDeadError(message) from None
    finally:
        engine.metrics = metrics
    seconds = time.monotonic() - began
    log.info("warmed up in %.1f s: what the first requests need is compiled or loaded", seconds)
    return seconds


def _groups(engine: Engine) -> Iterator[list[Request]]:
    """Requests that are answered together."""
    captures = _captures(engine)
    rows = min(engine.settings.max_rows, engine.settings.max_waiting)
    buckets = sorted({*(2**i for i in range(rows.bit_length())), rows})
    for adapter, params in itertools.product(engine.models, PARAMS):
        if not captures:
            yield [_request(engine, adapter, params, 1, 3)]
            continue
        for length in sorted({*PROMPTS, engine.chunk}):
            yield [_request(engine, adapter, params, length, 1)]
        for count in buckets:
            yield [_request(engine, adapter, params, 1, STEPS) for _ in range(count)]


def _captures(engine: Engine) -> bool:
    """Whether what is computed depends on the number of rows and tokens: a GPU has graphs and kernels for each."""
    return engine.model.device.type == "cuda"


def _request(engine: Engine, adapter: str, params: SamplingParams, length: int, count: int) -> Request:
    """A request that shares no prefix with another, of at most so many tokens as the engine takes."""
    length = max(1, min(length, engine.max_length - count))
    return Request(
        prompt=[0] * length,
        params=params,
        max_new_tokens=min(count, engine.max_length - length),
        salt=uuid.uuid4().hex,
        adapter=adapter,
    )


def _answer(engine: Engine, group: list[Request]) -> None:
    """Wait for the end of requests, good or bad: what is wrong with the model is told to those who ask it."""
    ends: queue.SimpleQueue[Delta] = queue.SimpleQueue()

    def sink(delta: Delta) -> None:
        if delta.finish_reason is not None:
            ends.put(delta)

    for request in group:
        engine.submit(request, sink)
    for _ in group:
        ends.get()


def _forget(engine: Engine) -> Steps[None]:
    engine.scheduler.prefix.clear()
    yield 0.0
