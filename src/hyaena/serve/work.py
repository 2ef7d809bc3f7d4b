"""What the engine does with the model beside requests: work in steps, between which streams go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[float, None, T]
"""Work in steps, each of which yields what it was worth in tokens of a pass over prompts."""


@dataclass(eq=False)
class Work:
    """Something that needs the model.

    Attributes:
        steps: of it.
        future: its result. One that is cancelled ends the work at its next step.
    """

    steps: Steps[Any]
    future: Future[Any] = field(default_factory=Future)


class WorkQueue:
    """Work that is to be done, first come first served; the first one is under way."""

    def __init__(self) -> None:
        self.works: deque[Work] = deque()

    def __len__(self) -> int:
        return len(self.works)

    def put(self, steps: Steps[T]) -> Future[T]:
        """Append work; its result."""
        work = Work(steps)
        self.works.append(work)
        return work.future

    def advance(self, worth: float) -> None:
        """Steps of the first work that are worth so many tokens, or all that are left of it."""
        work, done = self.works[0], 0.0
        try:
            while done < worth and not work.future.cancelled():
                done += next(work.steps)
            if not work.future.cancelled():
                return
            work.steps.close()
        except StopIteration as end:
            if work.future.set_running_or_notify_cancel():
                work.future.set_result(end.value)
        except BaseException as error:
            if work.future.set_running_or_notify_cancel():
                work.future.set_exception(error)
        self.works.popleft()

    def give_up(self, error: Exception) -> None:
        """End all work with an error."""
        for work in self.works:
            if work.future.set_running_or_notify_cancel():  # who waits may be cancelling it
                work.future.set_exception(error)
        self.works.clear()
