"""The engine over real models: every request gets what generate gives it alone."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from hyaena.decoding import ShortPasses
from hyaena.errors import CapacityError, InputError
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.serve.engine import Engine, EngineDeadError, EngineSettings, QueueFullError, Request
from hyaena.tokenizers import ByteTokenizer
from serve.clients import CONFIGS, PATIENCE, Client, alone, once, page_bytes, prompts, running, submit, until


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_requests_that_share_everything_get_what_they_get_alone(name: str, decoding: str) -> None:
    model = StripedHyena(CONFIGS[name])
    texts = prompts(12)
    with running(model, chunk=128, max_rows=4, decoding=decoding, kv_bytes=40 * page_bytes(model)) as engine:
        clients = []
        for i, text in enumerate(texts):
            options = {"temperature": 0.9, "seed": i, "top_p": 0.9} if i % 2 else {}
            clients.append((text, options, submit(engine, text, count=5 + 7 * (i % 3), **options)))
        for text, options, client in clients:
            want = alone(model, text, count=len(client.wait().tokens), **options)
            assert client.reason == "length" and client.tokens == want.tokens
            torch.testing.assert_close(client.logprobs, want.logprobs, atol=1e-4, rtol=1e-4)
        pages = engine.scheduler.pages
        assert pages.free == pages.count - engine.scheduler.prefix.cached_pages


def test_pre_empted_requests_are_not_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.serve.scheduler.GROWTH_PAGES", 0)
    model = StripedHyena(CONFIGS["sh"])
    texts = [text[:60] for text in prompts(6, longest=60)]
    with running(model, chunk=128, max_rows=6, kv_bytes=9 * page_bytes(model)) as engine:
        clients = [
            submit(engine, text, count=100, temperature=1.0, seed=i, repetition_penalty=1.1)
            for i, text in enumerate(texts)
        ]
        for i, (text, client) in enumerate(zip(texts, clients, strict=True)):
            want = alone(model, text, count=100, temperature=1.0, seed=i, repetition_penalty=1.1)
            assert client.wait().tokens == want.tokens
        assert engine.scheduler.preemptions > 0


def test_the_prefix_cache_spares_what_was_read_and_changes_nothing() -> None:
    model = StripedHyena(CONFIGS["sh"])
    prompt = prompts(1, longest=400)[0] + [7] * 300
    with running(model, chunk=128) as engine:
        cold = submit(engine, prompt).wait()
        hit = submit(engine, prompt).wait()
        turn = submit(engine, [*prompt, *cold.tokens, 5, 5]).wait()
        salted = Client()
        engine.submit(Request(prompt=prompt, params=SamplingParams(), max_new_tokens=2, salt="other"), salted)
        salted.wait()
    assert cold.deltas[0].cached_tokens == 0 and salted.deltas[0].cached_tokens == 0
    assert hit.deltas[0].cached_tokens == (len(prompt) - 1) // 64 * 64
    assert turn.deltas[0].cached_tokens >= (len(prompt) - 1) // 64 * 64
    assert hit.tokens == cold.tokens
    torch.testing.assert_close(hit.logprobs, cold.logprobs, atol=1e-5, rtol=1e-5)
    assert turn.tokens == alone(model, [*prompt, *cold.tokens, 5, 5]).tokens


def test_deterministic_numbers_are_the_same_bit_for_bit() -> None:
    model = StripedHyena(CONFIGS["sh"])
    texts = [*prompts(5, longest=300), [9] * 300]
    settings = {"chunk": 128, "deterministic": True}

    def lonely(text: list[int]) -> Client:
        with running(model, **settings) as engine:
            return submit(engine, text, count=40, temperature=0.8, seed=3).wait()

    want = [lonely(text) for text in texts]
    with running(model, **settings, max_rows=4, kv_bytes=12 * page_bytes(model)) as engine:
        for _ in range(2):  # the second time with what the prefix cache has
            clients = [submit(engine, text, count=40, temperature=0.8, seed=3) for text in texts]
            for client, other in zip(clients, want, strict=True):
                assert client.wait().tokens == other.tokens
                assert client.logprobs == other.logprobs
        assert engine.scheduler.preemptions > 0
        assert any(client.deltas[0].cached_tokens for client in clients)


def test_cancelled_requests_leave_their_pages_and_disturb_nobody() -> None:
    model = StripedHyena(CONFIGS["sh"])
    texts = prompts(8)
    with running(model, chunk=128, max_rows=3) as engine:
        clients = [submit(engine, text, count=400 if i % 2 else 8) for i, text in enumerate(texts)]
        for i, client in enumerate(clients):
            if i % 2:
                engine.cancel(client.key)  # type: ignore[attr-defined]
        for i, (text, client) in enumerate(zip(texts, clients, strict=True)):
            client.wait()
            if i % 2:
                assert client.reason in ("cancelled", "length")
            else:
                assert client.tokens == alone(model, text, count=8).tokens
        pages = engine.scheduler.pages
        until(lambda: not engine.scheduler.jobs)
        assert pages.free == pages.count - engine.scheduler.prefix.cached_pages


def test_a_prompt_is_not_copied_for_every_sample() -> None:
    """What is done before the engine's thread has a sample is done by the thread of all streams."""
    read: list[int] = []

    class Noting(ByteTokenizer):
        def _piece(self, token: int) -> bytes:
            read.append(token)
            return super()._piece(token)

    request = Request(prompt=[5] * 1000, params=SamplingParams(), max_new_tokens=1)
    with running(StripedHyena(CONFIGS["sh"])) as engine:
        engine.tokenizer = Noting()
        release = threading.Event()
        engine.call(once(release.wait))
        clients = [Client() for _ in range(8)]
        for client in clients:
            engine.submit(request, client)
        looked_at = len(read)
        release.set()
        for client in clients:
            client.wait()
    assert looked_at <= 8 * 2 * 3, "more than what may be of the same character"


