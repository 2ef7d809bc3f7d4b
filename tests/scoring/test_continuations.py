"""Continuations of contexts that are read once score as whole texts do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs import TINY, TINY_EVO, TINY_EVO2
from hyaena.config import ModelConfig
from hyaena.errors import InputError, NonFiniteError
from hyaena.model import StripedHyena
from hyaena.scoring import score_continuations


def make(config: ModelConfig = TINY) -> StripedHyena:
    torch.manual_seed(1)
    model = StripedHyena(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "long_filter" not in name:
                p.normal_(std=0.3)
    return model.double()


@torch.inference_mode()
def whole(model: StripedHyena, context: list[int], ids: list[int], skip: int = 0) -> tuple[float, bool]:
    """The same by one pass over everything."""
    logp = model(torch.tensor([[*context, *ids]]))[0].log_softmax(-1)[len(context) - 1 + skip : -1]
    targets = torch.tensor(ids[skip:], dtype=torch.int64)
    return float(logp.gather(1, targets[:, None]).sum()), bool((logp.argmax(1) == targets).all())


def some(*counts: int) -> list[list[int]]:
    return [torch.randint(50, (count,)).tolist() for count in counts]


@pytest.mark.parametrize("config", [TINY, TINY_EVO, TINY_EVO2], ids=["sh", "evo", "evo2"])
@pytest.mark.parametrize("tokens_per_pass", [1, 7, 40, 1000])
def test_continuations_score_as_whole_texts(config: ModelConfig, tokens_per_pass: int) -> None:
    model = make(config)
    groups = [(context, some(3, 1, 9, 2, 9)) for context in some(20, 1, 33, 20)]
    found = score_continuations(model, groups, tokens_per_pass=tokens_per_pass)
    for (context, continuations), scores in zip(groups, found, strict=True):
        for ids, one in zip(continuations, scores, strict=True):
            logprob, greedy = whole(model, context, ids)
            assert one.logprob == pytest.approx(logprob, abs=1e-9)
            assert (one.greedy, one.count) == (greedy, len(ids))


def test_greedy_continuations_are_said_so() -> None:
    model, (context,) = make(), some(12)
    ids = list(context)
    with torch.inference_mode():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    best = ids[12:]
    other = [*best[:3], (best[3] + 1) % 50]
    ((one, two, part),) = score_continuations(model, [(context, [best, other, best[:2]])])
    assert (one.greedy, two.greedy, part.greedy) == (True, False, True)


@pytest.mark.parametrize("tokens_per_pass", [5, 1000])
def test_tokens_that_are_skipped_are_read_and_not_scored(tokens_per_pass: int) -> None:
    model = make()
    groups = [(context, some(6, 4, 8)) for context in some(20, 9)]
    skips = [[2, 0, 7], [6, 3, 1]]
    found = score_continuations(model, groups, skips=skips, tokens_per_pass=tokens_per_pass)
    for (context, continuations), numbers, scores in zip(groups, skips, found, strict=True):
        for ids, skip, one in zip(continuations, numbers, scores, strict=True):
            logprob, greedy = whole(model, context, ids, skip)
            assert one.logprob == pytest.approx(logprob, abs=1e-9)
            assert (one.greedy, one.count) == (greedy, len(ids) - skip)


def test_a_context_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = make(), []
    forward = StripedHyena.forward

    def count(self: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, **options)

    monkeypatch.setattr(StripedHyena, "forward", count)
    score_continuations(model, [(some(200)[0], some(5, 6, 7, 8))], tokens_per_pass=100)
    assert shapes == [(1, 100), (1, 100), (4, 7)]
    shapes.clear()
    score_continuations(model, [(some(200)[0], some(1, 1, 1))])  # nothing but the context's own logits
    assert shapes == [(1, 200)]


def test_nothing_to_score() -> None:
    model = make()
    assert score_continuations(model, []) == []
    assert score_continuations(model, [([1, 2], [])]) == [[]]
    ((empty,),) = score_continuations(model, [([1, 2], [[]])])
    assert empty == (0.0, True, 0)


def test_mistakes_are_named() -> None:
    model = make()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([([], [[1]])], {}, "the context of group 0 is empty"),
        ([([1], [[2]]), ([1], [[50]])], {}, "group 1: token id 50 is outside the vocabulary 0..49"),
        ([5], {}, "group 0 must be a pair"),
        ([([1] * 5, [[2] * 6])], {"max_length": 10}, "pass the maximum length 10"),
        ([([1], [[2]])], {"skips": [[2]]}, "a skip must be between 0 and the 1 tokens"),
        ([([1], [[2]])], {"skips": [[0, 0]]}, "skips must have a number for each"),
        ([([1], [[2]])], {"skips": []}, "skips must have a number for each"),
        ([([1], [[2]])], {"tokens_per_pass": 0}, "tokens_per_pass must be at least 1"),
    ]
    for groups, options, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            score_continuations(model, groups, **options)
        assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_name_the_group() -> None:
    model = make()
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(NonFiniteError, match="group 1: the logits are not finite"):
        score_continuations(model, [([1, 2], [[3, 4]]), ([1, 7], [[3, 4]])])
