"""Log-probabilities of continuations against a full forward pass over context and continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hyaena
import models
import test_foreign_layer as foreign
from configs import TINY, TINY_EVO
from hyaena.errors import InputError, NonFiniteError
from hyaena.model import StripedHyena
from hyaena.scoring import Continuation

SIZE = 20
IDS = st.lists(st.integers(0, SIZE - 1), max_size=6)
GROUPS = st.lists(st.tuples(IDS.filter(bool) | st.lists(st.integers(0, SIZE - 1), min_size=20, max_size=30), st.lists(IDS, max_size=4)), max_size=5)  # fmt: skip  # noqa: E501


def make(config: hyaena.ModelConfig = TINY) -> StripedHyena:
    torch.manual_seed(0)
    return models.spread(replace(config, vocab_size=SIZE, max_length=100)).double()


def direct(model: StripedHyena, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
    """By one pass over both."""
    if not continuation:
        return Continuation(0.0, True, 0)
    with torch.inference_mode():
        logp = model(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1].log_softmax(-1)
    chosen = logp.gather(1, torch.tensor(continuation)[:, None])
    return Continuation(float(chosen.sum()), bool((chosen[:, 0] == logp.max(1).values).all()), len(continuation))


def check(model: StripedHyena, groups: Any, **options: Any) -> None:
    found = hyaena.score_continuations(model, groups, **options)
    assert len(found) == len(groups)
    for results, (context, continuations) in zip(found, groups, strict=True):
        expected = [direct(model, context, one) for one in continuations]
        assert [(one.greedy, one.count) for one in results] == [(one.greedy, one.count) for one in expected]
        # float64 on both sides
        assert [one.logprob for one in results] == pytest.approx([one.logprob for one in expected], abs=1e-9)


@pytest.mark.parametrize("config", [TINY, TINY_EVO], ids=["sh", "evo"])
@settings(max_examples=8)
@given(GROUPS, st.integers(1, 80))
def test_they_are_those_of_a_full_forward_pass(config: hyaena.ModelConfig, groups: Any, tokens_per_pass: int) -> None:
    check(make(config), groups, tokens_per_pass=tokens_per_pass)


def test_greedy_decoding_is_greedy() -> None:
    model, context, ids = make(), [3, 1, 4, 1, 5], []
    with torch.inference_mode():
        for _ in range(4):
            ids.append(int(model(torch.tensor([context + ids]))[0, -1].argmax()))
    other = [*ids[:3], (ids[3] + 1) % SIZE]
    best, worse, part = hyaena.score_continuations(model, [(context, [ids, other, ids[:2]])])[0]
    assert best.greedy and part.greedy and not worse.greedy and best.count == 4
    assert best.logprob > worse.logprob


def test_a_context_is_read_once() -> None:
    model, read = make(), []
    handle = model.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    hyaena.score_continuations(model, [([1] * 50, [[2] * 3, [3] * 5, [4]])], tokens_per_pass=1000)
    handle.remove()
    assert read == [(1, 50), (3, 4)]  # the context; of the continuations all tokens but the last


def test_a_foreign_layer_is_continued() -> None:
    model = models.spread(replace(foreign.CONFIG, max_length=100), mixers=foreign.MIXERS_OF_OURS).double()
    check(model, [([1, 2, 3], [[4, 5], [6]]), ([7] * 20, [[8], [9, 10, 11]])], tokens_per_pass=16)


def test_progress_counts_groups() -> None:
    seen: list[int] = []
    groups = [([1] * n, [[2]]) for n in (3, 30, 4)]
    hyaena.score_continuations(make(), groups, tokens_per_pass=10, progress=seen.append)
    assert seen == [2, 3] and hyaena.score_continuations(make(), []) == []


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([([1], [[2]]), ([], [[1]])], "the context of group 1 is empty"),
        ([([1], [[2], [20]])], r"group 0: token id 20 is outside the vocabulary 0\.\.19"),
        ([([1] * 90, [[2], [3] * 11])], "group 0: 101 tokens of context and continuation pass the maximum length 100"),
        ([([1], ["ab"])], "a continuation of group 0 must be a list of whole numbers"),
        ([3], r"group 0 must be a pair \(context, continuations\)"),
    ],
)
def test_mistakes_are_one_line(groups: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hyaena.score_continuations(make(), groups)


def test_logits_that_are_not_finite_name_the_group() -> None:
    model = make()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(NonFiniteError, match="group 1: the logits are not finite"):
        hyaena.score_continuations(model, [([1, 2], [[3]]), ([1, 7], [[3]])], tokens_per_pass=2)
