"""Requests that begin alike: what is grouped covers every request exactly, and reads fewer tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hyaena.evals.grouping import Group, Request, group_requests

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def cost(groups: list[Group]) -> int:
    return sum(len(group.shared) + sum(len(tail.ids) for tail in group.tails) for group in groups)


@given(st.lists(st.tuples(tokens, tokens), max_size=12), st.integers(1, 4))
def test_every_request_is_its_groups_beginning_and_its_tail(
    pairs: list[tuple[list[int], list[int]]], least: int
) -> None:
    requests = [Request(*pair) for pair in pairs]
    groups = group_requests(requests, least=least)
    assert sorted(tail.request for group in groups for tail in group.tails) == [*range(len(requests))]
    for group in groups:
        assert group.shared and (len(group.shared) >= least or len(group.tails) == 1)
        for number, ids, skip in group.tails:
            context, continuation = requests[number]
            assert [*group.shared, *ids] == [*context, *continuation]
            assert ids[skip:] == continuation and [*group.shared, *ids[:skip]] == context
    assert cost(groups) <= sum(len(context) + len(rest) for context, rest in requests)


def test_answers_of_a_question_share_it() -> None:
    questions = [[1, *range(100 * i, 100 * i + 50)] for i in range(1, 4)]
    requests = [Request(q, [7, 8, answer]) for q in questions for answer in range(4)]
    groups = group_requests(requests)
    assert [len(group.tails) for group in groups] == [4, 4, 4]
    assert all(len(group.shared) == 51 and {tail.skip for tail in group.tails} == {0} for group in groups)


def test_questions_after_the_same_examples_share_these() -> None:
    shots = [*range(1000, 1400)]
    requests = [Request([*shots, q, q + 1], [answer]) for q in range(10, 40, 10) for answer in range(2)]
    (group,) = group_requests(requests)
    assert group.shared == shots and {tail.skip for tail in group.tails} == {2}


def test_contexts_that_differ_in_their_last_word_share_the_rest() -> None:
    text = [*range(60)]
    (group,) = group_requests([Request([*text, 100], [5, 6]), Request([*text, 200, 201], [5, 6])])
    assert group.shared == text and [(tail.ids, tail.skip) for tail in group.tails] == [
        ([100, 5, 6], 1),
        ([200, 201, 5, 6], 2),
    ]


def test_a_beginning_of_few_tokens_is_not_shared() -> None:
    groups = group_requests([Request([1, 2, number], [5]) for number in range(3)])
    assert [len(group.tails) for group in groups] == [1, 1, 1]
    assert [group.shared for group in groups] == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]


def test_nothing_to_group() -> None:
    assert group_requests([]) == []
