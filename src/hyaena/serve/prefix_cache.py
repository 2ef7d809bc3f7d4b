"""Which pages and states of earlier requests a new prompt can start from. Numbers only: the tensors are the runner's.

For each adapter and salt a tree over tokens, one page of tokens per node. The keys and values of a page are shared by
all prompts whose path leads through its node. Attention could start behind any page; Hyena layers need their state at
that place, so some nodes also have a *snapshot* of the states. A prompt starts from the deepest node on its path that
has one.

Snapshots have a budget. Those that lie at the end of a prompt or a turn are the likeliest to be used again, those on a
coarse grid bound what any prompt has to read again, and the rest are a luxury: they are taken while there is room, and
go first, then the grid, then the ends, each least recently used first. Pages go least recently used first, from the
leaves on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from hyaena.serve.pages import Pages

GRID_PAGES = 4
"""Snapshots at multiples of so many pages outlive those between them: at most 4 · 64 tokens are then read again."""


def shared_tokens(one: Sequence[int], other: Sequence[int], step: int) -> int:
    """How many tokens two sequences begin with alike, counted in steps; an equal end counts in full."""
    most, count = min(len(one), len(other)), 0
    while count < most and one[count : count + step] == other[count : count + step]:
        count += step
    return min(count, most)


class Rank(IntEnum):
    """What a snapshot is worth; the lowest are dropped first."""

    BETWEEN = 0
    GRID = 1
    END = 2


@dataclass(eq=False)
class Node:
    """One page of tokens behind those of its parent.

    Attributes:
        tokens: of the page; empty at a root.
        page: its number; -1 at a root.
        depth: pages from the root to here, this one included.
        snapshot: the number of the snapshot of the states behind the page, or None.
        rank: what the snapshot is worth.
    """

    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    depth: int
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    snapshot: int | None = None
    rank: Rank = Rank.BETWEEN


@dataclass(frozen=True)
class Match:
    """What a prompt can start from.

    Attributes:
        length: tokens that need not be read.
        pages: that hold their keys and values; the caller shares them before anything else is asked.
        snapshot: number of the states behind them; None where length is 0.
    """

    length: int = 0
    pages: tuple[int, ...] = ()
    snapshot: int | None = None


class PrefixCache:
    """The tree, and the numbers of snapshots.

    Args:
        pages: that nodes and requests share.
        page_size: tokens per page.
        max_snapshots: snapshots at any time; 0 turns the cache off.
    """

    def __init__(self, pages: Pages, *, page_size: int, max_snapshots: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self.max_snapshots = max_snapshots
        self._roots: dict[Hashable, Node] = {}
        self._recent: OrderedDict[Node, None] = OrderedDict()  # least recently used first; children before parents
        self._snapshots: dict[Rank, OrderedDict[Node, None]] = {rank: OrderedDict() for rank in Rank}
        self._free = list(range(max_snapshots - 1, -1, -1))
        self._dropped: set[int] = set()  # snapshots that the runner still holds

    @property
    def snapshots(self) -> int:
        """Snapshots in the tree."""
        return sum(len(nodes) for nodes in self._snapshots.values())

    @property
    def cached_pages(self) -> int:
        """Pages in the tree."""
        return len(self._recent)

    def match(self, tokens: Sequence[int], tree: Hashable = "") -> Match:
        """The longest prefix of the tokens, less than all of them, that ends behind a page with a snapshot."""
        path = self._path(tokens, tree, (len(tokens) - 1) // self.page_size)
        while path and path[-1].snapshot is None:
            path.pop()
        if not path:
            return Match()
        self._touch(path)
        return Match(len(path) * self.page_size, tuple(node.page for node in path), path[-1].snapshot)

    def take_snapshot_numbers(self, ranks: Sequence[Rank]) -> list[int | None]:
        """Numbers for new snapshots, one per rank. None where only snapshots worth more would have to go.

        One between the places of the grid takes nobody's place.
        """
        return [self._take_number(rank) for rank in ranks]

    def insert(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        snapshots: Mapping[int, tuple[int, Rank]],
        tree: Hashable = "",
    ) -> None:
        """Add the full pages of a sequence, and snapshots of its states.

        Args:
            tokens: whose keys and values the pages hold.
            pages: of the sequence, in order; the tree becomes one more user of those that it did not have.
            snapshots: number of tokens before the snapshot, a multiple of the page -> its number and rank.
            tree: which of the trees; prompts find nothing in another one.
        """
        deepest = max((length // self.page_size for length in snapshots), default=0)
        node = self._roots.setdefault(tree, Node((), -1, None, 0))
        path = []
        for depth in range(deepest):  # pages behind the last snapshot could not be used
            key = tuple(tokens[depth * self.page_size : (depth + 1) * self.page_size])
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(key, pages[depth], node, depth + 1)
                self.pages.share([child.page])
            node = child
            path.append(node)
            if (given := snapshots.get(node.depth * self.page_size)) is not None:
                self._attach(node, *given)
        self._touch(path)
        if not node.children and node.parent is None:
            del self._roots[tree]

    def drop_numbers(self, numbers: Sequence[int]) -> None:
        """Give back numbers of snapshots that were taken and not inserted."""
        self._dropped.update(numbers)
        self._free += numbers

    def free_pages(self, wanted: int) -> int:
        """Drop leaves, least recently used first, until so many pages are free or nothing is left to drop.

        Pages that a request uses stay. Returns the number of free pages.
        """
        if self.pages.free < wanted:
            for node in list(self._recent):  # once: what becomes a leaf by this comes behind it
                if node in self._recent and not node.children and self.pages.users(node.page) == 1:
                    self._remove(node)
                    if self.pages.free >= wanted:
                        break
        return self.pages.free

    def forget(self) -> list[int]:
        """Numbers of snapshots that were dropped since the last call, and are not about to be stored anew."""
        dropped, self._dropped = sorted(self._dropped), set()
        return dropped

    def clear(self) -> None:
        """Drop everything that no request uses."""
        self.free_pages(self.pages.count + 1)

    def _path(self, tokens: Sequence[int], tree: Hashable, depth: int) -> list[Node]:
        node, path = self._roots.get(tree), []
        while node is not None and len(path) < depth:
            start = len(path) * self.page_size
            node = node.children.get(tuple(tokens[start : start + self.page_size]))
            if node is not None:
                path.append(node)
        return path

    def _touch(self, path: Sequence[Node]) -> None:
        """Mark nodes as used: the deepest first, so that a parent is always more recent than its children."""
        for node in reversed(path):
            self._recent[node] = None
            self._recent.move_to_end(node)
        if path and path[-1].snapshot is not None:
            self._snapshots[path[-1].rank].move_to_end(path[-1])

    def _attach(self, node: Node, number: int, rank: Rank) -> None:
        if node.snapshot is not None:  # another request brought it; the worth is that of the better reason
            self.drop_numbers([number])
            if rank > node.rank:
                del self._snapshots[node.rank][node]
                node.rank = rank
                self._snapshots[rank][node] = None
            return
        node.snapshot, node.rank = number, rank
        self._snapshots[rank][node] = None

    def _take_number(self, rank: Rank) -> int | None:
        for lower in Rank:
            if self._free or lower > rank or rank is Rank.BETWEEN:
                break
            if self._snapshots[lower]:
                self._drop_snapshot(next(iter(self._snapshots[lower])))
        if not self._free:
            return None
        number = self._free.pop()
        self._dropped.discard(number)  # what is stored under it now takes the place of what was
        return number

    def _drop_snapshot(self, node: Node) -> None:
        """Drop a snapshot, and the nodes that no other snapshot lies behind."""
        assert node.snapshot is not None
        del self._snapshots[node.rank][node]
        self.drop_numbers([node.snapshot])
        node.snapshot = None
        while node.parent is not None and not node.children and node.snapshot is None:
            node = self._unlink(node)

    def _remove(self, leaf: Node) -> None:
        """Drop a leaf, and its ancestors as far as no other snapshot lies behind them."""
        if leaf.snapshot is not None:
            self._drop_snapshot(leaf)
        else:
            self._unlink(leaf)

    def _unlink(self, leaf: Node) -> Node:
        """Remove a leaf without a snapshot; its parent."""
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.tokens]
        del self._recent[leaf]
        self.pages.release([leaf.page])
        if parent.parent is None and not parent.children:
            self._roots = {tree: root for tree, root in self._roots.items() if root is not parent}
        return parent
