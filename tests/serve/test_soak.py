"""Many requests of all kinds at once: every answer is right, and afterwards nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from benchmarks.serve.client import Answer, post

import hyaena
from configs import TINY
from hyaena.model import StripedHyena
from hyaena.ops import PAGE
from hyaena.serve.service import Generation
from hyaena.sizes import ModelSizes
from hyaena.tokenizers import ByteTokenizer
from serve.clients import until
from serve.live import Live, live

MODEL = StripedHyena(replace(TINY, vocab_size=259, max_length=4096))
TOKENIZER = ByteTokenizer()
PAGES = 160
BROKEN = [b"{", b'{"prompt": 5}', b'{"prompt": "a", "n": 1000}', b'{"prompt": "a", "model": "none"}', b"\xff" * 50]


@dataclass
class Case:
    """A request and what it should get."""

    prompt: list[int]
    options: dict[str, Any]
    want: str
    body: dict[str, Any] = field(default_factory=dict)


def make_cases(count: int, rng: random.Random) -> list[Case]:
    stems = [[rng.randrange(32, 127) for _ in range(300)] for _ in range(4)]
    cases = []
    for i in range(count):
        prompt = rng.choice(stems)[: rng.choice([1, 20, 64, 150, 300])] + [rng.randrange(32, 127) for _ in range(i % 5)]
        options: dict[str, Any] = {"temperature": 0.0} if i % 2 else {"temperature": 0.8, "seed": i, "top_p": 0.9}
        tokens = rng.choice([1, 2, 5, 12, 30])
        found = hyaena.generate(MODEL, TOKENIZER, prompt, max_new_tokens=tokens, **options)
        cases.append(Case(prompt, options | {"max_tokens": tokens}, found.text))
    return cases


async def _ask(server: Live, case: Case | bytes, leave_after: float | None, stream: bool) -> tuple[Any, Answer]:
    if isinstance(case, bytes):
        return case, await post(server.port, case)
    body = {"prompt": case.prompt, **case.options, "stream": stream}
    return case, await post(server.port, body, leave_after=leave_after)


async def _soak(server: Live, cases: list[Case], count: int, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    places = asyncio.Semaphore(24)

    async def one() -> None:
        async with places:
            case: Case | bytes = rng.choice(BROKEN) if rng.random() < 0.05 else rng.choice(cases)
            leaves = not isinstance(case, bytes) and rng.random() < 1 / 3
            stream = rng.random() < 0.5
            case, answer = await _ask(server, case, rng.random() * 0.2 if leaves else None, stream)
            if isinstance(case, bytes):
                assert answer.status in {400, 404} and "error" in json.loads(answer.text)
                seen["malformed"] += 1
            elif not answer.whole:
                assert leaves, "an answer broke off"
                seen["left"] += 1
            else:
                assert answer.status == 200 and answer.error is None
                text = answer.text if stream else json.loads(answer.text)["choices"][0]["text"]
                assert text == case.want, (case.prompt, case.options)
                seen["right"] += 1

    await asyncio.gather(*(one() for _ in range(count)))
    return seen


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def own_threads() -> int:
    """Threads beside those of the event loop's pool, which grows with the work up to its bound."""
    return sum(not thread.name.startswith(("asyncio_", "uvloop_")) for thread in threading.enumerate())


def assert_nothing_left(server: Live) -> None:
    """No connection, task or request is known to the server any more."""

    def nothing() -> bool:
        gc.collect()
        state = server.server.server_state
        generations = [one for one in gc.get_objects() if type(one) is Generation]
        alive = any(one.served.engine is server.engine for one in generations)
        return not (state.connections or state.tasks or alive or server.engine._requests)

    until(nothing, "the end of all connections, tasks, generations and requests")


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=[pytest.mark.integration, pytest.mark.timeout(900)])]
)
def test_requests_of_all_kinds(count: int) -> None:
    rng = random.Random(7)
    cases = make_cases(24 if count < 1000 else 80, rng)
    pages = PAGES * ModelSizes(MODEL.config).page_bytes(PAGE, 4)
    with live(MODEL, kv_bytes=pages, snapshot_bytes=2**20, max_rows=16, chunk=128, max_waiting=64) as server:
        seen = asyncio.run(_soak(server, cases, count // 5, rng))  # what is made once
        server.wait_idle()
        gc.collect()
        threads, memory, files = own_threads(), resident(), len(os.listdir("/proc/self/fd"))
        seen += asyncio.run(_soak(server, cases, count - count // 5, rng))
        server.wait_idle()
        scheduler = server.engine.scheduler
        assert scheduler.pages.count == PAGES
        assert_nothing_left(server)
        assert own_threads() == threads and len(os.listdir("/proc/self/fd")) <= files + 2
        assert resident() - memory < 30e6
        scheduler.prefix.clear()
        assert scheduler.pages.free == PAGES and scheduler.prefix.snapshots == 0
        assert server.engine.alive
    assert sum(seen.values()) == count and seen["left"] > 0.1 * count and seen["right"] > 0.4 * count
    assert seen["malformed"] > 0.01 * count


@pytest.mark.parametrize("stream", [True, False])
def test_work_stops_with_the_step_in_which_its_client_leaves(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps({"prompt": "ab", "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    ended_at: list[int] = []
    with live(MODEL, kv_bytes=2**26, max_rows=16) as server:
        engine, done = server.engine, 0
        run, cancel = engine.runner.run, engine.cancel

        def counted(*arguments: Any) -> Any:
            nonlocal done
            found = run(*arguments)
            done += 1
            return found

        def noted(key: int) -> None:
            ended_at.append(done)
            cancel(key)

        monkeypatch.setattr(engine.runner, "run", counted)
        monkeypatch.setattr(engine, "cancel", noted)
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(server.connect()).sendall(head % len(data) + data)
            until(lambda: engine.scheduler.running == 12)
        server.wait_idle()
        assert len(ended_at) == 12 and done - max(ended_at) <= 2  # the turn under way and the next
        assert_nothing_left(server)
