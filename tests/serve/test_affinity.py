"""Routing by prefix, without servers: which beginnings requests share, and where they go."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyaena.serve.affinity import BLOCK, MAX_BLOCKS, Affinity, beginnings


def starts(path: str = "/v1/completions", **body: Any) -> list[bytes]:
    return beginnings(path, json.dumps(body).encode())


def chat(*contents: Any) -> list[bytes]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return starts("/v1/chat/completions", messages=messages)


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300))
def test_prompts_share_the_beginnings_of_what_they_share(common: str, one: str, other: str) -> None:
    a, b = starts(prompt=common + one), starts(prompt=common + other)
    same = next((i for i, (x, y) in enumerate(zip(common + one, common + other, strict=False)) if x != y), None)
    shared = min(len(common + one), len(common + other)) if same is None else same
    assert len(a) == len(common + one) // BLOCK
    assert [x == y for x, y in zip(a, b, strict=False)] == [
        (i + 1) * BLOCK <= shared for i in range(min(len(a), len(b)))
    ]


def test_turns_of_a_conversation_begin_alike() -> None:
    first = chat("q" * 100)
    second = chat("q" * 100, "a" * 100, "and?" * 50)
    assert len(first) >= 1 and second[: len(first)] == first and len(second) > len(first)
    assert chat([{"type": "text", "text": "q" * 60}, {"type": "text", "text": "q" * 40}]) == first


def test_ids_lists_models_and_salts() -> None:
    ids = list(range(200))
    assert len(starts(prompt=ids)) == 3 and starts(prompt=[ids, [1]]) == starts(prompt=ids)
    assert starts(prompt=["x" * 100, "y"]) == starts(prompt="x" * 100)
    texts = [starts(prompt="x" * 64, **more) for more in ({}, {"model": "m"}, {"cache_salt": "s"}, {"model": "s"})]
    assert len({text[0] for text in texts}) == 4
    assert len(starts(prompt="x" * (BLOCK * MAX_BLOCKS + 999))) == MAX_BLOCKS


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", b'{"input": "x", "prompt": "%s"}' % (b"x" * 100)),
        ("/v1/completions", b""),
        ("/v1/completions", b"\xff"),
        ("/v1/completions", b"[" * 100_000),
        ("/v1/completions", b"[]"),
        ("/v1/completions", b'{"prompt": 5}'),
        ("/v1/completions", b'{"prompt": {"a": 1}}'),
        ("/v1/completions", b'{"messages": [5, {"content": null}]}'),
        ("/v1/completions", b'{"prompt": "\\ud800"}'),
    ],
)
def test_bodies_that_will_be_refused_have_no_beginning(path: str, body: bytes) -> None:
    assert beginnings(path, body) == []


def test_a_prompt_goes_where_its_longest_beginning_went() -> None:
    affinity: Affinity[str] = Affinity()
    one, other = chat("q" * 100), chat("q" * 100, "a" * 100, "x" * 200)
    affinity.began("1", one, "a")
    affinity.began("2", other, "b")
    for request, server in (("1", "a"), ("2", "b")):
        affinity.ended(request, server)
    assert affinity.rank(one, "abc")[0] == "b", "what both share went to b last"
    assert affinity.rank(chat("q" * 100, "a" * 100, "x" * 300), "abc")[0] == "b"
    assert affinity.rank(other, "ac")[0] in "ac", "b is gone"


def test_a_new_beginning_goes_to_the_server_with_the_fewest_requests_and_by_turns() -> None:
    affinity: Affinity[str] = Affinity()
    for number in range(30):
        text = starts(prompt=f"{number:>64}")
        affinity.began(str(number), text, affinity.rank(text, "abc")[0])
    assert Counter(map(len, affinity._running.values())) == {10: 3}
    cold = [starts(prompt=f"{number:>64}") for number in range(100, 200)]
    first = [Affinity[str]().rank(text, "abc")[0] for text in cold]
    assert first == [Affinity[str]().rank(text, "cab")[0] for text in cold], "two processes choose differently"
    assert set(first) == set("abc")


def test_a_busy_server_does_not_get_what_others_could_do_sooner() -> None:
    affinity: Affinity[str] = Affinity(slack=3)
    text = starts(prompt="x" * 64)
    went = []
    for number in range(12):
        went.append(affinity.rank(text, "ab")[0])
        affinity.began(str(number), text, went[-1])
        assert abs(len(affinity._running.get("a", ())) - len(affinity._running.get("b", ()))) <= 3
    assert len(set(went[:3])) == 1 and set(went) == {"a", "b"}
    affinity.lost("a")
    for number in range(12):
        affinity.ended(str(number), went[number])
    assert not any(affinity._running.values())


def test_the_least_recently_used_beginnings_are_forgotten() -> None:
    affinity: Affinity[str] = Affinity(capacity=2)
    texts = [starts(prompt=str(number) * 64) for number in range(3)]
    affinity.began("0", texts[0], "a")
    affinity.began("1", texts[1], "a")
    affinity.began("2", texts[0], "a")
    affinity.began("3", texts[2], "a")
    assert [text[0] in affinity._homes for text in texts] == [True, False, True]
