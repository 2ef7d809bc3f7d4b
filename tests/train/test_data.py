from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import InputError
from hyaena.train.corpus import Corpus
from hyaena.train.data import IGNORE, PackedWindows, evaluation_batches

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def numbered(lengths: list[int], prompts: list[int] | None = None) -> Corpus:
    """A corpus whose tokens are all different, so that each can be followed; prompts are lengths too."""
    starts = np.array([0, *lengths[:-1]]).cumsum()
    learned = starts + 1 + np.array(prompts or [0] * len(lengths))
    return Corpus(np.arange(sum(lengths), dtype=np.uint16), starts, learned, sum(lengths))


def document_of(corpus: Corpus, tokens: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(torch.from_numpy(corpus.starts), tokens.long(), right=True)


# --- packing -----------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(2, 12), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_holds_every_token_at_most_once_and_nearly_all(
    lengths: list[int], window: int, batch_size: int, seed: int
) -> None:
    corpus = numbered(lengths)
    if len(corpus.tokens) < 2 * window:
        with pytest.raises(InputError, match="too few"):
            PackedWindows(corpus, window=window, batch_size=batch_size, seed=seed)
        return
    windows = PackedWindows(corpus, window=window, batch_size=batch_size, seed=seed)
    steps = -(-windows.windows_per_epoch // batch_size)
    batches = [windows.batch(step) for step in range(steps)]
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.shape == (steps * batch_size, window)  # the last batch runs into the next epoch
    epoch = ids[: windows.windows_per_epoch].flatten()
    assert len(epoch.unique()) == len(epoch) > len(corpus.tokens) - 2 * window


@given(LENGTHS, st.integers(2, 12), st.integers(0, 3))
def test_targets_follow_and_segments_change_exactly_where_documents_do(
    lengths: list[int], window: int, seed: int
) -> None:
    corpus = numbered([*lengths, 2 * window])
    windows = PackedWindows(corpus, window=window, batch_size=4, seed=seed)
    for step in range(3):
        batch = windows.batch(step)
        document = document_of(corpus, batch.ids)
        assert (batch.segments[:, 0] == 0).all()
        assert torch.equal(batch.segments.diff(dim=1) != 0, document.diff(dim=1) != 0)
        inside = batch.targets != IGNORE
        assert torch.equal(batch.targets[inside], batch.ids[inside] + 1)
        assert torch.equal(inside[:, :-1], document.diff(dim=1) == 0)
        starts = torch.isin(batch.targets, torch.from_numpy(corpus.starts).to(torch.int32))
        assert not starts.any()  # the first token of a document is never predicted


@st.composite
def corpora_with_prompts(draw: st.DrawFn, window: int) -> Corpus:
    """Documents with and without prompts; those with one fit into a window, others may be longer."""
    lengths, prompts = [], []
    for _ in range(draw(st.integers(1, 10))):
        has_prompt = draw(st.booleans())
        length = draw(st.integers(3, window + 1) if has_prompt else st.integers(1, 3 * window))
        lengths.append(length)
        prompts.append(draw(st.integers(1, length - 2)) if has_prompt else 0)
    return numbered(lengths, prompts)


@given(st.integers(3, 12), st.data(), st.integers(1, 5), st.integers(0, 3))
def test_answers_are_learned_once_an_epoch_and_after_their_whole_prompt(
    window: int, data: st.DataObject, batch_size: int, seed: int
) -> None:
    corpus = data.draw(corpora_with_prompts(window))
    if not corpus.has_prompts:
        return
    windows = PackedWindows(corpus, window=window, batch_size=batch_size, seed=seed)
    batches = [windows.batch(step) for step in range(-(-windows.windows_per_epoch // batch_size))]
    ids, targets, segments = (
        torch.cat([getattr(batch, name) for batch in batches])[: windows.windows_per_epoch]
        for name in ("ids", "targets", "segments")
    )
    assert ids.shape[1] == window
    scored = targets[targets != IGNORE].tolist()
    learned = [t for a, b in zip(corpus.learned, corpus.ends, strict=True) for t in range(a, b)]
    assert sorted(scored) == learned  # every token to predict, once, and no other
    for row, column in (targets != IGNORE).nonzero().tolist():
        target = int(targets[row, column])
        document = int(np.searchsorted(corpus.ends, target, side="right"))
        seen = ids[row, : column + 1][segments[row, : column + 1] == segments[row, column]].tolist()
        assert seen[-1] == target - 1
        if corpus.ends[document] - corpus.starts[document] <= window + 1:
            assert seen == list(range(corpus.starts[document], target))


def test_batches_are_a_function_of_seed_and_step() -> None:
    corpus = numbered([17, 5, 90, 31, 64])
    first = PackedWindows(corpus, window=8, batch_size=3, seed=1)
    forward = [first.batch(step).ids for step in range(40)]  # five epochs
    second = PackedWindows(corpus, window=8, batch_size=3, seed=1)
    for step in (39, 0, 17, 3):
        assert torch.equal(second.batch(step).ids, forward[step])
    other = PackedWindows(corpus, window=8, batch_size=3, seed=2)
    assert not torch.equal(other.batch(0).ids, forward[0])
    per_epoch = first.windows_per_epoch
    rows = torch.cat(forward)
    assert not torch.equal(rows[:per_epoch], rows[per_epoch : 2 * per_epoch])


def test_micro_batches_are_the_batch_in_parts() -> None:
    batch = PackedWindows(numbered([50, 50]), window=8, batch_size=6, seed=0).batch(0)
    parts = batch.split(2)
    assert len(parts) == 3
    for name in ("ids", "targets", "segments"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.num_targets for part in parts) == batch.num_targets


# --- evaluation --------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(2, 12), st.data(), st.integers(1, 5))
def test_evaluation_scores_every_token_once_with_the_promised_context(
    lengths: list[int], window: int, data: st.DataObject, batch_size: int
) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    corpus = numbered(lengths)
    scored: list[int] = []
    for batch in evaluation_batches(corpus, window=window, overlap=overlap, batch_size=batch_size):
        assert batch.ids.shape[1] == window
        for row, column in (batch.targets != IGNORE).nonzero().tolist():
            target = int(batch.targets[row, column])
            assert target == int(batch.ids[row, column]) + 1
            scored.append(target)
            segment = batch.segments[row]
            context = int((segment[: column + 1] == segment[column]).sum())
            start = int(corpus.starts[corpus.starts <= target].max())
            assert context >= min(target - start, overlap)
    assert sorted(scored) == sorted(set(range(len(corpus.tokens))) - set(corpus.starts.tolist()))


@given(st.integers(3, 12), st.data(), st.integers(1, 5))
def test_evaluation_scores_every_answer_once_with_its_prompt(window: int, data: st.DataObject, batch_size: int) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    corpus = data.draw(corpora_with_prompts(window))
    scored: list[int] = []
    for batch in evaluation_batches(corpus, window=window, overlap=overlap, batch_size=batch_size):
        for row, column in (batch.targets != IGNORE).nonzero().tolist():
            target = int(batch.targets[row, column])
            assert target == int(batch.ids[row, column]) + 1
            scored.append(target)
            document = int(np.searchsorted(corpus.ends, target, side="right"))
            start = int(corpus.starts[document])
            context = int((batch.segments[row, : column + 1] == batch.segments[row, column]).sum())
            whole = corpus.learned[document] > start + 1
            assert context >= (target - start if whole else min(target - start, overlap))
    assert sorted(scored) == [t for a, b in zip(corpus.learned, corpus.ends, strict=True) for t in range(a, b)]
