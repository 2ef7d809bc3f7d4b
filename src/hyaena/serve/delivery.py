"""From the engine's thread to the tasks of an event loop: what comes within an interval is handed over together."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

T = TypeVar("T")

STREAM_INTERVAL = 0.02
"""Seconds between the events of a stream: about one picture of a screen, which shows 60 a second."""

MOST = 256
"""Items that a task takes at a time: with all that is reported of them, they take some ten milliseconds to be sent."""


class Inbox(Generic[T]):
    """What has come for one task, which takes all of it when it is told to.

    Items may be added in any thread; everything else happens in that of the event loop.

    Args:
        loop: of the task.
        paced: whether the task wants items while it waits for the last one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, paced: bool) -> None:
        self.paced = paced
        self.items: deque[T] = deque()
        self._loop = loop
        self._due = False
        self._rest = False  # whether it has not taken all of what it was told of
        self._came: asyncio.Future[None] | None = None  # of the task, while it waits

    def tell(self) -> bool:
        """Tell the task that it may take what is here; whether there is something of which it was not told."""
        if self._due or not self.items:
            return False
        self._due = True
        if self._came is not None and not self._came.done():
            self._came.set_result(None)
        return True

    async def take(self) -> list[T]:
        """The items, at least one, when the task is told; of very many the first, and others have a turn."""
        if self._rest:
            await asyncio.sleep(0)
        while not self._due:
            self._came = self._loop.create_future()
            await self._came
        self._due, taken = False, []
        while self.items and len(taken) < MOST:  # the engine may be adding to them
            taken.append(self.items.popleft())
        self._rest = self._due = bool(self.items) and len(taken) == MOST
        return taken


class Delivery:
    """Hands items to the inboxes of an event loop, so that the loop is woken seldom.

    An item that is urgent, or comes more than an interval after the last one that was handed over, is handed over at
    once. Others wait for a timer of the loop, which runs an interval after that: the engine need not wake the loop for
    them, and none waits longer, whatever the engine does meanwhile. What a turn of the engine adds wakes it once.

    Args:
        loop: of the inboxes.
        interval: seconds between two events of a stream; 0 hands every item over immediately.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.loop, self.interval = loop, interval
        self._open: set[Inbox[Any]] = set()
        self._urgent: deque[Inbox[Any]] = deque()
        self._called = False  # whether the loop was woken
        self._timed = False  # whether the timer runs, and need not be

    def open(self, *, paced: bool) -> Inbox[Any]:
        """A new inbox. One that is not paced is told of urgent items only."""
        inbox: Inbox[Any] = Inbox(self.loop, paced=paced)
        if paced:
            self._open.add(inbox)
        return inbox

    def close(self, inbox: Inbox[Any]) -> None:
        """Forget an inbox."""
        self._open.discard(inbox)

    def put(self, inbox: Inbox[T], item: T, *, urgent: bool) -> None:
        """Add an item, from any thread."""
        inbox.items.append(item)
        if urgent:
            self._urgent.append(inbox)
        elif self._timed or not inbox.paced:
            return
        if not self._called:
            self._called = True
            self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._called = False  # first: what is put from now on wakes the loop again
        told = False
        while self._urgent:
            told |= self._urgent.popleft().tell()
        if not self._timed:
            self._tell_all(told)

    def _tell_all(self, told: bool = False) -> None:
        self._timed = False  # first, as above
        for inbox in self._open:
            told |= inbox.tell()
        if told and self.interval:
            self._timed = True
            self.loop.call_later(self.interval, self._tell_all)