def test_metrics_count_what_was_read_and_spared_of_requests_that_are_cancelled() -> None:
    prompt = [7] * 200
    with running(StripedHyena(CONFIGS["sh"]), chunk=128, max_rows=1) as engine:
        submit(engine, prompt, count=1).wait()

        def counted(name: str) -> float | None:
            return engine.metrics.registry.get_sample_value(f"hyaena:{name}_total", {"model_name": "model"})

        begun = threading.Event()
        request = Request(prompt=prompt, params=SamplingParams(), max_new_tokens=5000)
        ends: list[Client] = [Client(), Client()]
        key = engine.submit(request, lambda delta: (begun.set(), ends[0](delta)))  # type: ignore[func-returns-value, arg-type]
        assert begun.wait(PATIENCE)
        waiting = engine.submit(request, ends[1])
        for one, end in ((waiting, ends[1]), (key, ends[0])):
            engine.cancel(one)
            assert end.wait().reason == "cancelled"
        assert counted("prompt_tokens") == counted("prefix_cache_queries") == 400, "one was never looked at"
        assert counted("prefix_cache_hits") == 192


def test_a_request_with_nan_ends_alone() -> None:
    model = StripedHyena(CONFIGS["sh"])
    with torch.no_grad():
        model.embed_tokens.weight[255] = torch.nan
    with running(model, chunk=128) as engine:
        bad = submit(engine, [255, 1, 2])
        good = submit(engine, [1, 2, 3])
        assert bad.wait().reason == "error" and "NaN" in (bad.deltas[-1].error or "")
        assert len(good.wait().tokens) == 12
        assert len(submit(engine, [1, 2, 3]).wait().tokens) == 12


def test_a_token_that_the_tokenizer_does_not_know_ends_its_request_alone() -> None:
    model = StripedHyena(replace(CONFIGS["sh"], vocab_size=400))
    with running(model) as engine:
        biased = submit(engine, [1, 2, 3], logit_bias={300: 100.0})
        good = submit(engine, [1, 2, 3], allowed_tokens=range(256))
        assert biased.wait().reason == "error" and "outside the vocabulary" in (biased.deltas[-1].error or "")
        assert len(good.wait().tokens) == 12


def test_stop_strings_and_stop_tokens_end_a_request() -> None:
    model = StripedHyena(CONFIGS["sh"])
    want = alone(model, [1, 2, 3], count=12)
    with running(model) as engine:
        client = Client()
        stop = frozenset({want.tokens[5]})
        engine.submit(Request(prompt=[1, 2, 3], params=SamplingParams(), max_new_tokens=12, stop_ids=stop), client)
        assert client.wait().reason == "stop"
        assert client.tokens == want.tokens[: want.tokens.index(want.tokens[5]) + 1]


