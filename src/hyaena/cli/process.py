"""The process around a command: signals, and standard streams that are closed, full or gone."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any

from hyaena.errors import OutputError
from hyaena.signals import handled


@contextlib.contextmanager
def signals_end_the_process() -> Iterator[None]:
    """Within it, SIGINT raises KeyboardInterrupt, SIGTERM SystemExit(143) and SIGHUP SystemExit(129).

    So unfinished work is cleaned up, and finished work kept. While a module is being imported, they end the process
    immediately: nothing has been written then, and libraries turn an exception in the middle of their imports into
    other errors, or lose it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    with handled(_end):
        yield


def _end(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        with contextlib.suppress(OSError):
            os.write(2, b"hyaena: interrupted\n" if number == signal.SIGINT else b"")
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def signal_behind(error: BaseException) -> BaseException | None:
    """The exception of a signal that became another error while a library cleaned up, as torch's contexts may; or None.

    An output that cannot be written is told nonetheless.
    """
    behind = None if isinstance(error, OutputError) else error.__context__
    while behind is not None and not isinstance(behind, KeyboardInterrupt | SystemExit):
        behind = behind.__context__
    return behind


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Within it, standard streams can be used whatever they are.

    Closed ones are the null device, so that no file that is opened takes their number. Standard error never fails,
    since nobody could be told. Standard output shows a question mark for a character that its encoding lacks.
    """
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            if getattr(sys, name) is None:
                stack.enter_context(_replaced(name, _null_device(number)))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        # When leaving, and not at the end of the process, where a failure would change its exit status.
        stack.callback(_abandon, sys.stdout)
        stack.callback(_abandon, sys.stderr)
        stack.enter_context(_replaced("stderr", _Unfailing(sys.stderr)))
        yield


def _abandon(stream: IO[str]) -> None:
    """Send what a stream still holds, and all that follows, to the null device, if it cannot be written."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # no file descriptor: not a stream of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()


class _Unfailing:
    """A text stream whose writes are lost where they fail."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _null_device(number: int) -> IO[str]:
    """The null device as a stream, and under the number of a standard stream if that is free."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    return open(os.devnull, "r+", encoding="utf-8")


@contextlib.contextmanager
def _replaced(name: str, stream: Any) -> Iterator[None]:
    before = getattr(sys, name)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        setattr(sys, name, before)
