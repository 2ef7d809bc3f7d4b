"""The signals that end a process, and who handles them for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, what batch systems send, and a terminal that was closed, which Windows does not tell."""


@contextmanager
def handled(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Within it, signals that end the process call ``handle``; for the main thread, which alone may choose so.

    What whoever started the process chose to ignore stays ignored, as ``nohup`` does with SIGHUP. The kernel and the
    shell send a SIGHUP each, so the second one is not taken for impatience: it is ignored until the process ends.
    """

    def call(number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        handle(number, frame)

    before = {number: signal.getsignal(number) for number in ENDING}
    # None is a handler that Python did not install.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, call)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
