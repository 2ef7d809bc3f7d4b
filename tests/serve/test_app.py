"""The HTTP interface, in process: forms of answers, errors, streams."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

import hyaena
from hyaena.sampling import SamplingParams
from hyaena.serve.answers import CompletionAnswer
from hyaena.serve.app import Server, make_app
from hyaena.serve.conversation import ChatTemplate
from hyaena.serve.engine import Engine, EngineSettings
from hyaena.serve.engine import Request as EngineRequest
from hyaena.serve.guards import OPEN_PATHS
from hyaena.serve.metrics import Metrics
from hyaena.serve.playground import FILES
from hyaena.serve.service import Limits, Served
from hyaena.serve.writing import _event
from hyaena.tokenizers.chat import TEMPLATES
from serve.clients import PATIENCE, once

KEY = "a-key"


@pytest.fixture(scope="module")
def cub() -> tuple[Any, Any]:
    return hyaena.load("cub", dtype="float32")


@pytest.fixture(scope="module")
def client(cub: tuple[Any, Any]) -> Iterator[TestClient]:
    model, tokenizer = cub
    metrics = Metrics()
    engine = Engine(model, tokenizer, EngineSettings(max_waiting=8, kv_bytes=2**26), metrics)
    engine.start()
    served = Served(name="cub", engine=engine, tokenizer=tokenizer)
    chat = Served(name="chat", engine=engine, tokenizer=tokenizer, template=ChatTemplate(TEMPLATES["nous"]))
    limits = Limits(body_bytes=100_000, new_tokens=500, score_tokens=2000)
    app = make_app(Server([served, chat], metrics, limits))
    with TestClient(app, raise_server_exceptions=False) as test:
        yield test
    engine.stop(timeout=PATIENCE)


def events(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def complete(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"prompt": "import ", "max_tokens": 6, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion_is_what_generate_gives(client: TestClient, cub: tuple[Any, Any]) -> None:
    want = hyaena.generate(*cub, "import ", max_new_tokens=6, logprobs=3)
    answer = complete(client, logprobs=3)
    (choice,) = answer["choices"]
    assert choice["text"] == want.text and choice["finish_reason"] == "length" and choice["index"] == 0
    assert answer["usage"]["prompt_tokens"] == 8 and answer["usage"]["completion_tokens"] == 6
    assert answer["object"] == "text_completion" and answer["model"] == "cub" and answer["id"].startswith("cmpl-")
    logprobs = choice["logprobs"]
    torch.testing.assert_close(logprobs["token_logprobs"], want.logprobs, atol=1e-4, rtol=1e-4)
    assert "".join(logprobs["tokens"]) == want.text
    assert all(3 <= len(top) <= 4 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"] == list(range(6))


def test_several_prompts_and_samples_are_numbered(client: TestClient, cub: tuple[Any, Any]) -> None:
    answer = complete(client, prompt=["import ", "def f("], n=2, temperature=0.8, seed=5)
    assert sorted(choice["index"] for choice in answer["choices"]) == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    want = hyaena.generate(*cub, "import ", max_new_tokens=6, temperature=0.8, seed=5, n=2)
    assert texts[:2] == [one.text for one in want]
    assert complete(client, prompt=["import ", "def f("], n=2, temperature=0.8, seed=5)["choices"] == answer["choices"]
    again = ["def f(", "import ", "def f("]  # samples of a prompt that is there twice are as independent as others
    found = hyaena.generate(*cub, again, max_new_tokens=6, temperature=2.0, seed=5, n=2)
    rows = [one.text for samples in found for one in samples]
    assert rows[:2] != rows[4:]
    assert [one["text"] for one in complete(client, prompt=again, n=2, temperature=2, seed=5)["choices"]] == rows
    assert answer["usage"]["prompt_tokens"] == 8 + 7 and answer["usage"]["completion_tokens"] == 24


def test_ids_are_a_prompt(client: TestClient) -> None:
    ids = client.post("/tokenize", json={"prompt": "import "}).json()
    assert ids["count"] == 8
    assert complete(client, prompt=ids["tokens"])["choices"] == complete(client)["choices"]
    assert client.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "import "}


def test_a_stream_has_the_same_text(client: TestClient) -> None:
    whole = complete(client, logprobs=1, n=2, temperature=0.9, seed=1)
    body = {"prompt": "import ", "max_tokens": 6, "temperature": 0.9, "seed": 1, "n": 2, "logprobs": 1, "stream": True}
    response = client.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last = events(response)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in parts if p["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + ["length"]
        for key in ("tokens", "token_logprobs", "text_offset"):
            joined = [value for part in mine for value in part["logprobs"][key]]
            if key == "token_logprobs":
                torch.testing.assert_close(joined, choice["logprobs"][key], atol=1e-4, rtol=1e-4)
            else:
                assert joined == choice["logprobs"][key]


def test_echo_with_logprobs_scores_the_prompt(client: TestClient, cub: tuple[Any, Any]) -> None:
    model, tokenizer = cub
    answer = complete(client, echo=True, logprobs=1, max_tokens=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"].startswith("import ") and len(logprobs["tokens"]) == 9
    ids = tokenizer.encode("import ")
    with torch.inference_mode():
        want = model(torch.tensor([ids])).log_softmax(-1)[0]
    assert logprobs["token_logprobs"][0] is None
    for place, token in enumerate(ids[1:], 1):
        assert logprobs["token_logprobs"][place] == pytest.approx(float(want[place - 1, token]), abs=1e-4)
        best = max(logprobs["top_logprobs"][place].values())
        assert best == pytest.approx(float(want[place - 1].max()), abs=1e-4)
    assert complete(client, echo=True, max_tokens=0)["choices"][0]["text"] == "import "


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_without_new_tokens_is_a_stream(client: TestClient, logprobs: int | None) -> None:
    body = {"prompt": ["import ", "a"], "n": 2, "echo": True, "max_tokens": 0, "logprobs": logprobs}
    whole = complete(client, **body)
    assert whole["usage"]["prompt_tokens"] == 8 + 2 and whole["usage"]["completion_tokens"] == 0
    response = client.post("/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last = events(response)
    assert [part["choices"][0] for part in parts] == whole["choices"] and last["usage"] == whole["usage"]
    assert [choice["text"] for choice in whole["choices"]] == ["import ", "import ", "a", "a"]
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}


def test_ids_come_with_logprobs_where_asked(client: TestClient) -> None:
    (choice,) = complete(client, logprobs=3, return_token_ids=True, echo=True)["choices"]
    logprobs = choice["logprobs"]
    ids = client.post("/tokenize", json={"prompt": choice["text"]}).json()["tokens"]
    assert choice["token_ids"] == ids
    assert logprobs["top_token_ids"][0] is None
    for top, numbers, name, token in zip(
        logprobs["top_logprobs"][1:], logprobs["top_token_ids"][1:], logprobs["tokens"][1:], ids[1:], strict=True
    ):
        assert top.keys() == numbers.keys() and numbers[name] == token
        assert all(chr(number) == text for text, number in numbers.items() if len(text) == 1)
    body = {"prompt": "import ", "max_tokens": 6, "temperature": 0, "stream": True, "return_token_ids": True}
    parts = events(client.post("/v1/completions", json=body))
    parts = [part["choices"][0] for part in parts]
    assert [token for part in parts for token in part["token_ids"]] == ids[8:]
    assert all(part["text"] == "".join(part["token_texts"]) for part in parts)
    assert all(len(part["token_texts"]) == len(part["token_ids"]) for part in parts)
    assert "token_ids" not in complete(client, logprobs=1)["choices"][0]


def test_the_playground_is_open_and_loads_nothing_foreign(client: TestClient) -> None:
    page = client.get("/").text
    for path, (_, kind) in FILES.items():
        response = client.get(path)
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert path in OPEN_PATHS
        assert "//" not in response.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {f"/{name}" for name in named} <= set(FILES)
    folder = Path(str(resources.files("hyaena.serve") / "static"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(name for name, _ in FILES.values())
    models = client.get("/v1/models").json()["data"]
    assert [model["takes_chats"] for model in models] == [False, True]


def test_stops_and_biases(client: TestClient) -> None:
    text = complete(client, max_tokens=40)["choices"][0]["text"]
    stop = text[10:13]
    answer = complete(client, max_tokens=40, stop=stop)["choices"][0]
    assert answer["text"] == text[: text.index(stop)] and answer["finish_reason"] == "stop"
    biased = complete(client, max_tokens=3, logit_bias={str(ord("q")): 100})["choices"][0]["text"]
    assert biased == "qqq"
    allowed = complete(client, max_tokens=5, allowed_token_ids=[ord(c) for c in "ACGT"])["choices"][0]["text"]
    assert set(allowed) <= set("ACGT")


def test_chats(client: TestClient, cub: tuple[Any, Any]) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi</s>"}], "max_tokens": 5, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 2}).json()
    want = hyaena.generate(*cub, "### Instruction:\nHi</s>\n\n### Response:\n", max_new_tokens=5)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    assert len(choice["logprobs"]["content"]) == 5 and len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    streamed = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in streamed) == want.text
    tokens = client.post("/tokenize", json={"model": "chat", "messages": body["messages"]}).json()
    assert tokens["count"] == len("### Instruction:\nHi</s>\n\n### Response:\n") + 1


def test_a_model_without_a_template_takes_no_chats(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert response.status_code == 400 and response.json()["error"]["code"] == "no_chat_template"


def test_embeddings_and_scores(client: TestClient, cub: tuple[Any, Any]) -> None:
    texts = ["import os", "x"]
    data = client.post("/v1/embeddings", json={"input": texts, "encoding_format": "float"}).json()["data"]
    want = hyaena.embed(*cub, texts)
    torch.testing.assert_close(torch.tensor([d["embedding"] for d in data]), torch.tensor(want), atol=1e-4, rtol=1e-3)
    scored = client.post("/score", json={"input": texts, "per_token": True}).json()["data"]
    scores = hyaena.score(*cub, texts)
    assert scored[0]["sum"] == pytest.approx(float(scores[0].sum), rel=1e-4)
    assert scored[0]["logprobs"][0] == pytest.approx(-1.3572, abs=1e-3)  # after the token that begins a text
    assert len(scored[0]["ranks"]) == len("import os")
    both = client.post("/score", json={"input": "ACGTAC", "per_token": True, "both_strands": True}).json()["data"][0]
    assert both["ranks"] is None and len(both["logprobs"]) == 6
    assert both["sum"] == pytest.approx(hyaena.score(*cub, "ACGTAC", both_strands=True).sum, rel=1e-4)


def test_information(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/version").json() == {"version": hyaena.__version__}
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["cub", "chat"] and client.get("/v1/models/cub").json()["max_model_len"] > 1000
    text = client.get("/metrics").text
    assert "hyaena:generation_tokens_total" in text and "hyaena:time_to_first_token_seconds_bucket" in text
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert "/v1/completions" in client.get("/openapi.json").json()["paths"]


BAD_BODIES: list[tuple[str, Any, int]] = [
    ("/v1/completions", {"prompt": 5}, 400),
    ("/v1/completions", {}, 400),
    ("/v1/completions", [], 400),
    ("/v1/completions", None, 400),
    ("/v1/completions", {"prompt": []}, 400),
    ("/v1/completions", {"prompt": "", "add_special_tokens": False}, 400),
    ("/v1/completions", {"prompt": [[]]}, 400),
    ("/v1/completions", {"prompt": [1, "a"]}, 400),
    ("/v1/completions", {"prompt": [-1]}, 400),
    ("/v1/completions", {"prompt": [10**9]}, 400),
    ("/v1/completions", {"prompt": [1.5]}, 400),
    ("/v1/completions", {"prompt": [True]}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": "5"}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1.5}, 400),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400),
    ("/v1/completions", {"prompt": "a", "top_p": 2}, 400),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400),
    ("/v1/completions", {"prompt": "a", "n": 10**6}, 400),
    ("/v1/completions", {"prompt": "a", "logprobs": 10**6}, 400),
    ("/v1/completions", {"prompt": "a", "logprobs": True}, 400),
    ("/v1/completions", {"prompt": "a", "best_of": 2}, 400),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400),
    ("/v1/completions", {"prompt": "a", "presence_penalty": 0.5}, 400),
    ("/v1/completions", {"prompt": "a", "colour": "red"}, 400),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, 400),
    ("/v1/completions", {"prompt": "a", "stop": 5}, 400),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [5, 9999]}, 400),
    ("/v1/completions", {"prompt": "a", "seed": -1}, 400),
    ("/v1/completions", {"prompt": "a", "seed": 2**70}, 400),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"5": 1e9}}, 400),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}, 400),
    ("/v1/completions", {"prompt": "a", "logit_bias": [1]}, 400),
    ("/v1/completions", {"prompt": "a", "stream": "yes"}, 400),
    ("/v1/completions", {"prompt": "a", "stream_options": {"x": 1}}, 400),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"5": 1, "005": 2}}, 400),
    ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404),
    ("/v1/completions", {"prompt": "a" * 60_000, "max_tokens": 400, "echo": True, "logprobs": 1}, 400),
    ("/v1/completions", {"prompt": "\ud800"}, 400),
    ("/v1/chat/completions", {"model": "chat", "messages": []}, 400),
    ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "god", "content": "x"}]}, 400),
    ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user"}]}, 400),
    ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": None}]}, 400),
    ("/v1/chat/completions", {"model": "chat", "messages": "hi"}, 400),
    (
        "/v1/chat/completions",
        {
            "model": "chat",
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        },
        400,
    ),
    (
        "/v1/chat/completions",
        {"model": "chat", "messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        400,
    ),
    ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400),
    (
        "/v1/chat/completions",
        {"model": "chat", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
        400,
    ),
    ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}, 400),
    ("/v1/embeddings", {"input": ""}, 400),
    ("/v1/embeddings", {"input": "a", "layer": "nothing"}, 400),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, 400),
    ("/score", {"input": ["a", ""]}, 400),
    ("/score", {"input": "a" * 3000}, 400),
    ("/score", {"input": "hello", "both_strands": True}, 400),
    ("/tokenize", {}, 400),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, 400),
    ("/detokenize", {"tokens": [99999]}, 400),
    ("/detokenize", {"tokens": "x"}, 400),
    ("/nothing", {}, 404),
    ("/health", {}, 405),
]


@pytest.mark.parametrize(("path", "body", "status"), BAD_BODIES)
def test_bad_bodies_get_the_right_answer(client: TestClient, path: str, body: Any, status: int) -> None:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "\n" not in error["message"] and len(error["message"]) < 600


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (
            {"prompt": "a", "temprature": 1},
            "temprature",
            "temprature: It is not supported: did you mean temperature?",
        ),
        (
            {"prompt": "a", "stream": True, "stream_options": {"colour": 1}},
            "stream_options.colour",
            "stream_options.colour: It is not supported: leave it out",
        ),
        ({"prompt": "a", "\n{x}": 1}, "\\n{x}", "\\n{x}: It is not supported: leave it out"),
        ({}, "prompt", "prompt: Field required"),
    ],
)
def test_a_mistake_in_a_body_is_a_line_with_its_fix(client: TestClient, body: Any, param: str, message: str) -> None:
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == param and error["message"].startswith(message)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "temperature": 1e999}', 400),
        (b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
        (b'{"prompt": "' + b"a" * 200_000 + b'"}', 413),
        (b'{"prompt": "\xff"}', 400),
    ],
)
def test_broken_bodies_get_the_right_answer(client: TestClient, content: bytes, status: int) -> None:
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status and response.json()["error"]["message"]

    def pieces() -> Iterator[bytes]:  # chunked, so that no length is announced
        for start in range(0, len(content), 10_000):
            yield content[start : start + 10_000]

    response = client.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
    assert response.status_code == status and response.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_back(cub: tuple[Any, Any]) -> None:
    model, tokenizer = cub
    engine = Engine(model, tokenizer, EngineSettings(kv_bytes=2**24, max_waiting=2))
    engine.start()
    app = make_app(Server([Served(name="cub", engine=engine, tokenizer=tokenizer)], Metrics()))
    held = threading.Event()
    with TestClient(app) as test:
        engine.call(once(held.wait))  # the engine does nothing meanwhile
        for _ in range(2):
            engine.submit(EngineRequest(prompt=[5], params=SamplingParams(), max_new_tokens=1), lambda delta: None)
        response = test.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert response.status_code == 429 and response.headers["retry-after"]
        response = test.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "n": 3})
        assert response.status_code == 400 and "more than this server queues" in response.json()["error"]["message"]
        held.set()
        assert engine.stop(timeout=PATIENCE)


def test_every_event_is_one_line_for_every_client() -> None:
    text = "".join(map(chr, range(0x3000)))
    (line, end) = _event({"text": text}).splitlines()
    assert not end and json.loads(line.removeprefix("data: ")) == {"text": text}


def test_no_page_loads_anything_from_elsewhere(client: TestClient) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 404
    pages = []
    for route in client.app.routes:  # type: ignore[attr-defined]
        if "GET" in (getattr(route, "methods", None) or ()) and "{" not in route.path:
            answer = client.get(route.path)
            if "html" in answer.headers.get("content-type", ""):
                pages.append(route.path)
                assert "//" not in answer.text and "default-src 'none'" in answer.headers["content-security-policy"]
    assert pages == ["/"]
    assert "/v1/completions" in client.get("/openapi.json").json()["paths"]


def test_keys(cub: tuple[Any, Any]) -> None:
    model, tokenizer = cub
    engine = Engine(model, tokenizer, EngineSettings(kv_bytes=2**24))
    engine.start()
    server = Server([Served(name="cub", engine=engine, tokenizer=tokenizer)], Metrics())
    app = make_app(server, keys=[KEY], allow_origins=["http://a.example"])
    with TestClient(app) as test:
        assert test.get("/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer"}):
            response = test.get("/v1/models", headers=header)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert test.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        origin = {"Origin": "http://a.example", "Authorization": f"Bearer {KEY}"}
        for headers, status in (
            (origin, 200),
            (origin | {"Authorization": "Bearer schl\u00fcssel".encode()}, 401),
            (origin | {"Authorization": "Bearer wrong"}, 401),
            (origin | {"Content-Length": "9" * 15}, 413),
        ):
            answer = test.get("/v1/models", headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "http://a.example", "the page could not read it"
    engine.stop(timeout=PATIENCE)
    with TestClient(make_app(server)) as test:
        assert test.get("/health").status_code == 503
        assert test.post("/v1/completions", json={"prompt": "a"}).status_code == 503


def test_a_request_keeps_the_name_that_it_came_with(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    names = []
    with caplog.at_level("INFO", logger="hyaena.access"):
        for given in (None, "5f-a.B_1:/+=", "", "a b", "x" * 129, "<b>", "ü".encode()):
            answer = client.get("/version", headers={} if given is None else {"X-Request-Id": given})
            names += answer.headers.get_list("x-request-id")
    assert names[1] == "5f-a.B_1:/+=" and len(set(names)) == 7
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names[:1] + names[2:])
    lines = [json.loads(record.message) for record in caplog.records if record.name == "hyaena.access"]
    assert [line["request"] for line in lines] == names


def test_a_failure_of_a_route_is_an_answer_like_any_other(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyaena.serve.writing.completion_prompts", lambda *_: 1 / 0)
    with caplog.at_level("INFO", logger="hyaena.access"):
        answer = client.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "hyaena.access"]
    assert line["status"] == 500 and line["request"] == answer.headers["x-request-id"]


def test_a_stream_that_fails_ends_with_an_error(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    part, count = CompletionAnswer.part, itertools.count()
    monkeypatch.setattr(CompletionAnswer, "part", lambda *given: part(*given) if next(count) < 1 else 1 / 0)
    found = events(client.post("/v1/completions", json={"prompt": "a", "stream": True, "ignore_eos": True}))
    assert len(found) == 2 and found[1]["error"]["type"] == "server_error"


def test_logs_have_no_prompts(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="hyaena.access"):
        complete(client, prompt="a secret")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "hyaena.access"]
    assert lines[-1]["status"] == 200 and lines[-1]["path"] == "/v1/completions"
    assert "secret" not in caplog.text and not math.isnan(lines[-1]["seconds"])
