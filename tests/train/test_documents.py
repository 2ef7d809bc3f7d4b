from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from hyaena.errors import InputError
from hyaena.train import documents
from hyaena.train.documents import find_files, read_documents


def texts(*sources: Path, pattern: str = "*") -> list[str]:
    """The documents, their pieces joined."""
    found: list[str] = []
    for piece in read_documents(sources, pattern):
        if piece.begins or not found:
            found.append("")
        found[-1] += piece.text
    return found


def test_reads_files_folders_and_json_lines_in_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "folder/b").mkdir(parents=True)
    (tmp_path / "folder/b/2.py").write_text("two")
    (tmp_path / "folder/1.py").write_text("one")
    (tmp_path / "folder/no.txt").write_text("no")
    (tmp_path / "folder/empty.py").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": "r\\u2028s"}\n\n  {"text": "t", "path": "x"}\r\n')
    (tmp_path / "lines.txt").write_bytes(b"a\r\nb\n")
    sources = [tmp_path / "rows.jsonl", tmp_path / "folder", tmp_path / "lines.txt"]
    assert texts(*sources, pattern="*.py") == ["r\u2028s", "t", "one", "two", "a\r\nb\n"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.JsonL", "x.ndjson", "x.NDJSON", "x.json", "x.JSON"])
def test_rows_are_read_whatever_the_letter_case_of_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('\ufeff{"text": "é"}\n{"text": "b", "text2": 3}\n', encoding="utf-8")
    assert texts(tmp_path / name) == ["é", "b"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b\\n"}]',
        '\n[\n  {"text": "a"}\n ,\n  {\n"text":\n"b\\n"}\n]\n',
        '{"text": "a"}\n{"text": "b\\n"}',
        '{\n "text": "a"\n}\n{"text": "b\\n"}\n',
    ],
)
def test_json_files_hold_an_array_or_objects(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    assert texts(tmp_path / "x.json") == ["a", "b\n"]


@pytest.mark.parametrize("content", ["", "[]", " \n", "\ufeff[ ]"])
def test_json_files_may_be_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    assert texts(tmp_path / "x.json") == []


def test_prompts_are_context_and_completions_are_learned(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2=", "completion": "4\n"}, {"text": "plain"}, {"completion": "b", "prompt": "", "id": 7}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = [(piece.text, piece.begins, piece.learned, piece.line) for piece in read_documents([tmp_path / "x.jsonl"])]
    assert pieces == [
        ("2+2=", True, False, 1),
        ("4\n", False, True, 1),
        ("plain", True, True, 2),
        ("", True, False, 3),
        ("b", False, True, 3),
    ]


FASTA = b">chr1 a header, N and all\r\nACGTN\r\nacgt\r\n\r\n>empty\r\n>chr2\r\nRYK-*\r\nTT"
SEQUENCES = ["ACGTNACGT", "RYK-*TT"]


@pytest.mark.parametrize("name", ["x.fa", "x.FASTA", "x.fna", "x.fa.gz", "x.fasta.GZ", "x.ffn", "x.faa", "x.fna.bgz"])
@pytest.mark.parametrize("crlf", [True, False])
def test_fasta_records_are_documents_without_headers_and_line_ends(
    tmp_path: Path, name: str, crlf: bool, caplog: pytest.LogCaptureFixture
) -> None:
    content = FASTA if crlf else FASTA.replace(b"\r", b"")
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if "z" in name.lower() else content)
    assert [text for text in texts(tmp_path / name) if text] == SEQUENCES
    assert "4 lower-case letters (marked repeats) are read as upper case" in caplog.text


def test_long_texts_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters, lines and records that lie across the bounds of a read are whole, and every piece knows its line."""
    monkeypatch.setattr(documents, "BLOCK", 7)
    text = "ä\nbcdé€🦡\n\nfghijkl mnop\r\n🦡qrs"
    (tmp_path / "x.txt").write_text(text, encoding="utf-8", newline="")
    pieces = list(read_documents([tmp_path / "x.txt"]))
    assert "".join(piece.text for piece in pieces) == text and len(pieces) > 4
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    before = ""
    for piece in pieces:
        assert piece.line == 1 + before.count("\n")
        before += piece.text
    (tmp_path / "x.fa").write_bytes(
        b">a header that is longer than a read\nACG\nTTTGGGACGTTTGACA\nA\n>b\nC\n>c\n" + b"G" * 40
    )
    assert texts(tmp_path / "x.fa") == ["ACGTTTGGGACGTTTGACAA", "C", "G" * 40]
    lines = [(piece.begins, piece.line) for piece in read_documents([tmp_path / "x.fa"])]
    assert lines[0] == (True, 2) and (True, 6) in lines and (True, 8) in lines


def test_compressed_text_and_rows_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress("é\n".encode(), mtime=0))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n', mtime=0))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b'[{"text": "b"}]', mtime=0))
    assert texts(*(tmp_path / name for name in ("x.txt.gz", "x.jsonl.gz", "x.json.gz"))) == ["é\n", "a", "b"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    (tmp_path / "x.fa").write_bytes(b"\xef\xbb\xbf>a\nAC\n")
    assert texts(tmp_path / "x.txt", tmp_path / "x.fa") == ["a\ufeff", "AC"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe", "x.txt, line 1: x.txt is not UTF-8"),
        ("x.txt", b"a\nb\nc\xc3", "x.txt, line 3: x.txt is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n\xff\xfe', "x.jsonl, line 2: x.jsonl is not UTF-8"),
        ("x.json", b'[\n{"text": "\xff"}]', "x.json, line 2: x.json is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text"\n', "x.jsonl, line 2: Expecting ':' delimiter"),
        ("x.jsonl", b'{"txt": "a"}\n', "line 1: expected an object whose `text`.*found none"),
        ("x.jsonl", b'["a"]\n', "line 1: expected an object whose `text` is a string, not list"),
        ("x.jsonl", b'{"text": 3}\n', "line 1: `text` must be a string, not int"),
        ("x.jsonl", b'{"text": null}\n', "line 1: `text` must be a string, not NoneType"),
        ("x.jsonl", b'{"text": "a"} {"text": "b"}\n', "line 1: more than one JSON value"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', "line 2: the key `text` stands there twice"),
        ("x.ndjson", b'{"prompt": "a", "completion": "b", "prompt": "c"}', "the key `prompt` stands there twice"),
        ("x.jsonl", b'{"text": "a", "prompt": "b"}', "found `text` and `prompt`"),
        ("x.jsonl", b'{"prompt": "b"}', "found `prompt`"),
        ("x.jsonl", b'{"prompt": "b", "completion": ""}', "line 1: the completion is empty"),
        ("x.jsonl", b'{"prompt": ["b"], "completion": "c"}', "`prompt` must be a string, not list"),
        ("x.jsonl", b"[" * 100_000, "nested too deep"),
        ("x.jsonl", b'{"text": ' + b"1" * 10_000 + b"}", "too large"),
        (
            "x.json",
            b'[{"text": "a"},\n{"text": "a", "text": "b"}]',
            "x.json, line 2: the key `text` stands there twice",
        ),
        ("x.json", b'[{"text": "a"}\n{"text": "b"}]', "x.json, line 2: expected ',' or ']'"),
        ("x.json", b'[{"text": "a"},\n', "x.json, line 2: the array does not end"),
        ("x.json", b'[{"text": "a"},]', "a comma before the end"),
        ("x.json", b'[{"text": "a"}]\n[]', "x.json, line 2: text after the end"),
        ("x.json", b'[\n\n{"text":\n "a}]', "x.json, line 4: Unterminated string"),
        ("x.json", b'{"name": "a package"}', "x.json, line 1: expected an object"),
        ("x.fa", b"ACGT\n", "x.fa, line 1: a sequence before the first header"),
        ("x.fa", b">a\nACGT\nAC1T\n", "x.fa, line 3: '1' is no letter"),
        ("x.fa", b">a\nAC GT\n", "x.fa, line 2: ' ' is no letter"),
        ("x.fa", b">a\nAC\xff\n", "x.fa, line 2: 'ÿ' is no letter"),
        ("x.fa", b">a\rACGT\r>b\rAC\r", "x.fa, line 1: lines end with a bare CR"),
        ("x.fq", b"@a\nACGT\n+\nIIII\n", "x.fq: FASTQ is not supported"),
        ("x.gb.gz", b"", "GenBank is not supported"),
        ("x.txt.gz", b"plain", "x.txt.gz: not a whole gzip file"),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-12], "x.txt.gz: not a whole gzip file"),
    ],
)
def test_unusable_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents([tmp_path / name]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff"])
def test_names_that_cannot_be_are_one_line(name: str) -> None:
    with pytest.raises(InputError, match="no such file or folder") as caught:
        list(read_documents([name]))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent"):
        find_files([tmp_path / "absent"])
    with pytest.raises(InputError, match=r"no file that matches '\*\.py'"):
        find_files([tmp_path], "*.py")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        find_files([tmp_path / "pipe"])


def test_json_lines_of_the_corpus_script_are_readable(tmp_path: Path) -> None:
    row = {"path": "a.py", "text": 'x = "é"\n'}
    (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts(tmp_path / "train.jsonl") == [row["text"]]