def test_what_cannot_be_served_is_refused() -> None:
    model = StripedHyena(replace(CONFIGS["sh"], max_length=100))
    with running(model, max_waiting=2, max_rows=1) as engine:
        with pytest.raises(InputError, match="empty"):
            submit(engine, [])
        with pytest.raises(InputError, match="outside the vocabulary"):
            submit(engine, [256])
        with pytest.raises(CapacityError, match="more than the 100"):
            submit(engine, [1] * 90, count=11)
        with pytest.raises(QueueFullError):
            for _ in range(50):
                submit(engine, [1], count=99)
    with pytest.raises(EngineDeadError):
        submit(engine, [1])


def test_stopping_finishes_what_runs_and_ends_what_does_not_finish() -> None:
    model = StripedHyena(CONFIGS["sh"])
    engine = Engine(model, ByteTokenizer(), EngineSettings())
    engine.start()
    client = submit(engine, [1, 2], count=20)
    assert engine.stop(timeout=PATIENCE)
    assert client.wait().reason == "length"
    engine = Engine(model, ByteTokenizer(), EngineSettings())
    engine.start()
    client = submit(engine, [1, 2], count=8000)
    assert not engine.stop(timeout=0.2)
    assert client.wait().reason == "error" and "stopping" in (client.deltas[-1].error or "")


def test_a_failure_of_the_runner_ends_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StripedHyena(CONFIGS["sh"])
    with running(model) as engine:
        monkeypatch.setattr(engine.runner, "run", lambda *_: 1 / 0)
        client = submit(engine, [1, 2])
        assert client.wait().reason == "error"
        assert not engine.alive
        with pytest.raises(EngineDeadError):
            submit(engine, [1])


def test_what_waits_does_not_slow_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most probable tokens are looked for while a request runs that wants them."""
    tops: dict[int, set[int]] = {}
    with running(StripedHyena(CONFIGS["sh"]), max_rows=1) as engine:
        run = engine.runner.run

        def noted(plan: Any, rows: Any, top: int) -> Any:
            for key in engine.scheduler.running_keys:
                tops.setdefault(key, set()).add(top)
            return run(plan, rows, top)

        monkeypatch.setattr(engine.runner, "run", noted)
        clients = [Client() for _ in range(3)]
        for top, client in zip((0, 5, 0), clients, strict=True):
            engine.submit(Request(prompt=[1], params=SamplingParams(), max_new_tokens=30, top=top), client)
        assert [len(client.wait().deltas[-1].top) for client in clients] == [0, 5, 0]
    assert list(tops.values()) == [{0}, {5}, {0}]


class Watched(ShortPasses):
    """Counts its passes."""

    passes = 0

    def read(self, *arguments: Any) -> Any:
        self.passes += 1
        return super().read(*arguments)


def test_short_passes_say_what_the_plain_pass_says() -> None:
    """Prompts that share passes, a row that samples, and a second turn that begins at a snapshot of a short pass."""
    torch.manual_seed(0)
    model = StripedHyena(replace(CONFIGS["sh"], layer_types=("hyena", "attention")))
    prompts = [[(7 * j + i) % 256 for j in range(n)] for i, n in enumerate((5, 66, 9))]
    found = []
    for short in (False, True):
        with running(model, kv_bytes=2**22, decoding="static", max_rows=4) as engine:
            passes = Watched(model, engine.runner.pool, cuda_graph=False)
            engine.runner._lanes[""]._short = passes if short else None
            clients = [
                submit(engine, prompt, 3, temperature=0.5 * (i == 2), seed=1) for i, prompt in enumerate(prompts)
            ]
            clients = [client.wait() for client in clients]
            clients.append(submit(engine, prompts[1] + [1, 2], 2).wait())
        assert bool(passes.passes) == short
        assert clients[3].deltas[-1].cached_tokens == 64
        found.append(clients)
    for one, other in zip(*found, strict=True):
        assert one.tokens == other.tokens and one.reason == other.reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)  # float32, another order of sums
