"""How fast ``hyaena serve`` answers on two cores: cub, on loopback, one client process beside the server's.

Both sides of a row are measured in turns on one running server. Prompts are bytes without meaning; no token ends one.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Iterable

import hyaena
from benchmarks.registry import IncorrectError, Row, Session, Step, Summary, Target, pairwise
from benchmarks.serve.client import Answer, post
from benchmarks.serve.process import ServerProcess, serving
from hyaena.adapters import add_adapter, save_adapter
from hyaena.sampling import SamplingParams
from hyaena.serve.engine import Delta, Engine, EngineSettings, Request

CHUNK = 512
"""Tokens of a pass over prompts on a CPU."""

_salts = itertools.count()


def throughput(session: Session) -> Iterable[Step]:
    """Many streams against one, and one stream against the engine without HTTP."""
    tokens, rounds = (8, 1) if session.quick else (96, 5)
    with serving("--quiet", "--kv-memory", "0.5") as server:
        yield Step("32 streams", lambda: [_many(server, tokens, rounds)])
        yield Step("one stream", lambda: [_bare(server, tokens, rounds)])


def beside(session: Session) -> Iterable[Step]:
    """A short request beside a long prompt."""
    length, part = (4096, 3072) if session.quick else (65_536, 8192)
    with serving("--quiet", "--kv-memory", "1", "--prefix-memory", "0.5") as server:
        yield Step("beside a long prompt", lambda: [_beside(server, length, part)])


def turns(session: Session) -> Iterable[Step]:
    """Second turns of long conversations."""
    scale = 32 if session.quick else 1
    with serving("--quiet", "--kv-memory", "1", "--prefix-memory", "0.5") as server:
        yield Step("second turn, 16k", lambda: [_turn(server, 16_384 // scale, 20, rounds=3)])
        yield Step("second turn, 100k", lambda: [_turn(server, 100_000 // scale, 150, rounds=1)])


def adapters(session: Session) -> Iterable[Step]:
    """Streams with an adapter against streams without, and streams over several adapters against one."""
    tokens, rounds = (8, 1) if session.quick else (64, 5)
    model, _ = hyaena.load("cub")
    add_adapter(model, rank=8)  # B is zero: the same text, computed with the adapter
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, base="cub")
        options = [f"--adapter=a{number}={folder}" for number in range(4)]
        with serving("--quiet", "--kv-memory", "0.5", *options) as server:
            yield Step("with adapters", lambda: _adapted(server, tokens, rounds))


def _prompt(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ()=:.,\n", k=length))


def _body(prompt: str, tokens: int, salt: str = "") -> dict[str, object]:
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "cache_salt": salt or str(next(_salts)),
    }


def _ask(server: ServerProcess, *bodies: dict[str, object]) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*(post(server.port, body) for body in bodies))

    answers = asyncio.run(all_of_them())
    for answer in answers:
        if answer.status != 200 or answer.error or not answer.whole:
            raise IncorrectError(f"a request failed: {answer.status} {answer.error}")
    return answers


def _rate(answers: list[Answer]) -> float:
    """Tokens per second of all streams, from the first request to the last token."""
    seconds = max(a.times[-1] for a in answers) - min(a.began for a in answers)
    return sum(a.tokens for a in answers) / seconds


def _many(server: ServerProcess, tokens: int, rounds: int) -> Row:
    one, many = [], []
    _ask(server, _body("warm", 4))
    for turn in range(rounds):
        one.append(_rate(_ask(server, _body(_prompt(16, turn), tokens))))
        many.append(_rate(_ask(server, *(_body(_prompt(16, 32 * turn + i), tokens) for i in range(32)))))
    return Row(
        what=f"32 streams of {tokens} tokens, all together",
        unit="tokens/s",
        ours=Summary.of(many),
        baseline_name="one stream",
        baseline=Summary.of(one),
        ratio=pairwise(many, one),
        ratio_name="32 streams / one",
        target=Target(">=", 8),
    )


def _adapted(server: ServerProcess, tokens: int, rounds: int) -> list[Row]:
    """16 streams of the model alone, of one adapter, and over four."""
    spread = {"none": ["cub"], "one": ["a0"], "four": ["a0", "a1", "a2", "a3"]}
    rates: dict[str, list[float]] = {name: [] for name in spread}
    for turn in range(rounds + 1):
        texts = []
        for name, models in spread.items():
            bodies = [_body(_prompt(16, i), tokens) | {"model": models[i % len(models)]} for i in range(16)]
            answers = _ask(server, *bodies)
            texts.append([answer.text for answer in answers])
            if turn:  # the first is a warm-up
                rates[name].append(_rate(answers))
        if not texts[0] == texts[1] == texts[2]:
            raise IncorrectError("an adapter that changes nothing changed a text")

    def row(what: str, ours: str, other: str, other_name: str) -> Row:
        return Row(
            what=f"16 streams of {tokens} tokens, {what}",
            unit="tokens/s",
            ours=Summary.of(rates[ours]),
            baseline_name=other_name,
            baseline=Summary.of(rates[other]),
            ratio=pairwise(rates[ours], rates[other]),
            ratio_name=f"{ours} / {other}",
        )

    return [
        row("all with one adapter of rank 8", "one", "none", "without an adapter"),
        row("over four adapters of rank 8", "four", "one", "all with one adapter"),
    ]


def _bare(server: ServerProcess, tokens: int, rounds: int) -> Row:
    model, tokenizer = hyaena.load("cub", dtype="float32")
    engine = Engine(model, tokenizer, EngineSettings(kv_bytes=2**27))
    engine.start()
    http, bare = [], []
    try:
        for turn in range(2 * rounds + 1):
            prompt = _prompt(16, 1000 + turn)
            answers = _ask(server, _body(prompt, tokens))
            seconds, text = _generate(engine, tokenizer.encode(prompt), tokens)
            if turn:  # the first is a warm-up
                http.append(_rate(answers))
                bare.append(tokens / seconds)
            if answers[0].text != text:
                raise IncorrectError("the server and the engine wrote different texts")
    finally:
        engine.stop(timeout=0)
    return Row(
        what=f"one stream of {tokens} tokens through HTTP",
        unit="tokens/s",
        ours=Summary.of(http),
        baseline_name="the engine without HTTP",
        baseline=Summary.of(bare),
        ratio=pairwise(http, bare),
        ratio_name="HTTP / engine",
        target=Target(">=", 0.9),
    )


def _generate(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, str]:
    done, parts = threading.Event(), []

    def sink(delta: Delta) -> None:
        parts.append(delta.text)
        if delta.finish_reason is not None:
            done.set()

    began = time.perf_counter()
    request = Request(prompt=prompt, params=SamplingParams(), max_new_tokens=tokens, salt=str(next(_salts)))
    engine.submit(request, sink)
    done.wait()
    return time.perf_counter() - began, "".join(parts)


def _beside(server: ServerProcess, length: int, part: int) -> Row:
    """Short requests, one after another, while the last part of a long prompt is read: its passes take longest.

    What is before that part is read once, and is in the prefix cache afterwards.
    """
    before, salt = _prompt(length - part, 1), "beside"

    def long(number: int) -> dict[str, object]:
        return _body(before + _prompt(part, 10 + number), 1, salt)

    _ask(server, _body(before, 1, salt))
    alone = [_ask(server, long(number))[0].first for number in range(2)]
    chunk = min(alone) / -(-part // CHUNK)
    short: list[float] = []

    async def together() -> Answer:
        reading = asyncio.ensure_future(post(server.port, long(2)))
        await asyncio.sleep(chunk)
        while not reading.done() and len(short) < 100:
            answer = await post(server.port, _body(_prompt(20, len(short)), 1))
            if not reading.done():
                short.append(answer.first)
            await asyncio.sleep(random.random() * 2 * chunk)
        return await reading

    if not asyncio.run(together()).whole or not short:
        raise IncorrectError("the long prompt did not end, or was too short to measure beside it")
    return Row(
        what=f"time to first token of 20 bytes while the last {part} of {length} bytes are read",
        unit="s",
        ours=Summary.of(short),
        baseline_name=f"a pass over {CHUNK} of these bytes alone",
        baseline=Summary.of(value / -(-part // CHUNK) for value in alone),
        ratio=Summary.of(value / chunk for value in short),
        ratio_name="first token / pass",
        target=Target("<=", 3),
    )


def _turn(server: ServerProcess, length: int, target: float, rounds: int) -> Row:
    """The second turn of a conversation against the first one, for which nothing is cached.

    The prompt of the second turn is longer, so that the ratio is rather too small. In all rounds but the last it is
    also read where nothing is cached, and must get the same answer.
    """
    warm, cold = [], []
    for turn in range(rounds):
        salt = f"turn {length} {turn}"
        prompt = _prompt(length, turn)
        first = _ask(server, _body(prompt, 16, salt))[0]
        cold.append(first.first)
        second = prompt + first.text + "\nmore of it\n"
        repeated = [_ask(server, _body(f"{second}{i}", 4, salt))[0] for i in range(3)]
        warm.append(sorted(answer.first for answer in repeated)[1])
        if turn < rounds - 1 and _ask(server, _body(f"{second}0", 4))[0].text != repeated[0].text:
            raise IncorrectError("a hit in the prefix cache changed the answer")
    return Row(
        what=f"time to first token of a second turn, {length} bytes of history",
        unit="s",
        ours=Summary.of(warm),
        baseline_name="the first turn",
        baseline=Summary.of(cold),
        ratio=pairwise(cold, warm),
        ratio_name="first / second turn",
        target=Target(">=", target),
    )
