"""A job gives the same output whatever interrupts it, and wherever."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyaena.errors import InputError, OutputError
from hyaena.files import locked
from hyaena.jobs import Column, open_job
from hyaena.records import Record

COLUMNS = [Column("name", "text"), Column("length", "integer"), Column("bytes", "reals")]
TEXTS = ["ACGT" * (1 + i % 3) + "N" * (i % 5) for i in range(9)]
OPTIONS = {"--model": "cub", "--top": 3, "--missing": None}
WINDOW = 20


def records(texts: Sequence[str] = TEXTS) -> Iterator[Record]:
    return (Record(i, f"r{i}", text, f"line {2 * i + 1}") for i, text in enumerate(texts))


def compute(window: Sequence[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, record in reversed([*enumerate(window)]):
        values = np.frombuffer(record.text.encode(), np.uint8).astype(np.float32)
        yield index, {"name": record.name, "length": len(record.text), "bytes": values}


def run(
    output: Path,
    texts: Sequence[str] = TEXTS,
    *,
    start: Callable[[], Any] = lambda: compute,
    restart: bool = False,
    **options: Any,
) -> int:
    with open_job(output, COLUMNS, OPTIONS | options, restart=restart) as job:
        return job.run(records(texts), start, window=WINDOW)


def stop_after(count: int, error: BaseException) -> Callable[[], Any]:
    """A ``start`` whose computation fails before row ``count``."""
    made = 0

    def failing(window: Sequence[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal made
        for pair in compute(window):
            if made == count:
                raise error
            made += 1
            yield pair

    return lambda: failing


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "x.jsonl"
    assert run(output) == len(TEXTS)
    return output.read_bytes()


def test_rows_are_in_the_order_of_the_records(tmp_path: Path, expected: bytes) -> None:
    rows = [json.loads(line) for line in expected.splitlines()]
    assert [row["name"] for row in rows] == [f"r{i}" for i in range(len(TEXTS))]
    assert [row["length"] for row in rows] == [len(text) for text in TEXTS]


def test_nothing_but_the_output_stays(tmp_path: Path) -> None:
    run(tmp_path / "deep" / "x.npz")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.npz"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".npz"])
@pytest.mark.parametrize("count", range(len(TEXTS)))
def test_an_interrupted_job_goes_on(tmp_path: Path, suffix: str, count: int) -> None:
    run(tmp_path / f"whole{suffix}")
    output = tmp_path / f"x{suffix}"
    with pytest.raises(KeyboardInterrupt):
        run(output, start=stop_after(count, KeyboardInterrupt()))
    assert not output.exists()
    seen: list[str] = []

    def start() -> Any:
        def computing(window: Sequence[Record]) -> Any:
            seen.extend(record.name for record in window)
            return compute(window)

        return computing

    assert run(output, start=start) == len(TEXTS)
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert len(seen) >= len(TEXTS) - count and seen == [f"r{i}" for i in range(len(TEXTS))][-len(seen) :]
    assert not output.with_name(f"x{suffix}.unfinished").exists()


def test_what_is_there_already_is_told(tmp_path: Path) -> None:
    skipped: list[str] = []
    with pytest.raises(KeyboardInterrupt), open_job(tmp_path / "x.jsonl", COLUMNS, {}) as job:
        job.run(records(), stop_after(7, KeyboardInterrupt()), window=WINDOW, skip=lambda _: pytest.fail("nothing"))
    with open_job(tmp_path / "x.jsonl", COLUMNS, {}) as job:
        job.run(records(), lambda: compute, window=WINDOW, skip=lambda record: skipped.append(record.name))
    assert skipped == [f"r{i}" for i in range(6)]


def test_no_model_is_loaded_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    output = tmp_path / "x.jsonl"
    assert run(output, [], start=lambda: pytest.fail("loaded")) == 0
    assert output.read_bytes() == b""


# --- faults ----------------------------------------------------------------------------------------------------------

CALLS = frozenset(
    ("write", "fsync", "replace", "unlink", "rmdir", "mkdir", "open", "truncate", "ftruncate", "flock", "close")
)
"""C functions that change the disk, and methods of files."""


class Fault:
    """Calls ``act`` instead of the disk's call number ``number``; counts the calls."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self.number, self.act, self.count = number, act, 0

    def __enter__(self) -> Fault:
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _called(self, frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__name__", "") in CALLS:
            self.count += 1
            if self.count == self.number:
                self.act()


def run_again(output: Path) -> None:
    try:
        run(output)
    except InputError as error:  # nothing was left to do but to remove files
        assert "is there already" in str(error)


def count_calls(output: Path) -> int:
    with Fault(0, lambda: None) as fault:
        run(output)
    return fault.count


def killed_at(number: int, output: Path) -> None:
    """Run the job in a process that is killed before its call ``number``."""
    child = os.fork()
    if child == 0:
        try:
            with Fault(number, lambda: os.kill(os.getpid(), 9)):
                run(output)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 9, "it ended by itself"


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.integration), 9])
def test_a_process_killed_at_any_call_loses_nothing(tmp_path: Path, expected: bytes, step: int) -> None:
    calls = count_calls(tmp_path / "count.jsonl")
    assert calls > 40
    for number in range(1, calls, step):  # the last one is in __exit__ of the test's own
        output = tmp_path / str(number) / "x.jsonl"
        killed_at(number, output)
        if output.exists():
            assert output.read_bytes() == expected
        run_again(output)
        assert output.read_bytes() == expected
        assert [path.name for path in output.parent.iterdir()] == ["x.jsonl"], number


