"""The process of the ``hyaena`` command, and of ``python -m hyaena``."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # see hyaena/__init__.py
if TYPE_CHECKING:
    from types import FrameType


def main() -> int:
    """Run the command; a Ctrl-C before it can handle one, or after it has ended, ends the process quietly."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)  # before anything that takes time to import
    from hyaena.cli import main

    return main()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)  # as a shell reports a signal


if __name__ == "__main__":
    sys.exit(main())
