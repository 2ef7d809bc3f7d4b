from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import InputError
from hyaena.tokenizers import ByteTokenizer, CharacterTokenizer
from hyaena.train.data import IGNORE, Corpus, PackedWindows, evaluation_batches, read_documents, tokenize

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> Corpus:
    """A corpus whose tokens are all different, so that each can be followed."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return Corpus(torch.arange(sum(lengths), dtype=torch.int32), starts, sum(lengths))


def document_of(corpus: Corpus, tokens: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(corpus.starts, tokens.long(), right=True)


# --- reading -----------------------------------------------------------------------------------------------------


def test_reads_files_folders_and_json_lines_in_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "folder/b").mkdir(parents=True)
    (tmp_path / "folder/b/2.py").write_text("two")
    (tmp_path / "folder/1.py").write_text("one")
    (tmp_path / "folder/no.txt").write_text("no")
    (tmp_path / "folder/empty.py").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": "r\\u2028s"}\n\n{"text": "t", "path": "x"}\n')
    (tmp_path / "lines.txt").write_bytes(b"a\r\nb\n")
    sources = [tmp_path / "rows.jsonl", tmp_path / "folder", tmp_path / "lines.txt"]
    assert list(read_documents(sources, "*.py")) == ["r\u2028s", "t", "one", "two", "a\r\nb\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe", "x.txt is not UTF-8"),
        ("x.jsonl", b"\xff\xfe", "x.jsonl is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', "x.jsonl, line 2"),
        ("x.jsonl", b'{"txt": "a"}\n', "line 1: expected an object whose `text`"),
        ("x.jsonl", b'["a"]\n', "line 1: expected an object whose `text`"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents([tmp_path / name]))


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent"):
        list(read_documents([tmp_path / "absent"]))
    with pytest.raises(InputError, match=r"no file that matches '\*\.py'"):
        list(read_documents([tmp_path], "*.py"))


def test_documents_stand_between_start_and_end_tokens() -> None:
    corpus = tokenize(["ab", "é"], ByteTokenizer())
    assert corpus.tokens.tolist() == [256, 97, 98, 257, 256, 0xC3, 0xA9, 257]
    assert corpus.starts.tolist() == [0, 4]
    assert (corpus.num_bytes, corpus.num_predictions) == (4, 6)


def test_a_tokenizer_without_bos_starts_documents_with_its_end_token() -> None:
    corpus = tokenize(["AC", "G"], CharacterTokenizer())
    assert corpus.tokens.tolist() == [0, 65, 67, 0, 0, 71, 0]
    assert corpus.starts.tolist() == [0, 4]


def test_no_text_is_an_error() -> None:
    with pytest.raises(InputError, match="no text"):
        tokenize([], ByteTokenizer())


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
        starts = torch.isin(batch.targets, corpus.starts.to(torch.int32))
        assert not starts.any()  # the first token of a document is never predicted


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


def test_json_lines_of_the_corpus_script_are_readable(tmp_path: Path) -> None:
    row = {"path": "a.py", "text": 'x = "é"\n'}
    (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_documents([tmp_path / "train.jsonl"])) == [row["text"]]
