"""A journal is whole up to its last mark, wherever it is cut and whatever stands behind the cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyaena.jobs.journal import Journal, Mark

ROWS: list[dict[str, Any]] = [
    {"name": "a", "n": 3, "x": 0.5, "v": np.arange(3, dtype=np.float32)},
    {"name": "é\n", "n": 2**40, "x": math.inf, "v": np.zeros(0, np.float32), "m": np.ones((2, 3), np.float32)},
    {"name": "c", "n": 0, "x": -1e-300, "v": np.arange(5, dtype=np.int64)[::2]},
    {"name": "d", "n": 1, "x": 1.0, "v": np.zeros((0, 4), np.float32)},
]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(
        value.dtype == b[name].dtype and np.array_equal(value, b[name])
        if isinstance(value, np.ndarray)
        else value == b[name]
        for name, value in a.items()
    )


def filled(path: Path) -> Journal:
    journal = Journal(path)
    for index in (1, 0):  # finished in another order than that of the records
        journal.append(index, ROWS[index])
    journal.mark("first")
    for index in (0, 1):
        journal.append(index, ROWS[2 + index])
    journal.mark("second")
    return journal


def test_rows_come_back_in_order_and_exactly(tmp_path: Path) -> None:
    journal = filled(tmp_path / "rows")
    for _ in range(2):  # as written, and opened again
        assert journal.marks == [Mark(2, "first"), Mark(2, "second")] and journal.rows == 4
        for a, b in zip(ROWS, journal.read(), strict=True):
            assert same(a, dict(b))
        assert [dict(row) for row in journal.read(("name", "n"))] == [{"name": r["name"], "n": r["n"]} for r in ROWS]
        assert [row.keys() for row in journal.read(("m",))] == [{"m"} if "m" in row else set() for row in ROWS]
        journal.close()
        journal = Journal(tmp_path / "rows")
    journal.close()


def test_a_journal_cut_anywhere_keeps_what_was_marked(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    filled(path).close()
    whole = path.read_bytes()
    first = whole.index(b'{"rows": 2, "digest": "first"}') + len(b'{"rows": 2, "digest": "first"}')
    for size in (*range(0, len(whole), 5), first - 1, first, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        assert journal.rows == (4 if size == len(whole) else 2 if size >= first else 0), size
        assert [row["name"] for row in journal.read(("name",))] == [row["name"] for row in ROWS[: journal.rows]]
        for index in range(2):
            journal.append(index, ROWS[index])
        journal.mark("again")
        journal.close()
        assert Journal(path).rows == journal.rows


@pytest.mark.parametrize("junk", [b"\0" * 100, b"row\n" + b"\xff" * 30, b"mark" + b"\0" * 16, b"x"])
def test_what_a_failing_machine_left_behind_the_last_mark_is_cut_off(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "rows"
    filled(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole + junk)
    assert Journal(path).rows == 4 and path.read_bytes() == whole


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    """Rows from a damaged one on are made again: of two runs, the second is lost, or both are."""
    path = tmp_path / "rows"
    filled(path).close()
    whole = bytearray(path.read_bytes())
    for position in range(0, len(whole), 3):
        whole[position] ^= 0x10
        path.write_bytes(whole)
        assert Journal(path).rows in (0, 2), position
        whole[position] ^= 0x10


def test_rows_without_a_mark_are_not_kept(tmp_path: Path) -> None:
    journal = filled(tmp_path / "rows")
    journal.append(0, ROWS[0])
    assert journal.rows == 4 and len(list(journal.read())) == 4
    journal.close()
    assert Journal(tmp_path / "rows").rows == 4
