"""What the engine hands over reaches the tasks of an event loop in order, soon, and seldom wakes the loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyaena.serve.delivery import MOST, Delivery, Inbox
from serve.clients import PATIENCE


class Clock:
    """An event loop's time that the test moves: timers and calls of other threads, without waiting."""

    def __init__(self) -> None:
        self.now, self.woken = 0.0, 0
        self.due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        self.woken += 1
        self.due.append((self.now, next(self._order), function))

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, next(self._order), function))

    def create_future(self) -> Any:
        raise AssertionError("nobody waits in these tests")

    def run_until(self, end: float) -> None:
        """Do what is due up to a time."""
        while self.due and min(self.due)[0] <= end:
            at, _, function = due = min(self.due)
            self.due.remove(due)
            self.now = max(self.now, at)
            function()
        self.now = end


def take(inbox: Inbox[Any]) -> list[Any]:
    """What a task that waits gets now."""
    if not inbox._due:
        return []
    with contextlib.closing(inbox.take()) as coroutine, pytest.raises(StopIteration) as found:
        coroutine.send(None)
    return found.value.value


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 0.05), st.lists(st.tuples(st.floats(0, 0.06), st.integers(0, 3), st.booleans()), max_size=40))
def test_items_come_in_order_and_none_waits_longer_than_the_interval(
    interval: float, puts: list[tuple[float, int, bool]]
) -> None:
    """Also where nothing is put afterwards. The last inbox wants urgent items only."""
    clock: Any = Clock()
    delivery = Delivery(clock, interval)
    inboxes = [delivery.open(paced=i < 3) for i in range(4)]
    at = {}
    got: list[list[int]] = [[] for _ in inboxes]

    def read() -> None:
        for i, inbox in enumerate(inboxes):
            taken = take(inbox)
            got[i] += taken
            if i < 3 and taken:
                assert clock.now - at[taken[0]] <= interval + 1e-9

    def wait(end: float) -> None:
        while clock.due and min(clock.due)[0] <= end:
            clock.run_until(min(clock.due)[0])
            read()
        clock.run_until(end)

    for number, (pause, i, urgent) in enumerate(puts):
        wait(clock.now + pause)
        at[number] = clock.now
        delivery.put(inboxes[i], number, urgent=urgent)
        if urgent:
            wait(clock.now)
            assert got[i][-1] == number
    wait(clock.now + interval)
    wanted = [[number for number, (_, place, _) in enumerate(puts) if place == i] for i in range(4)]
    last = max((number for number, (_, i, urgent) in enumerate(puts) if i == 3 and urgent), default=-1)
    assert got == [*wanted[:3], [number for number in wanted[3] if number <= last]]


def test_a_stream_is_told_once_in_an_interval_and_the_loop_is_not_woken() -> None:
    clock: Any = Clock()
    delivery = Delivery(clock, 0.02)
    inbox, told = delivery.open(paced=True), []
    for number in range(100):  # a token each millisecond
        clock.run_until(number * 0.001)
        if taken := take(inbox):
            told.append((round(clock.now, 6), taken))
        delivery.put(inbox, number, urgent=number == 0)
    assert clock.woken == 1 and [at for at, _ in told] == [0.001, 0.02, 0.04, 0.06, 0.08]
    assert [taken[0] for _, taken in told] == [0, 1, 20, 40, 60]


def test_slow_items_come_at_once() -> None:
    clock: Any = Clock()
    delivery = Delivery(clock, 0.02)
    inbox = delivery.open(paced=True)
    for number in range(5):
        clock.run_until(number * 0.021)
        delivery.put(inbox, number, urgent=False)
        clock.run_until(clock.now)
        assert take(inbox) == [number]
    clock.run_until(1)
    assert not clock.due, "a timer runs although nothing comes"


