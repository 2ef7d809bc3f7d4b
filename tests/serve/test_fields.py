"""Fields of requests: which are refused, in which words, and which are accepted though they have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from configs import TINY
from hyaena.model import StripedHyena
from hyaena.serve.app import Server, make_app
from hyaena.serve.conversation import ChatTemplate
from hyaena.serve.engine import Engine, EngineSettings
from hyaena.serve.metrics import Metrics
from hyaena.serve.service import Served
from hyaena.tokenizers import ByteTokenizer
from hyaena.tokenizers.chat import TEMPLATES
from serve.clients import PATIENCE


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    tokenizer = ByteTokenizer()
    engine = Engine(StripedHyena(replace(TINY, vocab_size=259)), tokenizer, EngineSettings(kv_bytes=2**22))
    engine.start()
    served = Served(name="tiny", engine=engine, tokenizer=tokenizer, template=ChatTemplate(TEMPLATES["nous"]))
    with TestClient(make_app(Server([served], Metrics()))) as test:
        yield test
    engine.stop(timeout=PATIENCE)


SAID = [
    ("/v1/completions", {"prompt": []}, "prompt: Give a text, a list of token ids, or"),
    ("/v1/completions", {"prompt": [1, -2]}, "prompt.1: Input should be greater"),
    ("/v1/completions", {"prompt": ["a", 2]}, "prompt.1: Input should be a valid string"),
    ("/v1/completions", {"prompt": [[1], "a"]}, "prompt.1: Input should be a valid list"),
    ("/v1/completions", {"prompt": None}, "prompt: Field required"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix: It is not supported: leave it out"),
    ("/v1/completions", {"prompt": "a", "frequency_penalty": -0.5}, "frequency_penalty: Only 0 is supported"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Give a text, or"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content.0.type: Input should be 'text'",
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools: Tools are not"),
    ("/v1/embeddings", {"input": "a", "layer": 1.5}, "layer: Give a number or a name"),
    ("/v1/responses", {"input": "a"}, "this server has no POST /v1/responses: /openapi.json"),
    ("/v1/models", {}, "this server has no POST /v1/models, but GET"),
]


@pytest.mark.parametrize(("path", "body", "said"), SAID)
def test_what_is_wrong_is_said_in_words_of_the_api(client: TestClient, path: str, body: Any, said: str) -> None:
    error = client.post(path, json=body).json()["error"]
    assert error["message"].startswith(said)
    assert error["param"] == (None if said.startswith("this") else said.partition(":")[0])


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (
            b"{",
            "application/json",
            "the body is no JSON: Expecting property name enclosed in double quotes at character 1",
        ),
        (
            b"[]",
            "application/json",
            "the body is no JSON object: send one, with the header Content-Type: application/json",
        ),
        (b"", "application/json", "the body is no JSON object"),
        (
            b'{"prompt": "a"}',
            "application/x-www-form-urlencoded",
            "the body is no JSON object",
        ),  # curl without a header
        (b'{"prompt": "\xff"}', "application/json", "the body cannot be read: send JSON in UTF-8, without compression"),
    ],
)
def test_bodies_that_are_no_json_object_are_told_so(client: TestClient, content: bytes, kind: str, said: str) -> None:
    error = client.post("/v1/completions", content=content, headers={"Content-Type": kind}).json()["error"]
    assert error["message"].startswith(said) and error["param"] is None


def test_values_that_ask_for_nothing_are_accepted(client: TestClient) -> None:
    """As newer clients send them, and a message as a client got it."""
    fields = {
        "store": False, "service_tier": "auto", "modalities": ["text"], "reasoning_effort": "none",
        "verbosity": "medium", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "safety_identifier": "a", "prompt_cache_key": "b", "user": "c",
        "audio": None, "function_call": None, "metadata": None, "presence_penalty": 0, "max_completion_tokens": 3,
        "stream_options": None,
    }  # fmt: skip
    answered = {"role": "assistant", "content": "x", "refusal": None, "annotations": None, "tool_calls": None}
    said = {"role": "user", "content": "y"}
    found = []
    for role, more in (("system", {}), ("developer", fields)):
        messages = [{"role": role, "content": "z"}, said, answered, said]
        body = {"messages": messages, "temperature": 0, "max_tokens": 3}
        found.append(client.post("/v1/chat/completions", json=body | more).json()["choices"])
    assert found[0] == found[1]
    options = {"include_usage": None, "include_obfuscation": False}
    body = {"prompt": "a", "max_tokens": 1, "stream": True, "stream_options": options}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_head_is_answered_where_get_is(client: TestClient) -> None:
    for path in ("/", "/health", "/version", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json"):
        assert client.head(path).status_code == 200
    assert client.head("/v1/completions").status_code == 405 and client.head("/v1/models/none").status_code == 404
    assert not any("head" in operations for operations in client.get("/openapi.json").json()["paths"].values())
