"""Which of several servers gets a request: the one that has read the beginning of its prompt, unless it is too busy.

A prompt is cut into blocks of ``BLOCK`` characters or ids, and every beginning of whole blocks has a digest. Who routes
remembers which server got which beginning, and sends a prompt to the server that got its longest one. So the turns of a
conversation go to one server, whose prefix cache has the turns before. No tokenizer is needed, and no text is kept.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

R = TypeVar("R", bound=Hashable)

BLOCK = 64
"""Characters or ids of a block: about a page of the tokens of bytes, a part of one of others."""

MAX_BLOCKS = 1024
"""Blocks of a prompt that are looked at."""


def beginnings(path: str, body: bytes) -> list[bytes]:
    """Digests of the beginnings of a request's prompt, the shortest first.

    Requests of other models, or with another ``cache_salt``, have none in common. None for requests that generate
    nothing, and for bodies that the server will refuse.

    Args:
        path: of the request.
        body: of the request.
    """
    if not path.endswith("/completions"):
        return []
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return []
    prompt = _prompt(data) if isinstance(data, dict) else None
    if prompt is None:
        return []
    digest = hashlib.blake2b(repr((data.get("model"), data.get("cache_salt"))).encode(errors="replace"), digest_size=16)
    found = []
    for end in range(BLOCK, min(len(prompt), BLOCK * MAX_BLOCKS) + 1, BLOCK):
        digest.update(repr(prompt[end - BLOCK : end]).encode(errors="replace"))
        found.append(digest.digest())
    return found


def _prompt(data: dict[str, Any]) -> str | list[Any] | None:
    """The text or the ids that a body begins with."""
    if isinstance(messages := data.get("messages"), list):
        return "".join(f"{m.get('role')}\0{_text(m.get('content'))}\0" for m in messages if isinstance(m, dict))
    prompt = data.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    return prompt if isinstance(prompt, str | list) else None


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text")) for part in content if isinstance(part, dict))
    return str(content)


class Affinity(Generic[R]):
    """What one process that routes knows of the servers.

    Args:
        slack: requests that the server with the prefix may have more than the one with the fewest: beyond that, the
            prefix is read again there.
        capacity: beginnings to remember; the least recently used go first.
    """

    def __init__(self, *, slack: int = 16, capacity: int = 200_000) -> None:
        self.slack, self.capacity = slack, capacity
        self._homes: OrderedDict[bytes, R] = OrderedDict()
        self._running: dict[R, set[str]] = {}

    def rank(self, starts: Sequence[bytes], servers: Sequence[R]) -> list[R]:
        """The servers, the best first.

        Where no one has read the beginning, those with the fewest requests come first. Among equals, a beginning has
        one order of the servers in every process that routes.
        """
        first = starts[0] if starts else random.randbytes(16)
        load = {server: len(self._running.get(server, ())) for server in servers}
        ranked = sorted(servers, key=lambda server: (load[server], _mix(first, server)))
        home = next((home for start in reversed(starts) if (home := self._homes.get(start)) in load), None)
        if home is not None and load[home] < load[ranked[0]] + self.slack:
            ranked.remove(home)
            ranked.insert(0, home)
        return ranked

    def began(self, request: str, starts: Sequence[bytes], server: R) -> None:
        """A request went to a server."""
        self._running.setdefault(server, set()).add(request)
        for start in starts:
            self._homes[start] = server
            self._homes.move_to_end(start)
        while len(self._homes) > self.capacity:
            self._homes.popitem(last=False)

    def ended(self, request: str, server: R) -> None:
        """A request has ended, well or not."""
        self._running.get(server, set()).discard(request)

    def lost(self, server: R) -> None:
        """A server is gone."""
        self._running.pop(server, None)


def _mix(start: bytes, server: Hashable) -> bytes:
    return hashlib.blake2b(start + str(server).encode(errors="replace"), digest_size=8).digest()