def test_what_is_urgent_for_one_hands_over_nothing_of_the_others() -> None:
    clock: Any = Clock()
    delivery = Delivery(clock, 0.02)
    one, other, whole = delivery.open(paced=True), delivery.open(paced=True), delivery.open(paced=False)
    delivery.put(one, 0, urgent=True)
    clock.run_until(0.001)
    assert take(one) == [0]
    for inbox in (one, other, whole):
        delivery.put(inbox, 1, urgent=False)
    delivery.put(other, 2, urgent=True)
    clock.run_until(0.002)
    assert take(other) == [1, 2] and take(one) == [] and take(whole) == []
    clock.run_until(0.02)
    assert take(one) == [1] and take(whole) == []
    delivery.put(whole, 2, urgent=True)
    clock.run_until(0.02)
    assert take(whole) == [1, 2]


def test_tokens_of_a_turn_arrive_in_order_and_wake_the_loop_once() -> None:
    async def receive() -> tuple[list[list[int]], int]:
        loop, woken = asyncio.get_running_loop(), 0
        delivery = Delivery(loop, 0)
        inboxes = [delivery.open(paced=True) for _ in range(3)]
        wake = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # pyright: ignore[reportAttributeAccessIssue]
        turn = threading.Thread(target=lambda: [delivery.put(inboxes[i % 3], i, urgent=i % 2 > 0) for i in range(30)])
        turn.start()
        turn.join()  # the loop waits here, as it does for the interpreter's lock
        found = [await inbox.take() for inbox in inboxes]
        delivery.put(inboxes[0], 30, urgent=False)
        found[0] += await asyncio.wait_for(inboxes[0].take(), PATIENCE)
        return found, woken

    found, woken = asyncio.run(receive())
    assert found == [[*range(0, 31, 3)], [*range(1, 30, 3)], [*range(2, 30, 3)]]
    assert woken == 2


def test_threads_and_readers_lose_nothing() -> None:
    """Real threads, a real loop, readers that wait and readers that are late."""
    count = 2000

    async def receive() -> list[list[int]]:
        delivery = Delivery(asyncio.get_running_loop(), 0.002)
        inboxes = [delivery.open(paced=True) for _ in range(8)]

        async def read(inbox: Inbox[int], pause: float) -> list[int]:
            found: list[int] = []
            while len(found) < count:
                found += await inbox.take()
                await asyncio.sleep(pause)
            return found

        def write() -> None:
            rng = random.Random(0)
            for number in range(count):
                for inbox in inboxes:
                    delivery.put(inbox, number, urgent=rng.random() < 0.01)
                if number % 50 == 0:
                    time.sleep(0.004 * rng.random())

        writer = threading.Thread(target=write)
        writer.start()
        reads = asyncio.gather(*(read(inbox, 0.005 * (i % 2)) for i, inbox in enumerate(inboxes)))
        found = await asyncio.wait_for(reads, PATIENCE)
        writer.join()
        return found

    assert asyncio.run(receive()) == [list(range(count))] * 8


def test_a_reader_that_finds_very_many_lets_others_go_on() -> None:
    async def read() -> tuple[list[int], int]:
        delivery, turns = Delivery(asyncio.get_running_loop(), 0), 0
        inbox: Inbox[int] = delivery.open(paced=True)

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        for number in range(10 * MOST + 1):
            delivery.put(inbox, number, urgent=False)
        found, began = [], turns
        while len(found) < 10 * MOST + 1:
            taken = await asyncio.wait_for(inbox.take(), PATIENCE)
            assert len(taken) <= MOST
            found += taken
        task.cancel()
        delivery.put(inbox, -1, urgent=False)
        assert await asyncio.wait_for(inbox.take(), PATIENCE) == [-1]
        return found, turns - began

    found, turns = asyncio.run(read())
    assert found == list(range(10 * MOST + 1)) and turns >= 10


def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    async def read() -> list[int]:
        delivery = Delivery(asyncio.get_running_loop(), 0)
        inbox: Inbox[int] = delivery.open(paced=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(inbox.take(), 0.01)
        delivery.put(inbox, 1, urgent=False)
        return await asyncio.wait_for(inbox.take(), PATIENCE)

    assert asyncio.run(read()) == [1]
