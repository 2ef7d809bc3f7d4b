"""Files and folders that are whole at every moment, whoever else writes there and whenever a process is killed.

- :func:`write_atomically` replaces one file.
- :func:`update_folder` replaces several files of a folder together. The new files are written into a temporary folder
  inside it. One rename then puts a journal in place, and the files are moved as it lists them. Before that rename the
  folder holds the old files, after it the new ones: whoever finds a journal finishes the moves
  (:func:`finish_update`, called before a folder is read).
- :func:`locked` lets one process at a time write into a folder. The kernel ends a lock when its process ends.

Temporary files have names of their own and are locked as long as they are written, so what a killed process left can
be told from what another one is writing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from hyaena.errors import InputError, OutputError, printable

log = logging.getLogger(__name__)

LOCK = ".hyaena.lock"
JOURNAL = ".hyaena.journal"
_STAGE = ".unfinished-"
_PARTIAL = ".partial"
_MAX_JOURNAL = 1_000_000
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary sibling, flush it to the disk and rename it over ``path``.

    Raises:
        InputError: the path names no file.
        OutputError: the file cannot be written (a full disk, say); what stood at ``path`` is untouched.
    """
    if not _names_a_file(path):
        raise InputError(f"cannot write {printable(str(path))}: name a file")
    prefix = f".{path.name[:60]}."
    temporary, descriptor = path, -1
    try:
        _discard_abandoned(path.parent, prefix)
        while descriptor < 0:
            temporary = path.with_name(f"{prefix}{secrets.token_hex(8)}{_PARTIAL}")
            descriptor = _create_locked(temporary)
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    # torch.save reports a failing write of its zip archive as RuntimeError.
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"cannot write {path}: {reason(error)}; {cure(error)}, the previous file is unharmed"
        ) from error
    finally:
        if temporary != path:
            with suppress(OSError):  # it has been renamed where all went well
                temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Check that a file can be written at a path: before an hour of work, not behind it.

    Raises:
        InputError: it cannot.
    """
    usable = _names_a_file(path) and os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)
    if not usable or os.path.isdir(path):
        raise InputError(f"cannot write {printable(str(path))}: name a file in a folder that exists and can be written")


def _names_a_file(path: Path) -> bool:
    """Whether a path can be that of a file: ``.`` and ``/`` have no last name, and NUL is in no name."""
    return bool(path.name) and "\0" not in str(path)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path whose ``~`` is a home; as it is, where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def reason(error: BaseException) -> str:
    """Why a system call or a writer failed, on one line."""
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save says what became of its archive, and not why
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(text.split()) or type(error).__name__, limit=200)


def cure(error: BaseException) -> str:
    """What a user can do about a failed write."""
    if isinstance(error, PermissionError):
        return "change its permissions or choose another place"
    if isinstance(error, (FileNotFoundError, NotADirectoryError, FileExistsError)):
        return "choose another place"
    return "free some space or choose another place"


# --- one process at a time -------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there; if it stays empty, it is removed again.

    Args:
        folder: where one process at a time may write.
        wait: seconds to wait for another process that holds the lock.

    Raises:
        OutputError: another process holds the lock; the message names it.
        OSError: the folder or the lock cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        descriptor = _acquire(folder, time.monotonic() + wait)
        try:
            yield
        finally:
            try:
                with suppress(OSError):  # a lock file that stays is in nobody's way
                    (folder / LOCK).unlink(missing_ok=True)  # while it is locked: no other process can own the name
            finally:
                os.close(descriptor)
    except BaseException:
        _discard_abandoned(folder, LOCK)
        raise
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _acquire(folder: Path, deadline: float) -> int:
    """An open, locked file descriptor of the folder's lock file."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the process that made the folder has just removed it
            continue
        try:
            if _try_lock(descriptor):
                # The last holder may have removed the name between our two calls: then the lock is of no file.
                if _is_named(descriptor, path):
                    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps(holder).encode())
                    taken, descriptor = descriptor, -1
                    return taken
            elif time.monotonic() >= deadline:
                raise OutputError(f"{folder}: {_holder(descriptor)} is writing here: wait for it, or stop it")
            else:
                time.sleep(0.05)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file, unless another process has."""
    import fcntl  # here: it is not there on every system, and reading needs no lock

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("this file system has no locks: make sure that only one process writes there")
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _holder(descriptor: int) -> str:
    """Who wrote a lock file."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return printable(f"process {holder['pid']} on {holder['host']}, since {holder['since']},")
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# --- several files together ------------------------------------------------------------------------------------------


