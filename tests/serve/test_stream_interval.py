"""Streams whose tokens share events say what the whole answer says, and hold no token back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs import TINY
from hyaena.cli import main
from hyaena.errors import InputError
from hyaena.generation.stop_strings import StopStringFilter
from hyaena.model import StripedHyena
from hyaena.serve.answers import ChatAnswer, CompletionAnswer
from hyaena.serve.delivery import Delivery
from hyaena.serve.engine import Delta
from hyaena.serve.loading import ServerOptions
from hyaena.serve.logprobs import TextOffsets
from hyaena.serve.protocol import ChatBody, CompletionBody
from hyaena.serve.service import Choice, text_of
from hyaena.tokenizers import ByteTokenizer
from serve.clients import PATIENCE, once, until
from serve.live import Live, live

torch.manual_seed(0)
MODEL = StripedHyena(replace(TINY, vocab_size=259, max_length=8192))
SERVED: Any = SimpleNamespace(name="tiny", tokenizer=ByteTokenizer())
ASCII = {"allowed_token_ids": list(range(32, 127))}


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    with live(MODEL, stream_interval=0.05, kv_bytes=2**23) as server:
        yield server


def events(lines: Iterator[str]) -> Iterator[Any]:
    for line in filter(None, lines):
        if line == "data: [DONE]":
            return
        yield json.loads(line.removeprefix("data: "))


def ask(server: Live, path: str = "/v1/completions", **body: Any) -> Any:
    with server.client() as client:
        return client.post(path, json=body).raise_for_status().json()


def stream(server: Live, path: str = "/v1/completions", **body: Any) -> list[Any]:
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with server.client() as client, client.stream("POST", path, json=body) as answer:
        return list(events(answer.iter_lines()))


BODIES: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": 2, "return_token_ids": True},
    {"logprobs": 1, "echo": True, "return_token_ids": True, "n": 2},
    {"prompt": ["ab", "cd"], "logprobs": 0},
    {"stop": ["zq", "7"], "logprobs": 1, "return_token_ids": True, **ASCII},
    {"stop": "never \u00e9", "logprobs": 1, "return_token_ids": True, **ASCII},
    {"logprobs": 1, "return_token_ids": True, "allowed_token_ids": [0xC3, 0xA9, 0xE2, 0x82, 0xAC, 65]},
]


@pytest.mark.parametrize("options", BODIES, ids=lambda options: "+".join(options) or "plain")
def test_a_stream_says_what_the_whole_answer_says(shared: Live, options: dict[str, Any]) -> None:
    body = {"prompt": "ab", "max_tokens": 200, "temperature": 1.0, "seed": 3, "ignore_eos": True} | options
    want = ask(shared, **body)
    *parts, last = stream(shared, **body)
    assert last["usage"]["completion_tokens"] == want["usage"]["completion_tokens"]
    assert all(len(part["choices"]) == 1 for part in parts)
    mine = [
        [part["choices"][0] for part in parts if part["choices"][0]["index"] == i] for i in range(len(want["choices"]))
    ]
    for found, whole in zip(mine, want["choices"], strict=True):
        assert "".join(part["text"] for part in found) == whole["text"]
        assert [part["finish_reason"] for part in found] == [None] * (len(found) - 1) + [whole["finish_reason"]]
        if "logprobs" in options:
            for name in whole["logprobs"]:
                joined = list(itertools.chain.from_iterable(part["logprobs"][name] for part in found))
                if name in {"tokens", "text_offset"}:
                    assert joined == whole["logprobs"][name]
                assert len(joined) == len(whole["logprobs"][name])
        if "return_token_ids" in options:
            assert [token for part in found for token in part["token_ids"]] == whole["token_ids"]
            assert all(part["text"] == "".join(part["token_texts"]) for part in [*found, whole])
            assert all(len(part["token_ids"]) == len(part["token_texts"]) for part in [*found, whole])
    if "stop" not in options:
        assert {choice["finish_reason"] for choice in want["choices"]} == {"length"}


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_chat_says_what_the_whole_answer_says(shared: Live, logprobs: bool) -> None:
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 100, "seed": 1, "ignore_eos": True}
    body |= {"logprobs": True, "top_logprobs": 1} if logprobs else {}
    want = ask(shared, "/v1/chat/completions", **body)["choices"][0]
    first, *parts, last = stream(shared, "/v1/chat/completions", **body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["usage"]["completion_tokens"] == 100
    found = [part["choices"][0] for part in parts]
    assert "".join(part["delta"].get("content", "") for part in found) == want["message"]["content"]
    if logprobs:
        tokens = [entry["token"] for part in found for entry in part["logprobs"]["content"]]
        assert tokens == [entry["token"] for entry in want["logprobs"]["content"]]


def test_without_an_interval_every_token_has_an_event() -> None:
    with live(MODEL, stream_interval=0, kv_bytes=2**22) as server:
        *parts, _ = stream(server, prompt="ab", max_tokens=50, ignore_eos=True)
        assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * 49 + ["length"]


def test_the_first_token_and_the_end_wait_for_nothing() -> None:
    """Neither of a stream, nor of a whole answer, however long the interval is: a client would not wait so long."""
    with live(MODEL, stream_interval=10 * PATIENCE, kv_bytes=2**22) as server:
        ask(server, prompt="ab", max_tokens=8)
        *parts, last = stream(server, prompt="ab", max_tokens=8, ignore_eos=True)
        assert len(parts) <= 2 and last["usage"]["completion_tokens"] == 8
        messages = [{"role": "user", "content": "ab"}]
        *parts, last = stream(server, "/v1/chat/completions", messages=messages, max_tokens=8, ignore_eos=True)
        assert len(parts) <= 3 and last["usage"]["completion_tokens"] == 8  # the first one names the role
        with server.client() as client:
            answer = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 4000, "stream": True, "n": 2})
        assert answer.text.endswith("data: [DONE]\n\n")


def test_tokens_come_although_the_engine_stands_still() -> None:
    with live(MODEL, stream_interval=0.3, kv_bytes=2**23) as server, server.client() as client:
        body = {"prompt": "ab", "max_tokens": 8000, "stream": True, "ignore_eos": True, "return_token_ids": True}
        held, release = threading.Event(), threading.Event()
        with client.stream("POST", "/v1/completions", json=body) as answer:
            found = events(answer.iter_lines())
            count = len(next(found)["choices"][0]["token_ids"])
            server.engine.call(once(lambda: (held.set(), release.wait(PATIENCE))))
            assert held.wait(PATIENCE)
            (job,) = server.engine.scheduler.jobs.values()
            written = len(job.tokens) - job.prompt_length
            while count < written:  # it would wait for ever if one was held back
                count += len(next(found)["choices"][0]["token_ids"])
            assert count == written
            release.set()
        server.wait_idle()


def test_held_tokens_come_before_the_error_that_ends_a_stream() -> None:
    with live(MODEL, stream_interval=5, drain=0.3, kv_bytes=2**23) as server, server.client() as client:
        body = {"prompt": "ab", "max_tokens": 8000, "stream": True, "ignore_eos": True, "return_token_ids": True}
        written = 0
        fail = server.engine._fail

        def noted(active: Any, message: str) -> None:
            nonlocal written
            written = len(active.row.tokens)
            fail(active, message)

        server.engine._fail = noted  # type: ignore[method-assign]
        with client.stream("POST", "/v1/completions", json=body) as answer:
            found = events(answer.iter_lines())
            first = next(found)
            (job,) = server.engine.scheduler.jobs.values()
            until(lambda: len(job.tokens) - job.prompt_length > 1)
            server.server.end()
            *rest, error = found
        assert error["error"]["message"] == "the server is stopping"
        parts = [first, *rest]
        assert sum(len(part["choices"][0]["token_ids"]) for part in parts) == written > 1


def test_streams_that_are_left_with_held_tokens_leave_nothing() -> None:
    with live(MODEL, stream_interval=5, kv_bytes=2**23) as server, server.client() as client:
        body = {"prompt": "ab", "max_tokens": 8000, "stream": True, "ignore_eos": True, "n": 3}
        for _ in range(4):
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(events(answer.iter_lines()))
            server.wait_idle()
        until(lambda: not any(one._open for one in gc.get_objects() if type(one) is Delivery))


# --- forms ----------------------------------------------------------------------------------------------------------

BYTES = st.one_of(st.text().map(str.encode), st.binary())


def deltas_of(data: bytes, stops: tuple[str, ...], pieces: list[int]) -> list[Delta]:
    """The tokens of a text, as the engine gives them."""
    text, found = StopStringFilter(ByteTokenizer(), [1], stops), []
    for place, token in enumerate(data):
        shown, stopped = text.push(token)
        if stopped or place == len(data) - 1:
            rest, also = ("", False) if stopped else text.finish()
            return [*found, Delta(token, shown + rest, -1.0, ((token, -1.0),), "stop" if stopped or also else "length")]
        found.append(Delta(token, shown, -1.0, ((token, -1.0),)))
    return found


@given(BYTES.filter(len), st.lists(st.integers(1, 5), min_size=1), st.sampled_from([(), ("a",), ("ab", "\u00e9")]))
def test_cut_anywhere_events_say_the_same(data: bytes, cuts: list[int], stops: tuple[str, ...]) -> None:
    deltas = deltas_of(data, stops, cuts)
    for body in (
        CompletionBody(prompt="x", logprobs=1, return_token_ids=True),
        CompletionBody(prompt="x"),
        CompletionBody(prompt="x", return_token_ids=True),
    ):
        whole = json.loads(CompletionAnswer(SERVED, body, ()).part(Choice(0, [1]), deltas))
        answer, parts, start = CompletionAnswer(SERVED, body, ()), [], 0
        for size in itertools.cycle(cuts):
            if start >= len(deltas):
                break
            parts.append(json.loads(answer.part(Choice(0, [1]), deltas[start : start + size])))
            start += size
        assert "".join(part["text"] for part in parts) == whole["text"] == text_of(deltas)
        assert [part["finish_reason"] for part in parts][-1] == deltas[-1].finish_reason
        for name in ("token_ids", "token_texts"):
            assert whole.get(name, []) == [one for part in parts for one in part.get(name, [])]
        if body.logprobs is not None:
            for name, values in whole["logprobs"].items():
                assert values == [one for part in parts for one in part["logprobs"][name]]
    chat = ChatBody(messages=[{"role": "user", "content": "x"}])  # pyright: ignore[reportArgumentType]
    part = json.loads(ChatAnswer(SERVED, chat).part(Choice(0, [1]), deltas))
    assert part["delta"].get("content", "") == text_of(deltas)
    if len(deltas) > 1:
        part = json.loads(ChatAnswer(SERVED, chat).part(Choice(0, [1]), deltas[:-1]))
        assert part["delta"].get("content", "") == text_of(deltas[:-1]) and part["finish_reason"] is None


@given(st.text(min_size=1))
def test_a_token_begins_at_the_character_that_its_first_byte_belongs_to(text: str) -> None:
    offsets = TextOffsets(ByteTokenizer())
    found = [offsets.next(token) for token in text.encode()]
    assert found == [place for place, character in enumerate(text) for _ in character.encode()]


def test_a_character_that_the_prompt_began_is_the_first() -> None:
    offsets = TextOffsets(ByteTokenizer(), list("é".encode()[:1]))
    assert [offsets.next(token) for token in "é".encode()[1:] + b"ab"] == [0, 1, 2]


# --- the option -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "11", "1e99"])
def test_intervals_that_are_none_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["serve", "--stream-interval", value]))
    assert ended.value.code and "--stream-interval must be a number of seconds from 0 to 10" in capsys.readouterr().err
    with pytest.raises(InputError, match="stream_interval must be a number of seconds from 0 to 10"):
        ServerOptions(stream_interval=float(value))


@pytest.mark.parametrize(("wanted", "elsewhere"), [({"echo": True, "logprobs": 1}, True), ({"logprobs": 1}, False)])
def test_log_probabilities_of_a_prompt_do_not_stop_other_streams(
    shared: Live, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any], elsewhere: bool
) -> None:
    """They are written in a thread of their own; tokens alone in that of the event loop."""
    beside, part = set(), CompletionAnswer.part

    def watched(*args: Any) -> str:
        beside.add(asyncio._get_running_loop() is None)
        return part(*args)

    monkeypatch.setattr(CompletionAnswer, "part", watched)
    sent = stream(shared, prompt="abc", max_tokens=3, **wanted)
    count = sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in sent[:-1])
    assert count == 3 + 4 * elsewhere  # with a start token
    assert beside == {elsewhere}
