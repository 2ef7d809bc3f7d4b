"""Log-probabilities of several continuations of one context, which is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.arguments import each, require_ids, whole
from hyaena.cache import Cache
from hyaena.errors import InputError, NonFiniteError, shown
from hyaena.generation.nonfinite import remedy
from hyaena.model import StripedHyena
from hyaena.scoring.reader import choose_pass
from hyaena.scoring.token_scores import Wanted, token_statistics
from hyaena.tokenizers import token_ids


class Continuation(NamedTuple):
    """What a model says of one continuation.

    Attributes:
        logprob: the sum of the log-probabilities of its tokens.
        greedy: whether each of its tokens is a most probable one, so that greedy decoding would choose it.
        count: its tokens.
    """

    logprob: float
    greedy: bool
    count: int


MAX_COPIES = 4
"""Tokens of contexts whose keys and values are copied at a time, in passes, or in contexts where these are longer."""
WANTED = Wanted(entropy=False)

Group = tuple[Sequence[int], Sequence[Sequence[int]]]


class _Row(NamedTuple):
    """A continuation on its way.

    Attributes:
        group, place: where it stands in the request.
        cached: the row of the cache of its batch.
        ids: its tokens.
        skip: how many of them are read and not scored.
    """

    group: int
    place: int
    cached: int
    ids: list[int]
    skip: int


def score_continuations(
    model: StripedHyena,
    groups: Iterable[Group],
    *,
    skips: Iterable[Sequence[int]] | None = None,
    method: str = "auto",
    tokens_per_pass: int | None = None,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Continuation]]:
    """Score the continuations of contexts: ``log p(continuation | context)``.

    Each context is read once, into a cache, whose copies its continuations go on from. Contexts that fit into a pass
    are read together, and so are continuations, of unequal lengths.

    Args:
        model: any StripedHyena, on any device.
        groups: pairs of the ids of a context and a list of the ids of its continuations, taken as they are.
        skips: for each group and continuation how many tokens at its beginning are read and not scored: what texts with
            different contexts share can be the context of a group. All are scored unless given.
        method: how long convolutions of contexts are evaluated.
        tokens_per_pass: the most tokens of a pass, padding included; see ``iter_scores``.
        max_length: the most tokens of a context and a continuation; ``config.max_length`` unless given.
        progress: called as ``progress(groups scored)``.

    Returns:
        For each group a Continuation per continuation. An empty continuation has log-probability 0, and is greedy.

    Raises:
        InputError: an empty context, an id outside the vocabulary, more tokens than ``max_length``, or skips that do
            not fit the continuations.
        NonFiniteError: the model produced NaN or infinity; the message names the group.
    """
    limit = model.config.max_length if max_length is None else whole("max_length", max_length, "at least 1", 1)
    parsed = [
        _parse(model, number, group, limit)
        for number, group in enumerate(each("groups", groups, "pairs of a context and its continuations"))
    ]
    skipped = _parse_skips(skips, [continuations for _, continuations in parsed])
    most = choose_pass(model) if tokens_per_pass is None else whole("tokens_per_pass", tokens_per_pass, "at least 1", 1)
    results = [[Continuation(0.0, True, 0)] * len(continuations) for _, continuations in parsed]
    done = 0
    order = sorted(range(len(parsed)), key=lambda number: len(parsed[number][0]))  # those of like length together
    for batch in _batches(order, [len(context) for context, _ in parsed], most):
        _score_batch(model, batch, parsed, skipped, results, most, method)
        done += len(batch)
        if progress is not None:
            progress(done)
    return results


def _parse(model: StripedHyena, number: int, group: Group, limit: int) -> tuple[list[int], list[list[int]]]:
    try:
        context, continuations = group
    except (TypeError, ValueError):
        raise InputError(f"group {number} must be a pair (context, continuations), not {shown(group)}") from None
    ids = token_ids(context, f"the context of group {number}")
    rest = [
        token_ids(one, f"a continuation of group {number}")
        for one in each(f"group {number}", continuations, "a context and a list of continuations")
    ]
    if not ids:
        raise InputError(f"the context of group {number} is empty: give it [tokenizer.bos_id], to begin from nothing")
    require_ids((token for one in (ids, *rest) for token in one), model.config.vocab_size, f"group {number}: ")
    longest = len(ids) + max(map(len, rest), default=0)
    if longest > limit:
        raise InputError(
            f"group {number}: {longest:,} tokens of context and continuation pass the maximum length {limit:,}: "
            "shorten one of them, or pass a larger max_length"
        )
    return ids, rest


def _parse_skips(
    skips: Iterable[Sequence[int]] | None, continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[int]]:
    if skips is None:
        return [[0] * len(group) for group in continuations]
    given = [token_ids(group, "skips") for group in skips]
    if [*map(len, given)] != [*map(len, continuations)]:
        raise InputError("skips must have a number for each continuation of each group")
    for numbers, group in zip(given, continuations, strict=True):
        for skip, ids in zip(numbers, group, strict=True):
            if not 0 <= skip <= len(ids):
                raise InputError(f"a skip must be between 0 and the {len(ids)} tokens of its continuation, not {skip}")
    return given


def _batches(order: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers in order of rising length, as many together as have ``most`` tokens when padded, at least one."""
    batches: list[list[int]] = []
    for number in order:
        if batches and (len(batches[-1]) + 1) * lengths[number] <= most:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


