"""Every record is checked before work begins; shards are disjoint and complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyaena.errors import InputError
from hyaena.records import find_source, read_records
from hyaena.records.contents import Contents, Shard, read_contents, read_part
from hyaena.tokenizers import CharacterTokenizer


def contents(path: Path, text: str) -> Contents:
    path.write_text(text)
    return read_contents(find_source(path), lambda record: len(CharacterTokenizer().encode(record.text)))


def test_sizes(tmp_path: Path) -> None:
    found = contents(tmp_path / "x.fa", ">a\nACG\nT\n>b\nAC\n")
    assert found.sizes.tolist() == [4, 2]


def test_lower_case_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents(tmp_path / "x.fa", ">a\nacGT\n>b\nAc\n")
    assert caplog.messages == [f"{tmp_path}/x.fa: 3 lower-case letters are read as upper case"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.fa", ">a\nAC\n>b\nG\n>a other\nT\n", "two records are named 'a', line 1 and line 5; rename one"),
        ("x.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": "1"}', "two records are named '1', line 1 and line 2"),
        ("x.jsonl", '{"text": "ok"}\n{"text": "AC\\u0000G", "id": "r"}', "line 2, record 'r': .* byte 0 at position 2"),
        ("x.jsonl", '{"text": "AC\\ud800G", "id": "r"}', "line 1, record 'r': an unpaired surrogate at character 2 of"),
        ("x.jsonl", '{"text": "A", "id": "r\\ud800"}', "an unpaired surrogate at character 1 of the name"),
        ("x.jsonl", '{"text": "A", "id": "r\\u0000"}', "a name has at most 4,096 characters and no NUL"),
        ("x.fa", f">{'n' * 5000}\nA\n", "a name has at most 4,096 characters and no NUL"),
    ],
)
def test_records_that_cannot_be_used_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        contents(tmp_path / name, text)
    assert "\n" not in str(caught.value)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), count=st.integers(1, 12))
def test_shards_are_the_whole_one_after_another(lengths: list[int], count: int) -> None:
    whole = Contents(np.array(lengths))
    parts = [whole.part(Shard(number, count)) for number in range(1, count + 1)]
    assert [r for part in parts for r in range(part.first, part.stop)] == list(range(len(lengths)))
    assert [part.size for part in parts] == [sum(lengths[part.first : part.stop]) for part in parts]
    assert max(part.size for part in parts) <= sum(lengths) / count + max(lengths)


def test_a_part_is_read(tmp_path: Path) -> None:
    found = contents(tmp_path / "x.txt", "aa\nbb\ncc\ndd\nee\n")
    source = find_source(tmp_path / "x.txt")
    shards = [list(read_part(source, found.part(Shard.parse(f"{i}/3")))) for i in (1, 2, 3)]
    assert [[record.name for record in shard] for shard in shards] == [["1", "2"], ["3", "4"], ["5"]]
    assert [record for shard in shards for record in shard] == list(read_records(source))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "-1/4", "1/4/2", "a/b", "", "1/99999999999"])
def test_shards_are_parts_of_a_whole(text: str) -> None:
    with pytest.raises(InputError, match="a shard is I/N with I from 1 to N"):
        Shard.parse(text)
    assert str(Shard.parse("3/8")) == "3/8"
