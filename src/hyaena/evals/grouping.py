"""Requests that begin alike, grouped so that what they share is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MIN_SHARED = 16
"""Tokens from which sharing pays: a group costs one more pass, and copies of the cache."""


class Request(NamedTuple):
    """A continuation to be scored after a context, as ids; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Tail(NamedTuple):
    """What a request adds to its group's beginning.

    Attributes:
        request: its number.
        ids: the tokens after the beginning.
        skip: how many of them belong to the context, and are not scored.
    """

    request: int
    ids: list[int]
    skip: int


class Group(NamedTuple):
    """Requests that begin with the same tokens, all of them part of each one's context."""

    shared: list[int]
    tails: list[Tail]


def group_requests(requests: Sequence[Request], *, least: int = MIN_SHARED) -> list[Group]:
    """Group requests by their beginnings so that few tokens are read.

    The requests, sorted by their tokens, are taken in turn: one joins the group before it where that reads fewer tokens
    than to begin another, which is ``m·l > (m-1)·s`` for m members that share s tokens, and l with the new one. So the
    answers of a question share the question, and questions after the same few-shot examples share these.

    Args:
        requests: to be scored.
        least: the fewest tokens that a group shares.

    Returns:
        The groups. A request that shares too little is a group of its own, whose beginning is its context.
    """
    whole = [[*request.context, *request.continuation] for request in requests]
    groups: list[list[int]] = []
    shared = 0
    for number in sorted(range(len(requests)), key=whole.__getitem__):
        if groups:
            most = min(shared, len(requests[number].context))
            common = _common(whole[groups[-1][0]], whole[number], most)
            members = len(groups[-1])
            if common >= least and members * common > (members - 1) * shared:
                groups[-1].append(number)
                shared = common
                continue
        groups.append([number])
        shared = len(requests[number].context)
    return [_group(requests, whole, members) for members in groups]


def _group(requests: Sequence[Request], whole: Sequence[list[int]], members: Sequence[int]) -> Group:
    first = whole[members[0]]
    shared = min(len(requests[number].context) for number in members)
    for number in members[1:]:
        shared = _common(first, whole[number], shared)
    return Group(
        first[:shared],
        [Tail(number, whole[number][shared:], len(requests[number].context) - shared) for number in members],
    )


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many tokens two sequences share at the beginning, at most ``most``; by bisection over slices."""
    low, high = 0, min(most, len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
