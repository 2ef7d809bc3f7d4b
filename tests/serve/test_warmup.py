"""What a server does before it takes requests."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from hyaena.decoding import Decoder
from hyaena.model import StripedHyena
from hyaena.serve.engine import Engine, EngineDeadError
from hyaena.serve.warmup import _groups, warm_up
from serve.clients import CONFIGS, alone, running, submit
from serve.test_adapters import make


def test_nothing_of_it_stays(caplog: pytest.LogCaptureFixture) -> None:
    model, adapters, models = make("sh")
    with running(model, adapters, chunk=128, kv_bytes=2**22) as engine, caplog.at_level(logging.INFO):
        before = engine.metrics
        assert warm_up(engine) > 0
        assert engine.metrics is before and b"generation_tokens_total{" not in before.text()
        scheduler = engine.scheduler
        assert scheduler.idle and scheduler.pages.free == scheduler.pages.count and not scheduler.prefix.snapshots
        prompt = [*range(100)]
        client = submit(engine, prompt, adapter="a").wait()
        assert client.tokens == alone(models["a"], prompt).tokens and client.deltas[0].cached_tokens == 0
        assert b"generation_tokens_total{" in before.text()
    assert "warmed up in" in caplog.text


@pytest.mark.parametrize(("rows", "buckets"), [(1, {1}), (6, {1, 2, 4, 6}), (16, {1, 2, 4, 8, 16})])
def test_a_gpu_sees_every_bucket_of_rows_and_every_size_of_prompt(
    rows: int, buckets: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this device the same requests go through the decoder, which would capture a graph for each."""
    model = StripedHyena(CONFIGS["sh"])
    seen: set[tuple[int, Any]] = set()
    step = Decoder._step
    monkeypatch.setattr(
        Decoder, "_step", lambda self, shape: seen.add((self.rows, shape.features)) or step(self, shape)
    )
    with running(model, decoding="static", max_rows=rows, chunk=128, kv_bytes=2**24) as engine:
        monkeypatch.setattr("hyaena.serve.warmup._captures", lambda engine: True)
        groups = list(_groups(engine))
        warm_up(engine)
        assert engine.scheduler.preemptions == 0
    lengths = {len(request.prompt) for group in groups for request in group}
    assert lengths == {1, 16, 32, 64, 128, 256, 512}
    for features in {features for _, features in seen}:
        assert buckets <= {count for count, other in seen if other == features}
    assert len({features for _, features in seen}) == 2  # greedy, and with chance


def test_a_model_of_few_tokens_is_warmed_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.serve.warmup._captures", lambda engine: True)
    model = StripedHyena(replace(CONFIGS["sh"], max_length=20))
    with running(model, max_rows=4, max_waiting=2) as engine:
        warm_up(engine)
        assert len(submit(engine, [1, 2], count=5).wait().tokens) == 5


def test_a_model_that_gives_nan_starts_and_an_engine_that_fails_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StripedHyena(CONFIGS["sh"])
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with running(model) as engine:
        warm_up(engine)
        assert engine.alive and submit(engine, [1]).wait().reason == "error"
    with running(StripedHyena(CONFIGS["sh"])) as engine:
        monkeypatch.setattr(engine.runner, "run", lambda *_: 1 / 0)
        with pytest.raises(EngineDeadError, match="--no-warm-up"):
            warm_up(engine)


def test_requests_of_a_server_that_is_ready_compile_nothing() -> None:
    """Every kind of step that greedy and sampled requests need has run before."""
    model = StripedHyena(CONFIGS["multi"])
    with running(model) as engine:
        assert isinstance(engine, Engine)
        warm_up(engine)
        kernels = pytest.importorskip("hyaena.ops.cpu.products")
        compiled = [f.cache_info().misses for f in (kernels.linear, kernels.gate)]
        for params in ({}, {"temperature": 1.0, "seed": 3}):
            submit(engine, [1, 2, 3], **params).wait()
        assert compiled == [f.cache_info().misses for f in (kernels.linear, kernels.gate)]
