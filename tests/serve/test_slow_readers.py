"""What is written for clients that do not read it is bounded: streams wait for them, and answers have a length."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

import hyaena
from configs import TINY
from hyaena.model import StripedHyena
from hyaena.serve.delivery import Delivery
from hyaena.serve.engine import Engine
from hyaena.serve.protocol import ApiError, ChatBody, CompletionBody
from hyaena.serve.service import Generation, Limits, Served, new_tokens
from hyaena.tokenizers import ByteTokenizer
from serve.clients import PATIENCE, running, submit, until

MODEL = StripedHyena(replace(TINY, vocab_size=259))
PROMPT = list(range(40, 140))
MOST = 32
COUNT = 120


@pytest.fixture(autouse=True)
def _most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.serve.service.MOST_HELD", MOST)


def open_stream(engine: Engine, n: int = 1, top: int = 0) -> Generation:
    served = Served(name="tiny", engine=engine, tokenizer=ByteTokenizer())
    body = CompletionBody(prompt=PROMPT, n=n, seed=3, stream=True, ignore_eos=True)
    delivery = Delivery(asyncio.get_running_loop(), 0.02)
    return Generation(
        served, [PROMPT], body, top=top, limits=Limits(seconds=PATIENCE), delivery=delivery, max_new_tokens=COUNT
    )


async def paused(engine: Engine) -> None:
    """Wait until the engine has nothing to do."""
    scheduler = engine.scheduler
    await asyncio.to_thread(until, lambda: scheduler.jobs and scheduler.idle and not scheduler._active, "a pause")


async def read(generation: Generation) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in generation.choices]
    while parts := await generation.next():
        for choice, deltas in parts:
            found[choice.index] += [delta.token for delta in deltas if delta.token is not None]
    generation.close()
    return found


@pytest.mark.parametrize(("n", "top", "deterministic"), [(1, 0, False), (3, 3, False), (2, 0, True)])
def test_a_stream_waits_for_its_client(n: int, top: int, deterministic: bool) -> None:
    """Without a row and without pages, while others are served; then it goes on as if nothing had been."""
    options: Any = {"temperature": 1.0, "seed": 3, "stop_at_eos": False, "n": n}
    want = hyaena.generate(MODEL, ByteTokenizer(), PROMPT, max_new_tokens=COUNT, **options)

    async def late(engine: Engine) -> list[list[int]]:
        generation = open_stream(engine, n, top)
        await paused(engine)
        pages = engine.scheduler.pages
        assert pages.free == pages.count - engine.scheduler.prefix.cached_pages
        assert len(generation._inbox.items) <= MOST // (1 + top) + n
        assert engine.scheduler.waiting == n
        await asyncio.to_thread(submit(engine, [1, 2], count=3).wait)
        return await read(generation)

    with running(MODEL, chunk=128, deterministic=deterministic) as engine:
        assert asyncio.run(late(engine)) == [one.tokens for one in want]
        assert not engine.scheduler.jobs and not engine.scheduler.preemptions


@pytest.mark.parametrize("stops", [False, True])
def test_a_paused_stream_can_be_left_and_ended(stops: bool) -> None:
    async def leave(engine: Engine) -> None:
        generation = open_stream(engine, 2)
        await paused(engine)
        if not stops:
            generation.close()
            return
        ending = asyncio.create_task(asyncio.to_thread(engine.stop, 0.01))
        with pytest.raises(ApiError, match="the server is stopping"):
            while await generation.next():
                assert await ending is False
        generation.close()

    with running(MODEL, chunk=128) as engine:
        asyncio.run(leave(engine))
        until(lambda: not engine._requests and engine.scheduler.idle, "the end")
        pages = engine.scheduler.pages
        assert pages.free == pages.count - engine.scheduler.prefix.cached_pages


def test_a_paused_stream_is_finished_before_the_end() -> None:
    async def finish(engine: Engine) -> list[list[int]]:
        generation = open_stream(engine)
        await paused(engine)
        ending = asyncio.create_task(asyncio.to_thread(engine.stop, PATIENCE))
        await asyncio.to_thread(engine._stopping.wait)
        found = await read(generation)
        assert await ending
        return found

    with running(MODEL, chunk=128) as engine:
        (tokens,) = asyncio.run(finish(engine))
    assert len(tokens) == COUNT


def test_an_answer_that_is_no_stream_has_a_most_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.serve.service.MOST_WHOLE", 100)
    served: Any = type("Served", (), {"engine": type("Engine", (), {"max_length": 1000})})
    limits = Limits(new_tokens=200)

    def count(body: Any, prompts: int = 1, top: int = 0, default: int = 16) -> int:
        return new_tokens(served, body, [[1]] * prompts, top=top, limits=limits, default=default)

    assert count(CompletionBody(prompt="a", max_tokens=25, n=2), prompts=2) == 25
    assert count(CompletionBody(prompt="a", max_tokens=200, n=2, stream=True)) == 200
    assert count(ChatBody(messages=[{"role": "user", "content": "a"}], n=2), top=4, default=200) == 10
    for body, top in (
        (CompletionBody(prompt="a", max_tokens=51, n=2), 0),
        (CompletionBody(prompt="a", max_tokens=21), 4),
    ):
        with pytest.raises(ApiError, match="for a stream"):
            count(body, top=top)