@torch.inference_mode()
def _score_batch(
    model: StripedHyena,
    batch: Sequence[int],
    parsed: Sequence[tuple[list[int], list[list[int]]]],
    skips: Sequence[Sequence[int]],
    results: list[list[Continuation]],
    most: int,
    method: str,
) -> None:
    """Score the continuations of some groups, into ``results``."""
    contexts = [parsed[number][0] for number in batch]
    cache, logits = read_contexts(model, contexts, most, method)
    rows = [
        _Row(number, place, cached, ids, skips[number][place])
        for cached, number in enumerate(batch)
        for place, ids in enumerate(parsed[number][1])
        if ids
    ]
    rows.sort(key=lambda row: len(row.ids))
    first = 0
    while first < len(rows):  # rows of like length, as many as fit into a pass, with bounded copies of their contexts
        count = 0
        while first + count < len(rows):
            row = rows[first + count]
            longest = max(len(contexts[r.cached]) for r in rows[first : first + count + 1])
            read, copied = (count + 1) * len(row.ids), (count + 1) * longest
            if count and (read > most or copied > MAX_COPIES * max(most, longest)):
                break
            count += 1
        part = rows[first : first + count]
        first += count
        for row, found in zip(part, _continue(model, part, cache, logits, method), strict=True):
            if found.logprob - found.logprob != 0:
                raise NonFiniteError(f"group {row.group}: the logits are not finite: {remedy(model)}")
            results[row.group][row.place] = found


def read_contexts(
    model: StripedHyena, contexts: Sequence[Sequence[int]], most: int, method: str
) -> tuple[Cache, Tensor]:
    """Read contexts into a cache, a row each: one pass for several, padded on the left; chunks for one.

    Returns:
        The cache, and the logits [B,V] that follow the contexts.
    """
    device, width = model.device, max(map(len, contexts))
    cache = model.make_cache(len(contexts), max_length=width, method=method)
    if len(contexts) == 1:
        logits = None
        for ids in torch.tensor([list(contexts[0])], device=device).split(most, dim=1):
            logits = model(ids, cache=cache, logits_to_keep=1, method=method, wide_logits=True)
        assert logits is not None
        return cache, logits[:, -1]
    padding = torch.tensor([[width - len(ids)] for ids in contexts], device="cpu")
    mask = (torch.arange(width, device="cpu") >= padding).to(device)
    ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in contexts], device=device)
    return cache, model(ids, cache=cache, mask=mask, logits_to_keep=1, method=method, wide_logits=True)[:, -1]


def _continue(
    model: StripedHyena, rows: Sequence[_Row], cache: Cache, logits: Tensor, method: str
) -> list[Continuation]:
    """Score continuations that go on from copies of rows of a cache, whose next logits [B,V] are given.

    What is read behind a shorter continuation than the longest changes nothing before it, and the copies are dropped.
    """
    device, width = model.device, len(rows[-1].ids)
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    targets = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=device)
    at = torch.tensor([row.cached for row in rows], device=device)
    values = [token_statistics(logits[at], targets[:, 0], WANTED)]
    if width > 1:
        copies = cache.select([row.cached for row in rows], max_length=cache.length + width - 1)
        later = model(targets[:, :-1], cache=copies, method="auto", wide_logits=True)  # [B,width-1,V]
        values += [
            token_statistics(step, following, WANTED)
            for step, following in zip(later.unbind(1), targets[:, 1:].unbind(1), strict=True)
        ]
    logprobs, ranks = torch.stack(values, dim=-1)  # each [B,width]
    first = torch.tensor([row.skip for row in rows], device=device)
    places = torch.arange(width, device=device)
    there = (places >= first[:, None]) & (places < lengths[:, None])
    sums = torch.where(there, logprobs, 0).double().sum(1).tolist()
    greedy = ((ranks == 1) | ~there).all(1).tolist()
    return [
        Continuation(total, best, len(row.ids) - row.skip) for row, total, best in zip(rows, sums, greedy, strict=True)
    ]
