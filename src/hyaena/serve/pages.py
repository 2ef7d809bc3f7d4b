"""Page numbers and who uses them. The storage behind the numbers is the runner's."""

from __future__ import annotations

from collections.abc import Iterable


class Pages:
    """Hands out page numbers 0 … count-1 and counts the users of each; a page without users is free.

    Args:
        count: pages there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def users(self, page: int) -> int:
        return self._users[page]

    def take(self, count: int) -> list[int]:
        """Hand out free pages, each with one user: the caller has looked at ``free``."""
        assert count <= len(self._free), f"{count} pages taken of {len(self._free)} free ones"
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Count one more user of each page."""
        for page in pages:
            assert self._users[page], f"page {page} is free and cannot be shared"
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one user less of each page."""
        for page in pages:
            assert self._users[page], f"page {page} is free already"
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
