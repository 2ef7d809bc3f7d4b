"""Files and folders are the old ones or the new ones, whatever fails, and nobody else's files are touched."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyaena import files
from hyaena.errors import InputError, OutputError
from hyaena.files import (
    JOURNAL,
    LOCK,
    check_place,
    expanded,
    finish_update,
    locked,
    update_folder,
    write_atomically,
)

SOURCE = str(Path(__file__).parents[1] / "src")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- one file --------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"old", b"new"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content and names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_previous_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("old")

    def fails(file: Any) -> None:
        file.write(b"half")
        raise error

    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_atomically(tmp_path / "a", fails)
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == {"a"}


@pytest.mark.parametrize("path", ["", "/", "a\0b"])
def test_a_path_that_names_no_file_is_refused(path: str) -> None:
    for call in (check_place, lambda path: write_atomically(path, lambda file: pytest.fail("it was opened"))):
        with pytest.raises(InputError, match=r"cannot write .*: name a file"):
            call(Path(path))


def test_a_home_of_nobody_is_a_path_as_it_is() -> None:
    assert expanded("~") == Path.home()
    assert expanded("~no-such-user/x") == Path("~no-such-user/x")


def test_the_reason_is_that_of_the_file_and_not_of_the_archive(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            full()
            return 0

    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_atomically(tmp_path / "a.pt", lambda file: torch.save({"a": torch.zeros(9)}, Full()))
    assert not names(tmp_path)


def test_a_users_own_partial_file_and_what_it_points_to_stay(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.partial").symlink_to(tmp_path / "precious")
    (tmp_path / ".a.mine.partial").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "precious").read_text() == "mine"
    assert names(tmp_path) == {"a", "a.partial", ".a.mine.partial", "precious"}


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    (tmp_path / ".a.0123456789abcdef.partial").write_bytes(b"half")
    (tmp_path / ".other.0123456789abcdef.partial").write_bytes(b"half")

    def slow(file: Any) -> None:
        file.write(b"first")
        assert ".a.0123456789abcdef.partial" not in names(tmp_path)
        write_atomically(tmp_path / "a", lambda file: file.write(b"second"))

    write_atomically(tmp_path / "a", slow)
    assert (tmp_path / "a").read_bytes() == b"first"  # the last to finish
    assert names(tmp_path) == {"a", ".other.0123456789abcdef.partial"}


# --- the lock --------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from hyaena.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_who_holds_the_lock_until_that_one_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    try:
        message = rf"run: process {process.pid} on .*, since 20.*, is writing here"
        with pytest.raises(OutputError, match=message), locked(folder):
            pytest.fail("two hold the lock")
    finally:
        process.kill()
        process.communicate()
    assert names(folder) == {LOCK}
    with locked(folder):
        pass
    assert not names(folder)


def test_only_an_empty_folder_that_was_made_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "strangers").write_text("")
    assert names(tmp_path / "a") == {"strangers"}
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    entered, order = threading.Event(), []

    def first() -> None:
        with locked(tmp_path):
            entered.set()
            order.append(1)
            done.wait(5)
            order.append(2)

    done = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(5)
    with pytest.raises(OutputError), locked(tmp_path):
        pass
    done.set()
    with locked(tmp_path, wait=30):
        order.append(3)
    thread.join()
    assert order == [1, 2, 3] and not names(tmp_path)


# --- several files ---------------------------------------------------------------------------------------------------

OLD = {"config.json": "old", "one": "old", "gone": "old"}
NEW = {"config.json": "new", "one": "new", "two": "new"}
STRANGER = {"notes.txt": "mine"}


def write_new(stage: Path) -> set[str]:
    for name, content in NEW.items():
        (stage / name).write_text(content)
    return {"gone", "never there"}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def old_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, content in (OLD | STRANGER).items():
        (folder / name).write_text(content)
    return folder


def test_files_are_replaced_together_and_strangers_stay(tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "f")
    update_folder(folder, write_new)
    assert contents(folder) == NEW | STRANGER
    update_folder(tmp_path / "fresh" / "deep", write_new)
    assert contents(tmp_path / "fresh" / "deep") == NEW


CALLS = [
    (os, "replace"),
    (os, "fsync"),
    (os, "open"),
    (os, "ftruncate"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (Path, "rmdir"),
]


@pytest.mark.parametrize("how", ["killed", "fails once", "interrupted once"])
def test_old_or_new_whatever_call_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    class Killed(BaseException):
        pass

    error = {"killed": Killed(), "fails once": OSError(errno.EIO, "bad disk"), "interrupted once": KeyboardInterrupt()}[
        how
    ]
    seen = set()
    for stop in range(200):
        folder, left = old_folder(tmp_path / str(stop)), [stop]

        def counted(function: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == -1 or (how == "killed" and left[0] < 0):
                    raise error
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in CALLS:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                update_folder(folder, write_new)
                result = "ok"
            except (Killed, OSError, OutputError, KeyboardInterrupt) as caught:
                result = type(caught).__name__
        interrupted = names(folder)
        finish_update(folder)
        found = {name: text for name, text in contents(folder).items() if name != LOCK}
        state = {"new": NEW | STRANGER, "old": OLD | STRANGER}
        assert found in state.values()
        if result == "ok":
            assert found == state["new"]
        if how != "killed":  # nothing is left, but a lock file that could not be removed
            assert not {name for name in interrupted if name.startswith(".") and name != LOCK}
        seen.add("new" if found == state["new"] else "old")
        update_folder(folder, write_new)
        assert contents(folder) == NEW | STRANGER
        if left[0] >= 0:
            break
    assert left[0] >= 0 and seen == {"old", "new"}


def test_a_full_disk_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        update_folder(tmp_path / "a" / "b", full)  # type: ignore[arg-type]
    assert not names(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_moves(tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "f")
    (folder / "two").mkdir()
    with pytest.raises(OSError, match="two is a folder there"):
        update_folder(folder, write_new)
    (folder / "two").rmdir()
    assert contents(folder) == OLD | STRANGER


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    results: list[str] = []

    def writer(number: int) -> None:
        def fill(stage: Path) -> set[str]:
            for name in ("a", "b", "c"):
                (stage / name).write_text(str(number))
            results.append(f"{number}")  # under the lock, so in the order of the updates
            return set()

        update_folder(tmp_path / "f", fill, wait=60)

    threads = [threading.Thread(target=writer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path / "f") == dict.fromkeys("abc", results[-1]) and len(results) == 8


@pytest.mark.parametrize(
    "journal",
    [
        "{",
        "[]",
        "{}",
        '{"stage": ".unfinished-a", "move": {"../out": 1}, "remove": []}',
        '{"stage": ".unfinished-a", "move": {}, "remove": ["../precious"]}',
        '{"stage": "..", "move": {}, "remove": []}',
        '{"stage": ".unfinished-link", "move": {"x": 1}, "remove": []}',
        '{"stage": ".unfinished-a", "move": {"x": 1}, "remove": []}',
        "[" * 100_000,
    ],
)
def test_a_journal_of_somebody_else_touches_nothing(tmp_path: Path, journal: str) -> None:
    (tmp_path / "precious").write_text("mine")
    folder = old_folder(tmp_path / "f")
    (folder / ".unfinished-link").symlink_to(tmp_path)
    (folder / JOURNAL).write_text(journal)
    with pytest.raises(OutputError):
        finish_update(folder)
    assert names(tmp_path) == {"f", "precious"}
    assert names(folder) == {*OLD, *STRANGER, JOURNAL, ".unfinished-link"}


def test_an_update_that_cannot_be_finished_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = old_folder(tmp_path / "f")
    (folder / ".unfinished-a").mkdir()
    (folder / ".unfinished-a" / "one").write_text("new")
    (folder / JOURNAL).write_text(json.dumps({"stage": ".unfinished-a", "move": {"one": 3}, "remove": ["gone"]}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="its new files are complete, but not yet in place"):
            finish_update(folder)
    finish_update(folder)
    assert contents(folder) == {"config.json": "old", "one": "new"} | STRANGER


def test_others_are_what_no_killed_save_left(tmp_path: Path) -> None:
    assert files.others(tmp_path / "nothing") == []
    (tmp_path / ".unfinished-1234").mkdir()
    (tmp_path / LOCK).write_text("")
    assert files.others(tmp_path) == []
    (tmp_path / "x").write_text("")
    assert files.others(tmp_path) == ["x"]