def update_folder(folder: Path, fill: Callable[[Path], Collection[str]], *, wait: float = 0.0) -> None:
    """Replace files of a folder by others: all of them, or none, whatever fails and whenever.

    Args:
        folder: made if it is not there.
        fill: is called with a temporary folder, under the folder's lock. It writes the new files into it and returns
            the names of the files to remove, where no new file replaces them.
        wait: seconds to wait for another process that is writing there.

    Raises:
        OutputError: another process is writing there; or the new files are complete, and could not be moved.
        OSError: or whatever ``fill`` raises: nothing has changed.
    """
    with locked(folder, wait=wait):
        _settle(folder)
        try:
            stage = folder / f"{_STAGE}{secrets.token_hex(4)}"
            stage.mkdir(0o700)
            _decide(folder, stage, fill(stage))
        except BaseException:
            with suppress(OSError):
                _settle(folder)
            raise
        try:
            _settle(folder)
        except BaseException as error:
            _finish(folder)  # a second time: what interrupted the moves may have passed
            if not isinstance(error, OSError):
                raise


def finish_update(folder: Path, *, wait: float = 2.0) -> None:
    """Finish the update of a killed process, if there is one to be finished; called before a folder is read.

    Raises:
        OutputError: it cannot be finished, or another process is doing so for longer than ``wait`` seconds.
    """
    if os.path.lexists(folder / JOURNAL):
        try:
            with locked(folder, wait=wait):
                _finish(folder)
        except OSError as error:
            if os.path.lexists(folder / JOURNAL):  # else its own process has finished it meanwhile
                raise _unfinished(folder, error) from error


def others(folder: Path) -> list[str]:
    """Names in a folder, if it is there, apart from the lock and what a killed process left unfinished."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if name != LOCK and not _is_stage(folder / name))


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _decide(folder: Path, stage: Path, remove: Collection[str]) -> None:
    """Write the journal: from its rename on, the files in ``stage`` are the folder's."""
    move = {file.name: file.stat().st_size for file in sorted(stage.iterdir())}
    for name in (*move, *remove):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
    journal = {"stage": stage.name, "move": move, "remove": sorted(set(remove) - move.keys())}
    draft = stage / JOURNAL
    draft.write_bytes(json.dumps(journal).encode())
    flush(draft)
    flush(stage)
    os.replace(draft, folder / JOURNAL)
    try:
        flush(folder)
    except BaseException:  # what is not on the disk is not decided
        (folder / JOURNAL).unlink()
        raise


def _finish(folder: Path) -> None:
    try:
        _settle(folder)
    except OSError as error:
        raise _unfinished(folder, error) from error


def _unfinished(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder}: its new files are complete, but not yet in place ({reason(error)}): "
        "load it again from an account that may write there"
    )


def _settle(folder: Path) -> None:
    """Under the lock: make the moves of a journal, and remove what was written without one."""
    journal = _read_journal(folder)
    if journal is not None:
        stage = folder / journal["stage"]
        for name, size in journal["move"].items():
            if os.path.lexists(stage / name):
                os.replace(stage / name, folder / name)
            elif not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise OutputError(f"{folder}: {name} of an interrupted save is lost: write the folder again elsewhere")
        flush(folder)
        for name in journal["remove"]:
            (folder / name).unlink(missing_ok=True)
        (folder / JOURNAL).unlink()
        flush(folder)
    for name in os.listdir(folder):
        if _is_stage(folder / name):
            for file in (folder / name).iterdir():
                file.unlink()
            (folder / name).rmdir()


def _read_journal(folder: Path) -> dict[str, Any] | None:
    path = folder / JOURNAL
    if not os.path.lexists(path):
        return None
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError
        with path.open("rb") as file:
            journal = json.loads(file.read(_MAX_JOURNAL))
        stage, move, remove = journal["stage"], journal["move"], journal["remove"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in (stage, *move, *remove))
        sound = stage.startswith(_STAGE) and all(type(size) is int for size in move.values())
        if not (plain and sound) or (folder / stage).is_symlink():
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OutputError(f"{path}: not a journal of this program: remove it") from None
    return journal


def _is_stage(path: Path) -> bool:
    return path.name.startswith(_STAGE) and path.is_dir() and not path.is_symlink()


def _create_locked(path: Path) -> int:
    """A new, locked file; -1 where another writer took it for an abandoned one before it was locked."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    if _try_lock(descriptor) and _is_named(descriptor, path):
        return descriptor
    os.close(descriptor)
    return -1


# --- what killed processes left --------------------------------------------------------------------------------------


def _discard_abandoned(folder: Path, prefix: str) -> None:
    """Remove lock files and partial files whose names begin with ``prefix``, and whose writers are no more."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if not (name.startswith(prefix) and name.endswith((LOCK, _PARTIAL))):
                continue
            with suppress(OSError):  # another writer may be ahead of us, or the file another user's
                descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    if stat.S_ISREG(os.fstat(descriptor).st_mode) and _try_lock(descriptor):
                        (folder / name).unlink()
                finally:
                    os.close(descriptor)
