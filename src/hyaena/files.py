"""Files that are whole at every moment."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hyaena.errors import OutputError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary sibling, flush it to the disk and rename it over ``path``.

    Raises:
        OutputError: the file cannot be written (a full disk, say); what stood at ``path`` is untouched.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # torch.save reports a failing write of its zip archive as RuntimeError.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {' '.join(str(error).split())}; free some space, the previous file is unharmed"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there; if it stays empty, it is removed again.

    Raises:
        OutputError: another process holds the lock; the message names it.
        OSError: the folder or the lock cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".hyaena.lock"
    try:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise OutputError(f"{folder}: {file.read()} is writing here: wait for it, or stop it") from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        for made in missing:
            with suppress(OSError):
                made.rmdir()
