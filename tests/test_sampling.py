"""Sampling: the documented order, the right frequencies, and independent rows."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyaena.errors import InputError, NonFiniteError
from hyaena.ops.step import DecodeOperators
from hyaena.sampling import SamplingParams, log_probabilities, sample


def draw(logits: torch.Tensor, count: int, **values: Any) -> Counter[int]:
    """Tokens of ``count`` draws from one row of logits, with one generator."""
    params = SamplingParams(**({"temperature": 1.0, "seed": 0} | values))
    generator = params.generator()
    one = logits.reshape(1, -1)
    return Counter(int(sample(one, [params], [generator])) for _ in range(count))


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# --- each operation


def test_greedy_takes_the_largest_and_draws_no_number() -> None:
    params = SamplingParams(seed=3)
    generator = params.generator()
    before = generator.get_state()
    ids = sample(torch.tensor([[0.0, 5.0, 5.0, 1.0]]), [params], [generator])
    assert ids.tolist() == [1]
    assert torch.equal(generator.get_state(), before)


def test_a_row_that_draws_takes_one_number_and_a_greedy_one_beside_it_none() -> None:
    params = [SamplingParams(seed=1), SamplingParams(temperature=1.0, seed=2)]
    generators = [row.generator() for row in params]
    expected = [row.generator() for row in params]
    torch.rand(1, dtype=torch.float64, generator=expected[1])
    assert sample(torch.tensor([[0.0, 5.0], [0.0, -99.0]]), params, generators).tolist() == [1, 0]
    for generator, state in zip(generators, expected, strict=True):
        assert torch.equal(generator.get_state(), state.get_state())


def test_frequencies_are_the_models() -> None:
    probabilities = (0.5, 0.25, 0.0, 0.15, 0.1)
    counts = draw(logits_of(*probabilities), 8000)
    assert counts[2] == 0
    for token, probability in enumerate(probabilities):
        # five standard deviations of a binomial count
        assert abs(counts[token] - 8000 * probability) <= 5 * math.sqrt(8000 * probability * (1 - probability))


def test_temperature_sharpens_and_flattens() -> None:
    logits = logits_of(0.8, 0.2)
    cold, warm = draw(logits, 4000, temperature=0.5), draw(logits, 4000, temperature=2.0)
    assert cold[1] / 4000 == pytest.approx(0.04 / 0.68, abs=0.02)  # p^2, renormalised
    assert warm[1] / 4000 == pytest.approx(1 / 3, abs=0.04)  # sqrt(p), renormalised


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = torch.tensor([1e4, 3e4, -3e4])
    assert set(draw(logits, 50, temperature=1e-300)) == {1}


def test_top_k_keeps_k_and_the_lower_id_among_equals() -> None:
    assert set(draw(logits_of(0.2, 0.2, 0.2, 0.2, 0.2), 300, top_k=2)) == {0, 1}
    assert set(draw(logits_of(0.1, 0.5, 0.4), 300, top_k=2)) == {1, 2}
    assert set(draw(logits_of(0.1, 0.5, 0.4), 300, top_k=99)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = logits_of(0.1, 0.5, 0.15, 0.25)
    assert set(draw(logits, 300, top_p=0.49)) == {1}
    assert set(draw(logits, 300, top_p=0.51)) == {1, 3}
    assert set(draw(logits, 300, top_p=0.76)) == {1, 2, 3}
    assert set(draw(logits, 300, top_p=1.0)) == {0, 1, 2, 3}
    assert set(draw(logits, 50, top_p=1e-9)) == {1}


def test_top_p_follows_top_k_on_what_is_left() -> None:
    # After top-k 2 the two are 2/3 and 1/3, so 0.6 is reached by the first alone; before it, both were needed.
    logits = logits_of(0.4, 0.2, 0.2, 0.2)
    assert set(draw(logits, 300, top_k=2, top_p=0.6)) == {0}
    assert set(draw(logits, 300, top_p=0.6)) == {0, 1}


def test_min_p_is_relative_to_the_best() -> None:
    logits = logits_of(0.6, 0.29, 0.08, 0.03)
    assert set(draw(logits, 500, min_p=0.4)) == {0, 1}
    assert set(draw(logits, 500, min_p=0.1)) == {0, 1, 2}
    assert set(draw(logits, 50, min_p=1.0)) == {0}


def test_min_p_sees_the_temperature() -> None:
    logits = logits_of(0.9, 0.1)
    assert set(draw(logits, 200, min_p=0.2)) == {0}
    assert set(draw(logits, 200, min_p=0.2, temperature=4.0)) == {0, 1}


def test_the_repetition_penalty_works_on_both_signs_and_before_greedy() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.5, -9.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    params = [SamplingParams(repetition_penalty=2.0)] * 2
    generators = [row.generator() for row in params]
    assert sample(logits, params, generators, seen=seen).tolist() == [1, 1]  # 2 -> 1 and -1 -> -2
    assert sample(logits, params, generators, seen=torch.zeros_like(seen)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="which tokens were seen"):
        sample(logits, params, generators)


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    copy = logits.clone()
    params = [SamplingParams(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.3)] * 2
    sample(logits, params, [row.generator() for row in params], seen=torch.ones(2, 9, dtype=torch.bool))
    assert torch.equal(logits, copy)


# --- laws

random_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.6]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=60)
@given(rows=st.lists(random_params, min_size=1, max_size=5), seed=st.integers(0, 2**31), half=st.booleans())
def test_a_row_in_a_batch_is_that_row_alone(rows: list[SamplingParams], seed: int, half: bool) -> None:
    noise = torch.Generator().manual_seed(seed)
    steps = torch.randn(4, len(rows), 11, generator=noise) * 3
    steps = steps.bfloat16() if half else steps  # bfloat16 makes ties
    seen = torch.rand(len(rows), 11, generator=noise) < 0.4

    together = [row.generator() for row in rows]
    batch = torch.stack([sample(logits, rows, together, seen=seen) for logits in steps])
    for i, row in enumerate(rows):
        own = row.generator()
        alone = [int(sample(logits[i : i + 1], [row], [own], seen=seen[i : i + 1])) for logits in steps]
        assert batch[:, i].tolist() == alone


@settings(max_examples=60)
@given(params=random_params, seed=st.integers(0, 2**31))
def test_what_is_drawn_survived_every_filter(params: SamplingParams, seed: int) -> None:
    """Against the definition, written out in plain Python for one row."""
    noise = torch.Generator().manual_seed(seed)
    logits, seen = torch.randn(11, generator=noise).double() * 2, torch.rand(11, generator=noise) < 0.4
    score = {}
    for token, value in enumerate(logits.tolist()):
        factor = params.repetition_penalty
        score[token] = (value / factor if value > 0 else value * factor) if seen[token] else value
    ranked = sorted(score, key=lambda token: (-score[token], token))
    if params.temperature == 0:
        allowed = set(ranked[:1])
    else:
        kept = ranked[: params.top_k or None]
        weight = {token: math.exp((score[token] - score[ranked[0]]) / params.temperature) for token in kept}
        total, before, allowed = sum(weight.values()), 0.0, set()
        for token in kept:
            if before < params.top_p * total and weight[token] >= params.min_p:
                allowed.add(token)
            before += weight[token]
    ids = {int(sample(logits[None], [params], [params.generator()], seen=seen[None]))}
    assert ids <= allowed


def test_the_same_seed_draws_the_same_and_none_does_not() -> None:
    logits = torch.zeros(1, 1000)

    def run(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        generator = params.generator()
        return [int(sample(logits, [params], [generator])) for _ in range(8)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


def test_the_largest_number_still_draws_a_token_with_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    logits = torch.cat([torch.randn(500, generator=torch.Generator().manual_seed(1)), torch.full((9,), -math.inf)])
    assert set(draw(logits, 3)) == {499}


def test_the_number_zero_draws_no_token_that_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros(1, dtype=torch.float64))
    assert set(draw(torch.tensor([-math.inf, 0.0, 3.0, 1.0]), 3)) == {1}
    assert set(draw(torch.tensor([-math.inf, 0.0, 3.0, 1.0]), 3, top_k=1)) == {2}


# --- errors and log-probabilities


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_never_sampled(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    params = [SamplingParams(temperature=temperature, seed=0)] * 3
    generators = [row.generator() for row in params]
    before = [generator.get_state() for generator in generators]
    with pytest.raises(NonFiniteError, match="row 1 are not finite"):
        sample(logits, params, generators)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


def test_minus_infinity_forbids_a_token_and_is_an_error_only_everywhere() -> None:
    assert set(draw(torch.tensor([-math.inf, 0.0, -math.inf]), 20)) == {1}
    with pytest.raises(NonFiniteError):
        draw(torch.full((3,), -math.inf), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, not nan"),
        ({"temperature": "hot"}, "temperature must be 0 or more, not 'hot'"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": 2}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be above 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": True}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "seed must be a whole number from 0"),
        ({"seed": "7"}, "seed must be a whole number from 0"),
        ({"seed": 7.0}, "seed must be a whole number from 0"),
        ({"top_k": "5"}, "top_k must be a whole number"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"top_k": None}, "top_k must be a whole number"),
        ({"top_k": 2**63}, "top_k must be a whole number"),
        ({"temperature": True}, "temperature must be 0 or more, not True"),
        ({"temperature": "1"}, "temperature must be 0 or more, not '1'"),
        ({"temperature": 10**400}, "temperature must be 0 or more"),
        ({"temperature": 1j}, "temperature must be 0 or more"),
        ({"temperature": torch.ones(2)}, "temperature must be 0 or more"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": None}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 1e-101}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": 1e101}, "repetition_penalty must be above 0"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize("penalty", [1e-100, 1e100])
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0, 1e308])
def test_the_largest_penalties_and_temperatures_do_not_overflow(penalty: float, temperature: float) -> None:
    logits = torch.tensor([3.4e38, -3.4e38, 0.0, -math.inf])
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=0)
    for seen in ([True, True, False, False], [False, False, True, True], [True] * 4):
        ids = {int(sample(logits[None], [params], [params.generator()], seen=torch.tensor([seen]))) for _ in range(9)}
        assert ids <= ({0, 1, 2} if temperature > 1 else {0, 2} if seen[0] and penalty > 1 else {0})


def test_values_become_pythons_own_numbers() -> None:
    params = SamplingParams(temperature=torch.tensor(0.5), top_k=np.uint8(3), seed=np.int64(7))  # pyright: ignore
    assert params == SamplingParams(temperature=0.5, top_k=3, seed=7)
    assert [type(value) for value in (params.temperature, params.top_k, params.seed)] == [float, int, int]


def numbers(generator: torch.Generator) -> list[float]:
    return torch.rand(8, generator=generator, dtype=torch.float64).tolist()


def test_a_generator_depends_on_seed_prompt_and_repeat() -> None:
    params = SamplingParams(seed=7)
    same = numbers(params.generator([1, 2], 1))
    assert numbers(SamplingParams(seed=7, temperature=0.5).generator((1, 2), 1)) == same
    others = [
        numbers(SamplingParams(seed=8).generator([1, 2], 1)),
        numbers(SamplingParams(seed=7 + 2**32).generator([1, 2], 1)),
        numbers(params.generator([1, 2], 0)),
        numbers(params.generator([1, 2])),
        numbers(params.generator([2, 1], 1)),
        numbers(params.generator([1, 2, 0], 1)),
        numbers(params.generator([], 1)),
        numbers(SamplingParams().generator([1, 2], 1)),
    ]
    assert same not in others
    assert others[2] == others[3]
    assert numbers(SamplingParams().generator()) != numbers(SamplingParams().generator())


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_needs_as_many_params_and_generators_as_rows(count: int) -> None:
    params = [SamplingParams()] * count
    generators = [row.generator() for row in params]
    for arguments in ((params, generators), (params, generators[:2]), (params[:2], generators)):
        if [len(part) for part in arguments] != [2, 2]:
            with pytest.raises(InputError, match=r"2 rows of logits, .*: give one per row"):
                sample(torch.zeros(2, 3), *arguments)


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.stack([logits_of(0.5, 0.3, 0.2), logits_of(0.1, 0.2, 0.7)]) + 4.0
    chosen, values, ids = log_probabilities(logits, torch.tensor([1, 2]), top=2)
    assert chosen.exp().tolist() == pytest.approx([0.3, 0.7])
    assert ids.tolist() == [[0, 1], [2, 1]]
    assert values.exp().flatten().tolist() == pytest.approx([0.5, 0.3, 0.7, 0.2])
    assert log_probabilities(logits.bfloat16(), torch.tensor([1, 2]))[0].dtype == torch.float32
    assert log_probabilities(logits, torch.tensor([1, 2]), 1)[1].dtype == torch.float64


def test_log_probabilities_of_large_logits_do_not_overflow() -> None:
    for shift in (-3e4, 3e4):  # where neighbouring float32 numbers are 0.002 apart
        chosen, values, _ = log_probabilities(torch.tensor([[0.0, 1.0]]) + shift, torch.tensor([0]), top=2)
        assert [*chosen.tolist(), *values[0].tolist()] == pytest.approx([-1.3133, -0.3133, -1.3133], abs=3e-3)


@pytest.mark.parametrize("scale", [1.0, 3e4, 1e30])
def test_log_probabilities_of_large_logits_keep_their_digits(scale: float) -> None:
    small = torch.tensor([[0.0, -1.0, -2.5, -0.25]])
    logits = small + scale if scale < 1e5 else torch.tensor([[scale, -scale, 0.0, scale]])
    logits = logits.float()
    want = logits.double().log_softmax(dim=-1)
    for token in range(4):
        chosen, values, _ = log_probabilities(logits, torch.tensor([token]), top=2)
        torch.testing.assert_close(chosen.double(), want[:, token], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(values.double(), want.topk(2).values, atol=1e-6, rtol=1e-6)
    packed = DecodeOperators().argmax(logits, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(packed[:, 1], want.amax(dim=-1), atol=1e-6, rtol=1e-6)
