"""Adapters in one engine: a request gets what the model with its adapter gives it alone, whatever runs beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from benchmarks.serve.process import serving
from fastapi.testclient import TestClient
from torch import nn

import hyaena
from configs import TINY
from hyaena.adapters import Adapter, LoRALinear, adapter_of, add_adapter, save_adapter, with_adapter
from hyaena.cli import main
from hyaena.errors import CheckpointError, InputError
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.serve import loading
from hyaena.serve.app import Server, make_app
from hyaena.serve.conversation import ChatTemplate
from hyaena.serve.engine import Engine, EngineSettings, Request
from hyaena.serve.metrics import Metrics
from hyaena.serve.service import Served
from hyaena.tokenizers import ByteTokenizer
from hyaena.tokenizers.chat import TEMPLATES
from serve.clients import CONFIGS, PATIENCE, Client, alone, page_bytes, prompts, running, submit, until

NAMES = ("", "a", "b")


def put_adapter(model: StripedHyena, seed: int = 0, **options: Any) -> StripedHyena:
    """Put an adapter on a model that changes what it says."""
    torch.manual_seed(seed)
    add_adapter(model, **options)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)
    return model


def make(name: str, vocab_size: int = 256) -> tuple[StripedHyena, dict[str, Adapter], dict[str, StripedHyena]]:
    """A model, two adapters of it, and all three as models of their own."""
    config = replace(CONFIGS[name], vocab_size=vocab_size)
    model = StripedHyena(config).eval()
    adapters = {
        "a": adapter_of(put_adapter(StripedHyena(config), 1, rank=4)),
        "b": adapter_of(put_adapter(StripedHyena(config), 2, rank=2, targets=("down_proj", "qkv_proj"))),
    }
    return model, adapters, {"": model} | {key: with_adapter(model, adapter) for key, adapter in adapters.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_requests_with_and_without_adapters_get_what_they_get_alone(name: str, decoding: str) -> None:
    model, adapters, models = make(name)
    texts = prompts(5)
    settings = {"chunk": 128, "max_rows": 4, "decoding": decoding, "kv_bytes": 40 * page_bytes(model)}
    with running(model, adapters, **settings) as engine:
        clients = []
        for i, text in enumerate(text for text in texts for _ in NAMES):
            options = {"temperature": 0.9, "seed": i, "repetition_penalty": 1.1} if i % 2 else {}
            count = 1 if i % 5 == 4 else 5 + 6 * (i % 4)  # some end with their first token
            adapter = NAMES[i % 3]
            clients.append((adapter, text, options, submit(engine, text, count=count, adapter=adapter, **options)))
        results = []
        for adapter, text, options, client in clients:
            want = alone(models[adapter], text, count=len(client.wait().tokens), **options)
            assert client.reason == "length" and client.tokens == want.tokens
            torch.testing.assert_close(client.logprobs, want.logprobs, atol=1e-4, rtol=1e-4)
            results.append(client.logprobs[0])
        assert len(set(results)) > 2 * len(texts), "the adapters change nothing"
        pages = engine.scheduler.pages
        assert pages.free == pages.count - engine.scheduler.prefix.cached_pages


def test_a_prefix_is_used_again_with_its_own_adapter_only() -> None:
    model, adapters, models = make("sh")
    prompt = [*prompts(1, longest=300)[0], *range(200)]
    full = (len(prompt) - 1) // 64 * 64
    with running(model, adapters, chunk=128) as engine:
        for cached in (0, full):
            for name in NAMES:
                client = submit(engine, prompt, adapter=name).wait()
                assert client.deltas[0].cached_tokens == cached
                assert client.tokens == alone(models[name], prompt).tokens
        turn = [*prompt, *client.tokens, 5]  # of "b"
        assert submit(engine, turn, adapter="a").wait().deltas[0].cached_tokens == full
        assert submit(engine, turn, adapter="b").wait().tokens == alone(models["b"], turn).tokens


def test_pre_empted_requests_with_adapters_are_not_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.serve.scheduler.GROWTH_PAGES", 0)
    model, adapters, models = make("sh")
    texts = [text[:60] for text in prompts(6, longest=60)]
    with running(model, adapters, chunk=128, max_rows=6, kv_bytes=9 * page_bytes(model)) as engine:
        clients = [
            submit(engine, text, count=100, adapter=NAMES[i % 3], temperature=1.0, seed=i)
            for i, text in enumerate(texts)
        ]
        for i, (text, client) in enumerate(zip(texts, clients, strict=True)):
            want = alone(models[NAMES[i % 3]], text, count=100, temperature=1.0, seed=i)
            assert client.wait().tokens == want.tokens
        assert engine.scheduler.preemptions > 0


def test_deterministic_numbers_are_the_same_bit_for_bit_with_adapters() -> None:
    model, adapters, _ = make("sh")
    texts = [*prompts(2, longest=300), [9] * 300]
    cases = [(text, name) for text in texts for name in NAMES]
    settings = {"chunk": 128, "deterministic": True}

    def ask(engine: Engine, text: list[int], name: str) -> Client:
        return submit(engine, text, count=30, adapter=name, temperature=0.8, seed=3)

    want = []
    for case in cases:
        with running(model, adapters, **settings) as engine:
            want.append(ask(engine, *case).wait())
    with running(model, adapters, **settings, max_rows=5, kv_bytes=14 * page_bytes(model)) as engine:
        for _ in range(2):  # the second time with what the prefix cache has
            clients = [ask(engine, *case) for case in cases]
            for client, other in zip(clients, want, strict=True):
                assert client.wait().tokens == other.tokens
                assert client.logprobs == other.logprobs
        assert engine.scheduler.preemptions > 0
        again = ask(engine, *cases[-1]).wait()
        assert again.deltas[0].cached_tokens == 256 and again.logprobs == want[-1].logprobs


@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_cancelled_requests_with_adapters_leave_their_pages(decoding: str) -> None:
    model, adapters, models = make("sh")
    texts = prompts(9)
    with running(model, adapters, chunk=128, max_rows=4, decoding=decoding) as engine:
        clients = [submit(engine, text, 400 if i % 2 else 8, NAMES[i % 3]) for i, text in enumerate(texts)]
        for client in clients[1::2]:
            engine.cancel(client.key)  # type: ignore[attr-defined]
        for i, (text, client) in enumerate(zip(texts, clients, strict=True)):
            client.wait()
            if i % 2 == 0:
                assert client.tokens == alone(models[NAMES[i % 3]], text, count=8).tokens
        until(lambda: not engine.scheduler.jobs)
        pages = engine.scheduler.pages
        assert pages.free == pages.count - engine.scheduler.prefix.cached_pages


def test_an_adapter_that_is_unknown_or_of_another_model_is_refused() -> None:
    model, adapters, _ = make("sh")
    with running(model, adapters) as engine, pytest.raises(InputError, match="no adapter c"):
        engine.submit(Request(prompt=[1], params=SamplingParams(), max_new_tokens=1, adapter="c"), Client())
    other = adapter_of(put_adapter(StripedHyena(replace(TINY, vocab_size=256, hidden_size=32))))
    with pytest.raises(CheckpointError, match="another shape"):
        Engine(model, ByteTokenizer(), adapters={"c": other})


def test_an_adapter_of_another_model_is_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(put_adapter(StripedHyena(replace(TINY, vocab_size=256, hidden_size=32))), tmp_path)
    monkeypatch.setattr(loading.hub, "load", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(CheckpointError, match=r"another shape|does not have"):
        loading.load_server(loading.ServerOptions(adapters={"c": str(tmp_path)}))


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[tuple[TestClient, dict[str, StripedHyena]]]:
    model, adapters, models = make("sh", vocab_size=259)
    metrics = Metrics("base")
    engine = Engine(model, ByteTokenizer(), EngineSettings(), metrics, adapters)
    engine.start()
    base = Served(name="base", engine=engine, tokenizer=ByteTokenizer())
    served = [base, *(replace(base, name=name, adapter=name, parent="base") for name in adapters)]
    served[2] = replace(served[2], template=ChatTemplate(TEMPLATES["nous"]))
    with TestClient(make_app(Server(served, metrics))) as test:
        yield test, models
    engine.stop(timeout=PATIENCE)


def test_the_model_field_chooses_the_adapter(client: tuple[TestClient, dict[str, StripedHyena]]) -> None:
    test, models = client
    for name in ("base", "a", "b"):
        body = {"model": name, "prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        answer = test.post("/v1/completions", json=body).json()
        own = models["" if name == "base" else name]
        assert answer["model"] == name and answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["token_ids"] == alone(own, [1, 2, 3], 8).tokens
        scored = test.post("/score", json={"model": name, "input": "some text"}).json()["data"][0]
        assert scored["sum"] == pytest.approx(float(hyaena.score(own, ByteTokenizer(), ["some text"])[0].sum), rel=1e-4)
        vector = test.post("/v1/embeddings", json={"model": name, "input": "some text"}).json()["data"][0]["embedding"]
        want = hyaena.embed(own, ByteTokenizer(), ["some text"])[0]
        torch.testing.assert_close(torch.tensor(vector), torch.tensor(want), atol=1e-4, rtol=1e-3)
        echo = test.post("/v1/completions", json=body | {"echo": True, "logprobs": 0, "max_tokens": 0}).json()
        want = hyaena.score(own, ByteTokenizer(), [[1, 2, 3]])[0].logprobs
        torch.testing.assert_close(echo["choices"][0]["logprobs"]["token_logprobs"][1:], want[1:].tolist())
    long = [1] * (models["a"].config.max_length + 1)
    completion = {"prompt": long, "echo": True, "logprobs": 0, "max_tokens": 0}
    for path, body in (
        ("score", {"input": [long]}),
        ("v1/embeddings", {"input": long}),
        ("v1/completions", completion),
    ):
        error = test.post(f"/{path}", json=body).json()["error"]
        assert error["code"] == "context_length_exceeded", error
        assert "max_length" not in error["message"]  # a client cannot change it
    refused = test.post("/v1/completions", json={"model": "c", "prompt": "x"})
    assert refused.status_code == 404 and "this server has base, a, b" in refused.json()["error"]["message"]


def test_adapters_are_listed_under_their_model(client: tuple[TestClient, dict[str, StripedHyena]]) -> None:
    listed = client[0].get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"], model["root"]) for model in listed] == [
        ("base", None, "base"),
        ("a", "base", "base"),
        ("b", "base", "base"),
    ]
    assert [model["takes_chats"] for model in listed] == [False, False, True]
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answers = [client[0].post("/v1/chat/completions", json=chat | {"model": name}) for name in ("a", "b")]
    assert [answer.status_code for answer in answers] == [400, 200]


def test_metrics_tell_which_adapter(client: tuple[TestClient, dict[str, StripedHyena]]) -> None:
    test, _ = client
    test.post("/v1/completions", json={"model": "a", "prompt": [1, 2, 3, 4, 5], "max_tokens": 3})
    text = test.get("/metrics").text
    assert 'hyaena:time_to_first_token_seconds_count{model_name="a"}' in text
    assert 'hyaena:num_requests_running{model_name="base"}' in text
    assert "model_name" in next(line for line in text.splitlines() if line.startswith("hyaena:request_success_total"))
    samples = [line for line in text.splitlines() if line.startswith("hyaena:")]
    assert all("model_name=" in line for line in samples)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of cub: ``good``; ``chats`` with a template; and what cannot be used."""
    root = tmp_path_factory.mktemp("adapters")
    model = put_adapter(hyaena.load("cub", dtype="float32")[0], rank=2, targets=("down_proj",))
    for name in ("good", "chats", "ranks"):
        save_adapter(model, root / name, base="cub")
    (root / "chats" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    config = root / "ranks" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 3}))
    save_adapter(put_adapter(StripedHyena(TINY)), root / "other")
    (root / "empty").mkdir()
    return root


