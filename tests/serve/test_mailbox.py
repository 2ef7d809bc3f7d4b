"""Tokens reach the queues of an event loop in order, and those of a turn wake it once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from hyaena.serve.service import Inbox, Mailbox


def test_tokens_of_a_turn_arrive_in_order_and_wake_the_loop_once() -> None:
    async def receive() -> tuple[list[list[int]], int]:
        loop, mailbox, woken = asyncio.get_running_loop(), Mailbox(), 0
        queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(3)]
        wake = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # pyright: ignore[reportAttributeAccessIssue]
        turn = threading.Thread(target=lambda: [mailbox.put(loop, queues[i % 3].put_nowait, i) for i in range(30)])
        turn.start()
        turn.join()  # the loop waits here, as it does for the interpreter's lock
        found = [[await queue.get() for _ in range(10)] for queue in queues]
        mailbox.put(loop, queues[0].put_nowait, 30)
        found[0].append(await asyncio.wait_for(queues[0].get(), 5))
        return found, woken

    found, woken = asyncio.run(receive())
    assert found == [[*range(0, 31, 3)], [*range(1, 30, 3)], [*range(2, 30, 3)]]
    assert woken == 2


def test_a_reader_takes_all_that_has_come() -> None:
    async def read() -> list[list[int]]:
        inbox: Inbox[int] = Inbox(asyncio.get_running_loop())
        inbox.put(0)
        inbox.put(1)
        found = [await inbox.take()]
        waiting = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        for i in (2, 3):  # before the reader goes on
            inbox.put(i)
        found.append(await waiting)
        inbox.put(4)
        return [*found, await asyncio.wait_for(inbox.take(), 5)]

    assert asyncio.run(read()) == [[0, 1], [2, 3], [4]]
