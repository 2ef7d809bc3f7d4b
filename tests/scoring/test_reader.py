"""The laws of reading: packed is alone, layer by layer is one pass, in any chunks, for layers of every kind."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hyaena
import models
import test_foreign_layer as foreign
from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.config import ModelConfig
from hyaena.model import StripedHyena
from hyaena.scoring import reader
from hyaena.scoring.reader import Reader, Span, clip, pack
from hyaena.scoring.records import Record
from hyaena.tokenizers import ByteTokenizer

KINDS = replace(
    TINY,
    layer_types=("hyena_se", "hyena_mr", "attention", "hyena_li", "hyena"),
    se_filter_length=4,
    mr_filter_length=9,
    se_filter_groups=4,
    mr_filter_groups=4,
)
CONFIGS = {"sh": TINY, "evo": TINY_EVO, "evo2": TINY_EVO2, "kinds": KINDS}
# float64: both sides differ by rounding only, so that no error can hide
EXACT: dict[str, Any] = {"atol": 1e-9, "rtol": 1e-9}


def make(config: ModelConfig, dtype: torch.dtype = torch.float64) -> StripedHyena:
    torch.manual_seed(0)
    return models.spread(replace(config, vocab_size=260, max_length=1000)).to(dtype)


def scores(model: StripedHyena, texts: Sequence[list[int]], **options: Any) -> list[tuple[np.ndarray, ...]]:
    found = hyaena.score(model, ByteTokenizer(260), texts, output="torch", **options)
    return [(one.logprobs[1:], one.entropies[1:], one.ranks[1:]) for one in found]


def direct(model: StripedHyena, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """log p, entropy and rank of all tokens but the first, from the model's own logits."""
    with torch.inference_mode():
        logp = model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)
    targets = torch.tensor(ids[1:])[:, None]
    chosen = logp.gather(1, targets)
    return chosen[:, 0].float(), -(logp.exp() * logp).sum(-1).float(), (1 + (logp > chosen).sum(-1)).int()


def agree(model: StripedHyena, texts: Sequence[list[int]], tolerance: float, **options: Any) -> None:
    for found, ids in zip(scores(model, texts, **options), texts, strict=True):
        expected = direct(model, ids)
        for mine, exact in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(mine, exact, atol=tolerance, rtol=tolerance)
        # float32 may order two nearly equal logits the other way round
        assert (found[2] != expected[2]).sum() <= (0 if tolerance < 1e-6 else 2)


def random_texts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=6)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 90))
def test_scores_depend_on_neither_packing_nor_chunks(name: str, lengths: list[int], tokens_per_pass: int) -> None:
    # results are float32, whatever the model computes in
    agree(make(CONFIGS[name]), random_texts(lengths), 1e-6, tokens_per_pass=tokens_per_pass)


@pytest.mark.parametrize("name", CONFIGS)
def test_nor_do_they_where_keys_and_values_are_rounded(name: str) -> None:
    model, texts = make(CONFIGS[name]), random_texts([3, 40, 21])
    exact = scores(model, texts)
    model.cache_dtype = "int8"
    together = scores(model, texts)
    for size in (1, 7, 30):
        for one, other in zip(scores(model, texts, tokens_per_pass=size), together, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert any(float((one[0] - other[0]).abs().max()) > 1e-5 for one, other in zip(exact, together, strict=True))


@pytest.mark.parametrize("name", ["sh", "evo"])
def test_in_float32_they_agree_to_rounding(name: str) -> None:
    model, texts = make(CONFIGS[name], torch.float32), random_texts([200, 3, 90, 1, 150, 64])
    for tokens_per_pass in (30, 128, 1024):
        # logits of order 10 in float32, sums of 16 channels through three layers
        agree(model, texts, 1e-4, tokens_per_pass=tokens_per_pass)


@pytest.mark.parametrize("method", ["fft", "recurrence", "scan", "truncated"])
def test_every_method_reads(method: str) -> None:
    model, texts = make(TINY), random_texts([30, 70, 5])
    expected = [direct(model, ids)[0] for ids in texts]
    for tokens_per_pass in (16, 200):
        for found, exact in zip(
            scores(model, texts, method=method, tokens_per_pass=tokens_per_pass), expected, strict=True
        ):
            # a truncated filter drops a share of its energy, by choice
            tolerance = 2e-2 if method == "truncated" else 1e-6
            torch.testing.assert_close(found[0], exact, atol=tolerance, rtol=tolerance)


def test_a_foreign_layer_is_read_in_chunks() -> None:
    torch.manual_seed(0)
    config = replace(foreign.CONFIG, max_length=1000)
    model = models.spread(config, mixers=foreign.MIXERS_OF_OURS).double()
    for tokens_per_pass in (17, 70):  # in chunks; alone, since the mixer does not say that it keeps documents apart
        agree(model, random_texts([60, 23, 5]), 1e-6, tokens_per_pass=tokens_per_pass)


def test_a_foreign_layers_state_is_continued() -> None:
    model = models.spread(replace(foreign.CONFIG, max_length=1000), mixers=foreign.MIXERS_OF_OURS).double()
    context, *choices = random_texts([12, 3, 1])
    (found,) = hyaena.score_continuations(model, [(context, choices)])
    for one, ids in zip(found, choices, strict=True):
        expected = direct(model, context + ids)[0][len(context) - 1 :]
        assert one.logprob == pytest.approx(float(expected.sum()), abs=1e-5)


# --- the loop itself


def test_one_layers_state_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    make_state = StripedHyena.make_state

    def watched(self: StripedHyena, index: int, *args: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(ref() is not None for ref in made), "the state of the layer before is still there"
        state = make_state(self, index, *args, **options)
        made.extend(weakref.ref(t) for t in state.tensors() if t.ndim == 4)
        assert options["max_length"] == 50
        return state

    monkeypatch.setattr(StripedHyena, "make_state", watched)
    agree(make(replace(TINY, layer_types=("attention",) * 4)), random_texts([50]), 1e-6, tokens_per_pass=20)
    assert len(made) == 8  # keys and values of four layers


def test_layers_come_one_after_the_other_and_user_hooks_are_called() -> None:
    model = make(TINY)
    order: list[tuple[int, int]] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output, i=i: order.append((i, output[0].shape[1])))
        for i, layer in enumerate(model.layers)
    ]
    scores(model, random_texts([50]), tokens_per_pass=20)
    assert order == [(i, n) for i in range(3) for n in (20, 20, 10)]
    order.clear()
    scores(model, random_texts([7, 8, 9, 30]), tokens_per_pass=30)
    assert order == [(0, 24), (1, 24), (2, 24), (0, 30), (1, 30), (2, 30)]
    for handle in handles:
        handle.remove()
    zero = model.layers[1].mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    agree(model, random_texts([50, 4]), 1e-6, tokens_per_pass=20)  # a hook that changes what a module returns
    zero.remove()


