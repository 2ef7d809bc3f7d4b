"""The serving engine on the 7B's shape: time to first token of short prompts, and many requests at a time."""

from __future__ import annotations

import queue
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.gpu.session import GpuSession
from benchmarks.gpu.sizes import Sizes
from benchmarks.registry import IncorrectError, Row, Step, Summary, Target
from hyaena.sampling import SamplingParams
from hyaena.serve.engine import Delta, Engine, EngineSettings, Request
from hyaena.sizes import ModelSizes
from hyaena.tokenizers import ByteTokenizer

IDLE = 0.02
"""Seconds between two requests to an idle engine."""
FIRST_TOKEN = 1.5
"""Time to first token over the larger of the bandwidth and the FLOP bound."""
ALONE = 8
"""Rows of the round before the requests that end some steps after one another, when all others have ended."""
REQUESTS = 1.3
"""Total time of all requests over the sum of the bounds of their prefill and their decoding."""


def engine(session: GpuSession) -> Iterator[Step]:
    """That requests do not disturb one another, then both figures."""
    yield Step("requests together and alone", partial(check, session))
    for length in session.sizes.first_tokens:
        yield Step(f"first token of {length} tokens", partial(first_token, session, length))
    yield Step("many requests", partial(requests, session))


@contextmanager
def running(session: GpuSession, **settings: object) -> Iterator[Engine]:
    """An engine over the session's model."""
    tokenizer = ByteTokenizer(session.sizes.config.vocab_size)
    made = Engine(session.model, tokenizer, EngineSettings(**settings))  # type: ignore[arg-type]
    made.start()
    try:
        yield made
    finally:
        made.stop(timeout=0)
        session.release()


def submit(engine: Engine, prompt: list[int], count: int) -> queue.SimpleQueue[Delta]:
    """A greedy request; where its tokens come."""
    tokens: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    engine.submit(Request(prompt=prompt, params=SamplingParams(), max_new_tokens=count), tokens.put)
    return tokens


def collect(tokens: queue.SimpleQueue[Delta]) -> list[Delta]:
    """All tokens of a request."""
    deltas = []
    while not deltas or deltas[-1].finish_reason is None:
        deltas.append(tokens.get(timeout=300))
        if deltas[-1].error:
            raise IncorrectError(deltas[-1].error)
    return deltas


def check(session: GpuSession) -> Iterator[Row]:
    """Deterministic requests give bitwise the same log-probabilities together as alone.

    Raises:
        IncorrectError: they do not.
    """
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (5, 70, 200)]
    found = []
    for together in (False, True):
        with running(session, deterministic=True, chunk=128, kv_bytes=2**30) as made:
            if together:
                rows = [collect(tokens) for tokens in [submit(made, prompt, 8) for prompt in prompts]]
            else:
                rows = [collect(submit(made, prompt, 8)) for prompt in prompts]
        found.append([[(delta.token, delta.logprob) for delta in row] for row in rows])
    if found[0] != found[1]:
        raise IncorrectError(f"requests together are not what they are alone: {found}")
    return iter(())


def first_token(session: GpuSession, length: int) -> list[Row]:
    """From a request to its first token, on an idle engine."""
    sizes = ModelSizes(session.sizes.config)
    rng = random.Random(length)
    times = []
    with running(session, snapshot_bytes=0) as made:
        for _ in range(8):
            prompt = [rng.randrange(256) for _ in range(length)]
            began = time.perf_counter()
            tokens = submit(made, prompt, 2)
            tokens.get(timeout=300)
            times.append(time.perf_counter() - began)
            tokens.get(timeout=300)
            time.sleep(IDLE)
    times = times[3:]  # the first ones compile
    weights = sizes.weight_bytes(session.dtype.itemsize)
    bound = max(weights / session.bandwidth.median, sizes.prefill_flops(length) / session.flops.median)
    return [
        Row(
            what=f"time to first token, prompt of {length} tokens, idle engine",
            unit="s",
            ours=Summary.of(times),
            baseline_name="the larger of reading all weights and the prefill's operations",
            baseline=Summary.of([bound]),
            ratio=Summary.of(t / bound for t in times),
            ratio_name="ours / bound",
            target=Target("<=", FIRST_TOKEN),
        )
    ]


def request_shapes(sizes: Sizes) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the answer of every request, log-uniform."""
    count, prompt_range, answer_range = sizes.requests
    rng = random.Random(1)
    return [(_log_uniform(rng, *prompt_range), _log_uniform(rng, *answer_range)) for _ in range(count)]


def prompt_of(rng: random.Random, length: int) -> list[int]:
    """Random tokens."""
    return [rng.randrange(256) for _ in range(length)]


def time_requests(session: GpuSession, shapes: list[tuple[int, int]]) -> tuple[float, int]:
    """Seconds from the first request to the end of the last, all submitted together; and pre-emptions.

    Raises:
        IncorrectError: a request did not get its tokens.
    """
    rng, warm = random.Random(2), shapes[: session.sizes.rows + session.sizes.rows // 4]
    with running(session, max_rows=session.sizes.rows, max_waiting=len(shapes)) as made:
        # a round that compiles the kernels and captures the graphs of every number of rows: they end one by one
        counts = [2 + i % 32 + max(0, 8 * (i + 1 + ALONE - len(warm))) for i in range(len(warm))]
        for tokens in [submit(made, prompt_of(rng, n), new) for (n, _), new in zip(warm, counts, strict=True)]:
            collect(tokens)
        began = time.perf_counter()
        waiting = [submit(made, prompt_of(rng, n), new) for n, new in shapes]
        deltas = [collect(tokens) for tokens in waiting]
        seconds = time.perf_counter() - began
        preemptions = made.scheduler.preemptions
    if [len(row) for row in deltas] != [new for _, new in shapes]:
        raise IncorrectError("a request did not get its tokens")
    return seconds, preemptions


def requests(session: GpuSession) -> list[Row]:
    """Many requests, all submitted at the start: total time, and the bounds of their prefill and decoding."""
    count, prompt_range, answer_range = session.sizes.requests
    sizes, itemsize = ModelSizes(session.sizes.config), session.dtype.itemsize
    shapes = request_shapes(session.sizes)
    seconds, preemptions = time_requests(session, shapes)
    prefill = sum(sizes.prefill_flops(n) for n, _ in shapes) / session.flops.median
    written = sum(new for _, new in shapes)
    steps = written / session.sizes.rows
    weights = sizes.decode_bytes(0, 0, itemsize)
    rows = sum(new * (sizes.decode_bytes(1, n + new // 2, itemsize) - weights) for n, new in shapes)
    decoding = (steps * weights + rows) / session.bandwidth.median
    bound = prefill + decoding
    return [
        Row(
            what=f"{count} requests at once, prompts of {prompt_range[0]} to {prompt_range[1]:,} tokens, answers of "
            f"{answer_range[0]} to {answer_range[1]}, {session.sizes.rows} rows",
            unit="s",
            ours=Summary.of([seconds]),
            baseline_name="the sum of the bounds of prefill and decoding",
            baseline=Summary.of([bound]),
            ratio=Summary.of([seconds / bound]),
            ratio_name="ours / bound",
            target=Target("<=", REQUESTS),
            note=f"{written / seconds:,.0f} tokens written and {sum(n for n, _ in shapes) / seconds:,.0f} read a "
            f"second; bound of prefill {prefill:.1f} s, of decoding in full batches {decoding:.1f} s; {preemptions} "
            f"pre-emptions; mean answer {statistics.mean(new for _, new in shapes):.0f} tokens.",
        )
    ]


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(low * (high / low) ** rng.random())
