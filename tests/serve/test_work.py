"""What the engine does beside requests: scores and embeddings, in steps between the turns of streams."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator
from concurrent.futures import CancelledError, Future

import pytest
import torch

import hyaena
from hyaena.errors import InputError, NonFiniteError
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams
from hyaena.scoring import embed_steps, score_steps
from hyaena.serve.engine import Delta, EngineDeadError, QueueFullError, Request
from hyaena.serve.work import WorkQueue
from hyaena.tokenizers import ByteTokenizer
from serve.clients import CONFIGS, PATIENCE, alone, once, running, submit

MODEL, TOKENIZER = StripedHyena(CONFIGS["multi"]), ByteTokenizer()
TEXT = [i * 7 % 256 for i in range(1000)]


def test_streams_and_prompts_go_on_between_chunks_of_work() -> None:
    """Between two tokens of a stream at most a chunk of work or of prompts is read."""
    done, at_tokens, ended = 0, [], threading.Event()

    def work() -> Generator[float, None, str]:
        nonlocal done
        for _ in range(300):
            done += 1
            yield 32.0
        return "done"

    def sink(delta: Delta) -> None:
        at_tokens.append(done)
        if delta.finish_reason is not None:
            ended.set()

    with running(MODEL, chunk=128) as engine:
        engine.submit(Request(prompt=TEXT[:50], params=SamplingParams(), max_new_tokens=100), sink)
        future = engine.call(work())
        prompt = submit(engine, TEXT, count=4)
        assert future.result(PATIENCE) == "done" and ended.wait(PATIENCE)
        assert prompt.wait().tokens == alone(MODEL, TEXT, count=4).tokens
    assert at_tokens[-1] - at_tokens[0] > 4, "the work waited for the stream"
    assert max(b - a for a, b in itertools.pairwise(at_tokens)) <= 128 / 32


def test_scores_and_embeddings_beside_a_stream_are_those_of_the_model_alone() -> None:
    texts = [TEXT[:300], TEXT[5:20], TEXT]
    scores = hyaena.score(MODEL, TOKENIZER, texts)
    vectors = hyaena.embed(MODEL, TOKENIZER, texts, "layers.1.mlp.down_proj")
    with running(MODEL, chunk=128, decoding="static") as engine:
        stream = submit(engine, TEXT[:100], count=60)
        scored = engine.call(score_steps(MODEL, TOKENIZER, texts, tokens_per_pass=128))
        embedded = engine.call(embed_steps(MODEL, TOKENIZER, texts, "layers.1.mlp.down_proj", tokens_per_pass=128))
        for mine, theirs in zip(scored.result(PATIENCE), scores, strict=True):
            torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(embedded.result(PATIENCE), vectors, atol=1e-4, rtol=1e-4)
        assert stream.wait().tokens == alone(MODEL, TEXT[:100], count=60).tokens
    assert not MODEL.layers[1].mlp.down_proj._forward_hooks and not MODEL.norm._forward_hooks


def test_steps_read_no_more_than_a_pass_and_leave_the_model_as_it_is() -> None:
    steps, worth = score_steps(MODEL, TOKENIZER, [TEXT[:30], TEXT], tokens_per_pass=100), []
    while True:
        try:
            worth.append(next(steps))
        except StopIteration as end:
            found = end.value
            break
        assert not MODEL.norm._forward_hooks
    assert len(found) == 2 and max(worth) <= 100
    assert sum(worth) == pytest.approx(1030 + 1000 / len(MODEL.layers))  # the final norm is read like a layer


def test_the_search_for_a_nan_goes_in_steps_too() -> None:
    model = StripedHyena(CONFIGS["multi"])
    with torch.no_grad():
        model.embed_tokens.weight[255] = torch.nan
    steps, worth = score_steps(model, TOKENIZER, [[1] * 1200 + [255] + [1] * 300], tokens_per_pass=100), []
    with pytest.raises(NonFiniteError, match="they first appear in the embedding, at token 1200"):
        while True:
            worth.append(next(steps))
            assert not model.norm._forward_hooks and not model.embed_tokens._forward_hooks
    assert worth[-2:] == [512, 512] and max(worth[:-2]) <= 100


def test_work_that_is_cancelled_ends_at_its_next_step() -> None:
    closed, begun = threading.Event(), threading.Event()

    def endless() -> Generator[float, None, None]:
        try:
            while True:
                begun.set()
                yield 1.0
        finally:
            closed.set()

    with running(MODEL, chunk=128) as engine:
        future = engine.call(endless())
        assert begun.wait(PATIENCE) and future.cancel()
        assert closed.wait(PATIENCE)
        waiting = engine.call(endless())
        waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result(PATIENCE)
        assert len(submit(engine, TEXT[:10]).wait().tokens) == 12


def test_work_that_fails_is_alone_with_it() -> None:
    with running(MODEL, chunk=128) as engine:
        with pytest.raises(InputError, match="outside the vocabulary"):
            engine.call(score_steps(MODEL, TOKENIZER, [[300]])).result(PATIENCE)
        with pytest.raises(ZeroDivisionError):
            engine.call(once(lambda: 1 / 0)).result(PATIENCE)
        assert len(submit(engine, TEXT[:10]).wait().tokens) == 12


def test_work_is_finished_or_given_up_at_the_end() -> None:
    release = threading.Event()
    with running(MODEL, chunk=128, max_waiting=2) as engine:
        held = engine.call(once(release.wait))
        other = engine.call(once(lambda: None))
        with pytest.raises(QueueFullError):
            engine.call(once(lambda: None))
        assert not engine.stop(timeout=0.1, abandon=0.0)
        release.set()
        assert held.result(PATIENCE) is None  # it was in its last step
        with pytest.raises(EngineDeadError):
            other.result(PATIENCE)
    with running(MODEL, chunk=128) as engine:
        future = engine.call(once(lambda: time.sleep(0.1)))
        assert engine.stop(timeout=PATIENCE) and future.result(0) is None
    with pytest.raises(EngineDeadError):
        engine.call(once(lambda: None))


def test_work_that_is_cancelled_while_all_is_given_up_keeps_no_other_from_its_error() -> None:
    class Cancelled(Future[None]):
        """Cancelled by another thread as soon as somebody has seen that it was not."""

        def done(self) -> bool:
            found = super().done()
            self.cancel()
            return found

    work = WorkQueue()
    work.put(once(lambda: None))
    other = work.put(once(lambda: None))
    work.works[0].future = Cancelled()
    work.give_up(EngineDeadError("the end"))
    with pytest.raises(EngineDeadError):
        other.result(0)
