"""What is written can be read by the formats' own readers, and equal rows give equal bytes."""

from __future__ import annotations

import errno
import json
import tracemalloc
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from hyaena import extras
from hyaena.errors import InputError, OutputError, UnsupportedError
from hyaena.jobs import Column, check_output, write_results

COLUMNS = [
    Column("name", "text"),
    Column("tokens", "integer"),
    Column("mean", "real"),
    Column("ranks", "integers"),
    Column("logprobs", "reals"),
    Column("12", "vector"),
    Column("blocks.3", "matrix"),
]


def row(name: str, tokens: int, mean: float = -0.1) -> dict[str, Any]:
    rng = np.random.default_rng(tokens)
    return {
        "name": name,
        "tokens": tokens,
        "mean": mean,
        "ranks": rng.integers(0, 2**40, tokens),
        "logprobs": rng.standard_normal(tokens, np.float32),
        "12": rng.standard_normal(4, np.float32),
        "blocks.3": rng.standard_normal((tokens, 4), np.float32),
    }


ROWS = [row("chr1/é", 3), row("b", 0, float("nan")), row("c", 5, float("-inf"))]


def write(path: Path, rows: list[dict[str, Any]], columns: list[Column] = COLUMNS) -> Path:
    def read(names: Collection[str] | None) -> Any:
        for one in rows:
            yield {name: value for name, value in one.items() if names is None or name in names}

    write_results(path, columns, read)
    return path


def test_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROWS)
    found = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [list(one) for one in found] == [[column.name for column in COLUMNS]] * 3
    assert [one["mean"] for one in found] == [-0.1, None, None]
    for one, expected in zip(found, ROWS, strict=True):
        assert (one["name"], one["tokens"]) == (expected["name"], expected["tokens"])
        assert one["ranks"] == expected["ranks"].tolist()
        assert np.array_equal(np.array(one["blocks.3"], np.float32).reshape(-1, 4), expected["blocks.3"])


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    bad = row("a", 2) | {"logprobs": np.array([-np.inf, 1], np.float32), "12": np.array([np.nan], np.float32)}
    found = json.loads(write(tmp_path / "x.jsonl", [bad]).read_text())
    assert found["logprobs"] == [None, 1.0] and found["12"] == [None]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyaena.jobs.results._GROUP_ROWS", 2)
    table = parquet.read_table(write(tmp_path / "x.parquet", ROWS))
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 2
    assert table.column_names == [column.name for column in COLUMNS]
    assert table["name"].to_pylist() == ["chr1/é", "b", "c"]
    for one, expected in zip(table.to_pylist(), ROWS, strict=True):
        for name in ("ranks", "logprobs", "12"):
            assert np.array_equal(np.array(one[name], expected[name].dtype), expected[name])
        assert np.array_equal(np.array(one["blocks.3"], np.float32).reshape(-1, 4), expected["blocks.3"])
        np.testing.assert_equal(one["mean"], expected["mean"])


def test_npz(tmp_path: Path) -> None:
    with np.load(write(tmp_path / "x.npz", ROWS), allow_pickle=False) as found:
        assert found["name"].tolist() == ["chr1/é", "b", "c"]
        assert found["tokens"].tolist() == [3, 0, 5] and found["mean"].dtype == np.float64
        assert np.array_equal(found["12"], np.stack([one["12"] for one in ROWS]))
        for one in ROWS:
            for name in ("ranks", "logprobs", "blocks.3"):
                assert np.array_equal(found[f"{name}/{one['name']}"], one[name])
        assert len(found.files) == 4 + 3 * 3


def test_one_long_text_takes_no_memory_for_every_row(tmp_path: Path) -> None:
    texts, path = ["A", "", "C" * 10_000, *"GT" * 50], tmp_path / "x.npz"  # an array of 4 MB
    tracemalloc.start()
    write_results(path, [Column("alt", "text")], lambda names: iter([{"alt": text} for text in texts]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with np.load(path) as found:
        assert found["alt"].tolist() == texts
    assert peak < 1_000_000


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".npz"])
def test_equal_rows_give_equal_bytes_and_none_are_a_valid_file(tmp_path: Path, suffix: str) -> None:
    assert write(tmp_path / f"a{suffix}", ROWS).read_bytes() == write(tmp_path / f"b{suffix}", ROWS).read_bytes()
    empty = write(tmp_path / f"c{suffix}", [])
    if suffix == ".parquet":
        assert parquet.read_table(empty).schema == parquet.read_table(tmp_path / "a.parquet").schema
    elif suffix == ".npz":
        with np.load(empty) as found:
            assert {name: found[name].shape for name in found.files} == {
                "name": (0,),
                "tokens": (0,),
                "mean": (0,),
                "12": (0, 0),
            }
    else:
        assert empty.read_bytes() == b""


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".npz"])
@pytest.mark.parametrize("room", [0, 1, 40, 700])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, suffix: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyaena.jobs import results

    path = tmp_path / f"x{suffix}"
    path.write_text("before")
    writer = results.OUTPUT_FORMATS[suffix].write

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, room

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            self.room -= len(memoryview(data).cast("B"))
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setitem(results.OUTPUT_FORMATS, suffix, results._Format(lambda file, *rest: writer(Full(file), *rest)))
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write(path, ROWS)
    assert path.read_text() == "before" and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_signal_while_a_member_is_open_ends_an_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_ = [], zipfile.ZipFile.open

    def interrupted(self: zipfile.ZipFile, *args: Any, **options: Any) -> None:
        opened.append(open_(self, *args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "o.npz", ROWS)
    assert len(opened) == 1 and not list(tmp_path.iterdir())


def test_outputs_have_a_known_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "x.NPZ")
    with pytest.raises(
        InputError, match=r"must end in one of \.parquet, \.jsonl, \.ndjson, \.csv, \.tsv, \.bedgraph, \.npz"
    ):
        check_output(tmp_path / "x.xls")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"writing Parquet needs pyarrow: pip install 'hyaena\[parquet\]'"):
        check_output(tmp_path / "x.parquet")