def test_chunks_of_a_long_record_may_be_shorter_than_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = make(TINY), []
    monkeypatch.setitem(reader.PASS_TOKENS, "cpu", 40)
    monkeypatch.setitem(reader.MOST_CHUNK, "cpu", 20)
    model.norm.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    for options in ({}, {"tokens_per_pass": 30}):
        agree(model, random_texts([50, 35]), 1e-6, **options)
        # two passes, and the forward passes to compare with
        assert sizes == ([20, 20, 10, 35, 50, 35] if not options else [30, 20, 30, 5, 50, 35])
        sizes.clear()


def test_others_may_call_the_model_between_two_results() -> None:
    model = make(TINY)
    results = hyaena.iter_embeddings(model, ByteTokenizer(260), ["abc", "def"], [0, "norm"], tokens_per_pass=4)
    next(results)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3, 4, 5]]))
    _, second = next(results)
    np.testing.assert_allclose(second["norm"], hyaena.embed(model, ByteTokenizer(260), "def"), atol=1e-6)
    results.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_counts_every_token_once() -> None:
    model, seen = make(TINY), []
    scores(model, random_texts([50, 3, 4]), tokens_per_pass=20, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 57 and 50 in seen and len(seen) > 9


def record(length: int) -> Record:
    return Record(0, torch.zeros(length, dtype=torch.int64))


@given(st.lists(st.integers(1, 20), max_size=15), st.integers(1, 25))
def test_packing_keeps_the_order_and_the_budget(lengths: list[int], most: int) -> None:
    groups = list(pack(map(record, lengths), most))
    assert [len(r) for group in groups for r in group] == lengths
    assert all(len(group) == 1 or sum(map(len, group)) <= most for group in groups)
    for one, other in itertools.pairwise(groups):
        assert sum(map(len, one)) + len(other[0]) > most


def test_parts_of_spans() -> None:
    one, two = record(10), record(4)
    spans = [Span(one, 3, slice(0, 7)), Span(two, 0, slice(7, 11))]
    assert clip(spans, 0, 11) == spans
    assert clip(spans, 5, 9) == [Span(one, 8, slice(0, 2)), Span(two, 0, slice(2, 4))]
    assert clip(spans, 8, 20) == [Span(two, 1, slice(0, 3))] and clip(spans, 0, 0) == []
    assert spans[0].stop == 10


def test_only_as_many_layers_run_as_are_needed() -> None:
    model = make(TINY)
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: called.append(name))
    for depth, last in ((0, "embed_tokens"), (2, "layers.1"), (3, "layers.2"), (4, "norm")):
        for length in (5, 30):
            called.clear()
            list(Reader(model, depth=depth, tokens_per_pass=10).read([record(length)]))
            assert called[-1] == last and "lm_head" not in called


def test_threads_that_share_a_model_see_nothing_of_each_other() -> None:
    model, texts = make(TINY), [[1, *range(2, 60)], [7, 8, 9]]
    want = hyaena.score(model, ByteTokenizer(260), texts)
    layers = hyaena.embed(model, ByteTokenizer(260), texts, layers=[1, "norm"], pool="mean")
    begin, errors = threading.Barrier(4), []

    def work() -> None:
        try:
            begin.wait()
            for _ in range(10):
                found = hyaena.score(model, ByteTokenizer(260), texts)
                assert [one.sum for one in found] == [one.sum for one in want]
                vectors = hyaena.embed(model, ByteTokenizer(260), texts, layers=[1, "norm"], pool="mean")
                assert all(np.array_equal(vectors[layer], layers[layer]) for layer in layers)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