def test_the_command_serves_adapters(folders: Path) -> None:
    model, tokenizer = hyaena.load("cub", dtype="float32")
    options = ["--adapter", f"good={folders / 'good'}", "--adapter", f"org/chats={folders / 'chats'}"]
    with serving(*options, "--kv-memory", "0.05", environment={"OMP_NUM_THREADS": "1"}) as server:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=PATIENCE) as test:
            names = [(m["id"], m["parent"], m["takes_chats"]) for m in test.get("/v1/models").json()["data"]]
            assert names == [("cub", None, False), ("good", "cub", False), ("org/chats", "cub", True)]
            assert test.get("/v1/models/org/chats").json()["id"] == "org/chats"
            body = {"prompt": "import ", "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            got = {n: test.post("/v1/completions", json=body | {"model": n}).json() for n in ("cub", "good")}
        assert server.end() == 0
    own = {"cub": model, "good": with_adapter(model, folders / "good")}
    for name, answer in got.items():
        want = hyaena.generate(own[name], tokenizer, "import ", max_new_tokens=8)
        assert answer["choices"][0]["token_ids"] == want.tokens
    assert any("hyaena serves cub, good, org/chats at" in line for line in server.log)


BAD: list[tuple[list[str], str]] = [
    (["good"], "write NAME=FOLDER"),
    (["=good"], "write NAME=FOLDER"),
    (["x="], "write NAME=FOLDER"),
    (["x=good", "x=good"], "given twice"),
    (["cub=good"], "has the name of the model"),
    (["a b=good"], "no name for an adapter"),
    (["ü=good"], "no name for an adapter"),
    (["-x=good"], "no name for an adapter"),
    (["a\nb=good"], "no name for an adapter"),
    ([f"{'x' * 129}=good"], "no name for an adapter"),
    (["x=missing"], "no such folder: check the path"),
    (["x=empty"], "name the folder of a LoRA adapter"),
    (["x=ranks"], "take both files from one adapter"),
    (["x=good", "y=other"], "load the model that it was trained on"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=range(len(BAD)))
def test_adapters_that_cannot_be_served_are_refused_in_one_line(
    words: list[str], message: str, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders)
    assert main(["serve", "--port", "0", "--device", "cpu", *(f"--adapter={word}" for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