def test_a_job_killed_again_and_again_comes_to_its_end(tmp_path: Path, expected: bytes) -> None:
    """Each process is killed a few calls further on than the one before."""
    output = tmp_path / "x.jsonl"
    for number in range(6, 60, 2):
        child = os.fork()
        if child == 0:
            try:
                with Fault(number, lambda: os.kill(os.getpid(), 9)):
                    run(output)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
    assert output.read_bytes() == expected and number < 58


@pytest.mark.parametrize(
    ("code", "step"), [pytest.param(errno.ENOSPC, 1, marks=pytest.mark.integration), (errno.ENOSPC, 8), (errno.EIO, 5)]
)
def test_a_failing_call_loses_nothing(tmp_path: Path, expected: bytes, code: int, step: int) -> None:
    calls = count_calls(tmp_path / "count.jsonl")
    failed = 0

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for number in range(1, calls, step):
        output = tmp_path / str(number) / "x.jsonl"
        try:
            with Fault(number, fail):
                run(output)
        except OutputError as error:
            assert os.strerror(code) in str(error) and "\n" not in str(error), number
            failed += 1
        if output.exists():
            assert output.read_bytes() == expected
        run_again(output)
        assert output.read_bytes() == expected
        assert {path.name for path in output.parent.iterdir()} == {"x.jsonl"}, number
    assert failed > calls // step // 2


def test_a_full_disk_says_what_is_kept(tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyaena.jobs.journal import Journal

    output, append, fails_at = tmp_path / "x.jsonl", Journal.append, "r7"

    def full(self: Journal, index: int, row: Any) -> None:
        if row["name"] == fails_at:
            self._file.write(b"row\nhalf a row")
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, index, row)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        with pytest.raises(
            OutputError, match=r"No space left on device; free some space.*; 6 finished rows kept: the same"
        ):
            run(output)
        fails_at = "r0"
        with pytest.raises(OutputError, match=r"No space left on device; free some space or choose another place$"):
            run(tmp_path / "y.jsonl")
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=r"Not a directory; choose another place$"):
            run(tmp_path / "file" / "x.jsonl")
    run(output)
    assert output.read_bytes() == expected


# --- other jobs ------------------------------------------------------------------------------------------------------


