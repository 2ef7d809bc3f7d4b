"""Records of every format, and what is refused, with its place."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hyaena import extras
from hyaena.errors import InputError, UnsupportedError
from hyaena.records import FORMATS, Record, check_readable, find_source, read_records
from hyaena.records.readers import Piece, cut


def read(path: Path, **options: str) -> list[Record]:
    return list(read_records(find_source(path, **options)))


def rows(path: Path, **options: str) -> list[tuple[str, str, str]]:
    return [(record.name, record.text, record.place) for record in read(path, **options)]


FASTA = b"\xef\xbb\xbf>chr1 a header\r\nACGTN\r\nacgt\r\n\r\n; a comment\r\n>chr2\tother\r\nRYK-*\r\n\r\nTT\r\n> c\r\nA"


@pytest.mark.parametrize("name", ["x.fa", "x.FASTA", "x.fna.gz", "x.faa.bgz"])
@pytest.mark.parametrize("crlf", [True, False])
def test_fasta(tmp_path: Path, name: str, crlf: bool) -> None:
    content = FASTA if crlf else FASTA.replace(b"\r", b"")
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    found = read(tmp_path / name)
    assert [(record.index, record.name, record.text, record.place) for record in found] == [
        (0, "chr1", "ACGTNACGT", "line 1"),
        (1, "chr2", "RYK-*TT", "line 6"),
        (2, "c", "A", "line 10"),
    ]
    assert [record.lowered for record in found] == [4, 0, 0]


def test_compressed_files_are_known_by_their_first_bytes_too(tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_bytes(gzip.compress(b">a\nAC\n", mtime=0) + gzip.compress(b">b\nG\n", mtime=0))
    assert rows(tmp_path / "x.fa") == [("a", "AC", "line 1"), ("b", "G", "line 3")]


def test_fastq(tmp_path: Path) -> None:
    (tmp_path / "x.fastq").write_bytes(b"@r1 lane\nACgt\n+\nII@I\n\n@r2\r\nN\r\n+r2\r\n@\r\n")
    assert rows(tmp_path / "x.fastq") == [("r1", "ACGT", "line 1"), ("r2", "N", "line 6")]
    assert [record.lowered for record in read(tmp_path / "x.fastq")] == [2, 0]


def test_lines_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffé b \r\nc\t\nd".encode())
    assert rows(tmp_path / "x.txt") == [("1", "é b ", "line 1"), ("2", "c\t", "line 2"), ("3", "d", "line 3")]


def test_json_lines(tmp_path: Path) -> None:
    objects = [{"text": "a", "name": "x", "id": 3}, {"id": 7, "text": "b"}, {"text": "c"}]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, objects)))
    assert rows(tmp_path / "x.jsonl") == [("x", "a", "line 1"), ("7", "b", "line 3"), ("3", "c", "line 5")]
    (tmp_path / "y.ndjson").write_text('{"seq": "ACGT", "gene": "g", "name": "n"}')
    assert rows(tmp_path / "y.ndjson", text_key="seq", name_key="gene") == [("g", "ACGT", "line 1")]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"id": [5, 6, 7] * 50, "text": ["a", "b", "c"] * 50, "other": [0.5] * 150})
    parquet.write_table(table, path, row_group_size=70)
    found = rows(path)
    assert len(found) == 150 and found[:2] == [("5", "a", "row 1"), ("6", "b", "row 2")]
    assert found[-1] == ("7", "c", "row 150")
    assert rows(path, text_key="text", name_key="text")[1] == ("b", "b", "row 2")
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["x", "y", "x"]).dictionary_encode()}), path)
    assert rows(path) == [("1", "x", "row 1"), ("2", "y", "row 2"), ("3", "x", "row 3")]


def test_a_format_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "genes").write_text(">a\nAC\n")
    with pytest.raises(
        InputError, match=r"does not tell its format: .*add --format fasta\|fastq\|jsonl\|parquet\|lines"
    ):
        find_source(tmp_path / "genes")
    assert rows(tmp_path / "genes", format="fasta") == [("a", "AC", "line 1")]
    assert rows(tmp_path / "genes", format="lines") == [("1", ">a", "line 1"), ("2", "AC", "line 2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.fa", b"", "x.fa holds no record"),
        ("x.fa", b">a\nAC\n>b\n>c\nG\n", "x.fa, line 3: the record 'b' is empty; remove it"),
        ("x.fa", b">a\nAC\n>b\n", "x.fa, line 3: the record 'b' is empty"),
        ("x.fa", b">\nAC\n", "x.fa, line 1: the record has no name"),
        ("x.fa", b"AC\n", "x.fa, line 1: a sequence before the first header"),
        ("x.fa", b">a\nA1\n", "x.fa, line 2: '1' is no letter"),
        ("x.fa.gz", b">a\nAC\n", "x.fa.gz: not a whole gzip file"),
        ("x.fa.gz", gzip.compress(b">a\n" + b"ACGT" * 99, mtime=0)[:-9], "x.fa.gz: not a whole gzip file"),
        ("x.fq", b"@a\nACGT\n+\nIII\n", "x.fq, line 1: not FASTQ"),
        ("x.fq", b"@a\nA\n+\nI\n>b\nA\n", "x.fq, line 5: not FASTQ"),
        ("x.fq", b"@a\nA", "x.fq, line 1: not FASTQ"),
        ("x.fq", b"@a\nA.C\n+\nIII\n", "x.fq, line 2: a sequence has letters only"),
        ("x.fq", b"@a\n\n+\n\n", "x.fq, line 1: the record 'a' is empty"),
        ("x.txt", b"a\n\nb\n", "x.txt, line 2: the record '2' is empty"),
        ("x.txt", b"a\n\xff\n", "x.txt, line 2: x.txt is not UTF-8 text"),
        ("x.jsonl", b'{"text": "a"}\n{"text"}\n', "x.jsonl, line 2: Expecting ':' delimiter"),
        ("x.jsonl", b'["a"]\n', "x.jsonl, line 1: expected a JSON object, not list"),
        ("x.jsonl", b'{"txt": "a"}\n', "x.jsonl, line 1: no key 'text'; name the text's with --text-key"),
        ("x.jsonl", b'{"text": 3}\n', "x.jsonl, line 1: 'text' must be a string, not int"),
        ("x.jsonl", b'{"text": "a", "name": true}\n', "x.jsonl, line 1: a name must be a string or a whole number"),
        ("x.jsonl", b'{"text": "a", "name": ""}\n', "x.jsonl, line 1: the record has no name"),
        ("x.jsonl", b'{"text": "", "name": "n"}\n', "x.jsonl, line 1: the record 'n' is empty"),
        ("x.jsonl", b'{"text": "a", "text": "b"}\n', "x.jsonl, line 1: the key 'text' stands there twice"),
        ("x.parquet", b"PAR1", "x.parquet: not a Parquet file that can be read"),
        ("x.bam", b"", "the name of .*x.bam does not tell its format"),
        ("x.json", b"[]", "the name of .*x.json does not tell its format"),
    ],
)
def test_unusable_files_are_named_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(tmp_path)) + 350


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"sequence": ["A"]}, {}, "no column 'text'; it has sequence: name them with --text-key"),
        ({"text": ["A"]}, {"name_key": "gene"}, "no column 'gene'; it has text"),
        ({"text": [1]}, {}, "row 1: 'text' must be a string, not int"),
        ({"text": ["A", None]}, {}, "row 2: 'text' must be a string, not NoneType"),
        ({"text": ["A"], "name": [0.5]}, {}, "row 1: a name must be a string or a whole number, not 0.5"),
    ],
)
def test_unusable_tables(tmp_path: Path, columns: dict[str, list], options: dict[str, str], message: str) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "x.parquet", **options)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for name in ("x.fa", "x.parquet"):
        with pytest.raises(InputError, match=rf"cannot read .*{name}: No such file.*check its name"):
            check_readable(find_source(tmp_path / name))
        with pytest.raises(InputError, match=rf"cannot read .*{name}: [Nn]o such file.*check its name"):
            read(tmp_path / name)
    (tmp_path / "y.fa").mkdir()
    with pytest.raises(InputError, match=r"y\.fa is a folder: name a file"):
        check_readable(find_source(tmp_path / "y.fa"))


def test_options_that_a_format_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="read as fasta, which has no keys"):
        find_source(tmp_path / "x.fa", text_key="seq")
    with pytest.raises(InputError, match=r"format must be one of fasta, .* not 'gff'"):
        find_source(tmp_path / "x.fa", format="gff")


def test_parquet_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"reading Parquet needs pyarrow: pip install 'hyaena\[parquet\]'"):
        find_source(tmp_path / "x.parquet")


@pytest.mark.parametrize("format", FORMATS)
def test_files_are_read_in_bounded_memory(tmp_path: Path, format: str) -> None:
    """Sixteen records of a million characters take the memory of a few."""
    letters = "ACGT" * 250_000
    writers = {
        "fasta": lambda: "".join(f">{i}\n{letters}\n" for i in range(16)),
        "fastq": lambda: "".join(f"@{i}\n{letters}\n+\n{letters}\n" for i in range(16)),
        "jsonl": lambda: "".join(f'{{"text": "{letters}"}}\n' for _ in range(16)),
        "lines": lambda: f"{letters}\n" * 16,
    }
    path = tmp_path / "x"
    if format == "parquet":
        parquet.write_table(pyarrow.table({"text": [letters] * 16}), path, row_group_size=2)
    else:
        path.write_text(writers[format]())
    tracemalloc.start()
    assert sum(len(record.text) for record in read_records(find_source(path, format=format))) == 16_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9_000_000


def test_windows_of_a_record() -> None:
    """Every letter is one window's own, and windows that overlap have the letters of their neighbours on both sides."""
    record, text = Record(4, "chr1", "", "line 3"), "ABCDEFGHIJK"
    found = list(cut(record, [Piece(text, 2)], 5, 2))
    assert [(w.name, w.text, w.before, w.after, w.start, w.lowered) for w in found] == [
        ("chr1:0-3", "ABCDE", 0, 2, 0, 2),
        ("chr1:3-6", "BCDEFGH", 2, 2, 3, 0),
        ("chr1:6-9", "EFGHIJK", 2, 2, 6, 0),
        ("chr1:9-11", "HIJK", 2, 0, 9, 0),
    ]
    assert [w.text for w in cut(record, [Piece(text)], 11, 0)] == [text]
    for window, overlap in ((3, 0), (4, 3), (5, 2), (20, 5)):
        whole = list(cut(record, [Piece(text, 11)], window, overlap))
        assert "".join(w.text[w.before : len(w.text) - w.after] for w in whole) == text
        for size in range(1, 12):  # the same, wherever the text comes in pieces
            pieces = (Piece(part, len(part)) for part in (text[i : i + size] for i in range(0, 11, size)))
            found = list(cut(record, pieces, window, overlap))
            assert [w._replace(lowered=0) for w in found] == [w._replace(lowered=0) for w in whole]
            assert sum(w.lowered for w in found) == 11


def test_windows_hold_a_part_of_a_contig(tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    path.write_text(">a\n" + "ACGT" * 4_000_000 + "\n>b\n" + "acgt" * 4_000_000)  # a chromosome may be one line
    tracemalloc.start()
    lengths = [0, 0]
    for window in read_records(find_source(path, window=100_000, overlap=50_000)):
        lengths["ab".index(window.contig)] += len(window.text) - window.before - window.after
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [16_000_000, 16_000_000] and peak < 10_000_000


def test_windows_are_records_with_numbers_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    path.write_text(">a\nACGTA\n>b\nAC\n")
    found = list(read_records(find_source(path, window=4, overlap=2)))
    assert [(w.index, w.name, w.contig, w.place) for w in found] == [
        (0, "a:0-2", "a", "line 1"),
        (1, "a:2-4", "a", "line 1"),
        (2, "a:4-5", "a", "line 1"),
        (3, "b:0-2", "b", "line 3"),
    ]
