"""A progress bar of a job that may go on where an earlier process ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """A progress bar with the time that is left.

    Args:
        total: of what is counted.
        unit: its name.
        show: whether there is a bar at all.
    """

    def __init__(self, total: int, *, unit: str, show: bool) -> None:
        self._bar: tqdm[Any] | None = None
        if show:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=f" {unit}", unit_scale=True, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self) -> None:
        """Measure the rate from now on: the model is loaded."""
        if self._bar is not None:
            self._bar.unpause()

    def skip(self, count: int) -> None:
        """Count what an earlier process did, which says nothing of the rate."""
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def window(self) -> Callable[[int], None]:
        """Return what counts in one window: it is called with how many are done of it."""
        before = 0

        def tell(done: int) -> None:
            nonlocal before
            if self._bar is not None:
                self._bar.update(done - before)
            before = done

        return tell