def begun(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(output, start=stop_after(6, KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "other"}, r"\(--model was cub, and is other now\)"),
        ({"--top": 4}, r"\(--top was 3, and is 4 now\)"),
        ({"--missing": "x"}, r"\(--missing was not given, and is x now\)"),
        ({"--new": 1}, r"\(--new was not given, and is 1 now\)"),
        ({"--top": None, "--model": "m"}, r"\(--model was cub, and is m now; --top was 3, and is not given now\)"),
    ],
)
def test_other_options_are_refused(tmp_path: Path, change: dict[str, Any], message: str, expected: bytes) -> None:
    output = tmp_path / "x.jsonl"
    begun(output)
    with pytest.raises(InputError, match=message + ".*or add --restart"):
        run(output, **change)
    run(output)
    assert output.read_bytes() == expected


@pytest.mark.parametrize(
    "texts",
    [["T", *TEXTS[1:]], [*TEXTS[:2], "T", *TEXTS[3:]], TEXTS[1:], TEXTS[:2], []],
    ids=["first", "third", "one less", "shorter", "none"],
)
def test_another_input_is_refused(tmp_path: Path, texts: list[str], expected: bytes) -> None:
    output = tmp_path / "x.jsonl"
    begun(output)
    with pytest.raises(InputError, match=r"the input has changed since .* give the same input, or add --restart"):
        run(output, texts, start=lambda: pytest.fail("loaded"))
    run(output)
    assert output.read_bytes() == expected


def test_an_input_that_has_grown_is_worked_through(tmp_path: Path) -> None:
    output = tmp_path / "x.jsonl"
    begun(output)
    assert run(output, [*TEXTS, "ACGT"]) == len(TEXTS) + 1


def test_restart_begins_again(tmp_path: Path, expected: bytes) -> None:
    output = tmp_path / "x.jsonl"
    begun(output)
    run(output, TEXTS[::-1], restart=True)
    assert json.loads(output.read_text().splitlines()[0])["length"] == len(TEXTS[-1])
    with pytest.raises(InputError, match="is there already: name another, or add --restart to replace it"):
        run(output)
    with pytest.raises(KeyboardInterrupt):
        run(output, start=stop_after(6, KeyboardInterrupt()), restart=True)
    assert output.exists()  # until the new one is complete
    run(output)
    assert output.read_bytes() == expected


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "x.jsonl.unfinished"),
        pytest.raises(OutputError, match=r"process \d+ on .* is writing here"),
    ):
        run(tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_before_the_first_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError), open_job(tmp_path / "deep" / "x.jsonl", COLUMNS, {}) as job:
        assert job.keep_input(io.BytesIO(b"ACGT")).read_bytes() == b"ACGT"
        raise InputError("bad record")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [InputError("no such layer"), KeyboardInterrupt()], ids=["error", "interrupted"])
def test_a_job_that_kept_no_row_leaves_nothing(tmp_path: Path, expected: bytes, error: BaseException) -> None:
    output = tmp_path / "x.jsonl"
    with pytest.raises(type(error)):
        run(output, start=stop_after(1, error), wrong="option")
    assert list(tmp_path.iterdir()) == []
    run(output)
    assert output.read_bytes() == expected


def test_options_of_a_killed_job_that_kept_no_row_do_not_count(tmp_path: Path, expected: bytes) -> None:
    output = tmp_path / "x.jsonl"
    (folder := tmp_path / "x.jsonl.unfinished").mkdir()
    (folder / "job.json").write_text(json.dumps({"options": {"--model": "other"}}))
    run(output)
    assert output.read_bytes() == expected and list(tmp_path.iterdir()) == [output]


def test_what_cannot_be_an_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(InputError, match="is a folder: name a file"):
        run(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="must end in one of"):
        run(tmp_path / "x.txt")
    (tmp_path / "y").write_text("")
    with pytest.raises(OutputError, match=r"cannot write into .*y.x\.jsonl\.unfinished: Not a directory"):
        run(tmp_path / "y" / "x.jsonl")
    begun(tmp_path / "z.jsonl")
    (tmp_path / "z.jsonl.unfinished" / "job.json").write_text("{")
    with pytest.raises(InputError, match="is damaged: add --restart to begin again"):
        run(tmp_path / "z.jsonl")
