"""Keys and values in pages of 64 tokens, so that rows grow, share a prefix and leave without moving memory.

``PagePool`` is the storage of all attention layers of a model. A page is a number, the same in every layer. The pool
hands out no numbers: its owner, a scheduler, knows which are free. Which pages a row reads is a list of numbers that
all layers of a cache share: ``Cache.pages`` on the host, and ``PageTable`` on the device for one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.arguments import whole
from hyaena.errors import InputError
from hyaena.ops.kv import Run
from hyaena.ops.slots import Slots, slots_of
from hyaena.tensor_files import memory

PAGE = 64
"""Tokens of a page."""


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


class PageTable:
    """The pages of every row of one pass, on the device.

    Attributes:
        numbers: int32 [B,W], the pages of each row in order; those behind a row's length may be any number.
        rows: the same as the host knows them, where it does.
    """

    def __init__(self, numbers: Tensor, rows: Sequence[Sequence[int]] | None = None) -> None:
        self.numbers = numbers
        self.rows = rows
        self._slots: tuple[object, Tensor] | None = None
        self._first: dict[tuple[int, int], int | None] = {}

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device) -> PageTable:
        """The table of rows whose pages the host knows."""
        width = max((len(row) for row in rows), default=0)
        numbers = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int32, device="cpu")
        return cls(numbers.reshape(len(rows), width).to(device), rows)

    def first_of_consecutive(self, row: int, count: int) -> int | None:
        """The first page of a row, if the host knows that its first ``count`` pages follow one another in the pool."""
        if self.rows is None or row >= len(self.rows):  # a place without a row
            return None
        if (row, count) not in self._first:
            pages = list(self.rows[row][:count])
            self._first[row, count] = pages[0] if pages == list(range(pages[0], pages[0] + count)) else None
        return self._first[row, count]

    def slots(self, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Where the next ``counts`` tokens of every row go, int64 [Σ counts]: ``page·PAGE + offset``, row after row.

        All layers of a pass ask for the same slots; they are computed once.
        """
        key = (tuple(lengths), tuple(counts))
        if self._slots is None or self._slots[0] != key:
            spans = [torch.arange(start, start + n, device="cpu") for start, n in zip(*key, strict=True)]
            rows = torch.repeat_interleave(torch.arange(len(spans), device="cpu"), torch.tensor(key[1], device="cpu"))
            rows, positions = torch.stack([rows, torch.cat(spans)]).to(self.numbers.device)
            self._slots = key, self.numbers[rows, positions // PAGE].long() * PAGE + positions % PAGE
        return self._slots[1]


class PagePool:
    """Storage for keys and values of all attention layers, in one allocation.

    ``layers`` are its parts, one per attention layer: slots of keys and of values (``ops.slots``), each
    [G,pages+1,PAGE,width]. The last page, ``scratch``, belongs to nobody: what must be written and means nothing goes
    there.

    Args:
        pages: how many, each of ``PAGE`` tokens.
        shapes: (G, head_dim) of each attention layer.
        dtype, device: of keys and values.

    Raises:
        InputError: fewer than one page, or no layer that keeps keys and values.
    """

    def __init__(
        self, pages: int, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.pages = whole("pages", pages, "a whole number of pages, 1 or more", 1)
        if not shapes:
            raise InputError("the model has no layer with keys and values: it needs no pages, use make_cache")
        shapes = [(groups, slots_of(dtype).width(head_dim)) for groups, head_dim in shapes]
        sizes = [groups * (self.pages + 1) * PAGE * width for groups, width in shapes for _ in range(2)]
        with torch.inference_mode(False):  # storage that is made in inference mode could not be written outside of it
            cpu = torch.device(device).type == "cpu"
            zeros = memory.zeros((sum(sizes),), dtype) if cpu else torch.zeros(sum(sizes), dtype=dtype, device=device)
            parts = zeros.split(sizes)
        shaped = [
            part.view(groups, self.pages + 1, PAGE, width)
            for part, (groups, width) in zip(parts, [shape for shape in shapes for _ in range(2)], strict=True)
        ]
        self.layers = list(zip(shaped[::2], shaped[1::2], strict=True))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(G, head_dim) of each layer."""
        return [(keys.shape[0], slots_of(self.dtype).head_dim(keys.shape[3])) for keys, _ in self.layers]

    @property
    def scratch(self) -> int:
        """The number of the page that belongs to nobody."""
        return self.pages

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.nbytes // (self.pages + 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation, the scratch page among them."""
        return sum(t.nbytes for layer in self.layers for t in layer)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Copy a page to another, in all layers: for a row that goes on from a shared page that is not full."""
        self.check([source, target])
        for layer in self.layers:
            for stored in layer:
                stored[:, target] = stored[:, source]

    def check(self, pages: Sequence[int]) -> list[int]:
        """The pages of a row as a list of numbers.

        Raises:
            InputError: a number that is no page of this pool, or one that occurs twice.
        """
        numbers = [whole("a page", page, f"a number from 0 to {self.pages - 1}", 0, self.pages - 1) for page in pages]
        if len(set(numbers)) < len(numbers):
            raise InputError("a row was given one page twice: the owner of the pool must hand out each page once")
        return numbers


class PagedRows(NamedTuple):
    """Keys and values of one layer, seen through the table of a pass: the rows of ``KVState``, on pages.

    Attributes:
        keys, values: [G,pages+1,PAGE,width], a layer of a pool.
        table: the pages of the rows.
    """

    keys: Tensor
    values: Tensor
    table: PageTable

    @property
    def groups(self) -> int:
        return self.keys.shape[0]

    @property
    def head_dim(self) -> int:
        return self.slots.head_dim(self.keys.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def slots(self) -> Slots:
        return slots_of(self.dtype)

    @property
    def longest(self) -> int:
        """The most tokens that the table has room for in a row."""
        return self.table.numbers.shape[1] * PAGE

    def pointers(self) -> tuple[Tensor, Tensor, int]:
        """What kernels read beside the table: the layer's storage of keys and of values, and slots of each head."""
        return self.keys, self.values, self.keys.shape[1] * PAGE

    def write(self, keys: Tensor, values: Tensor, lengths: Sequence[int], padding: Sequence[int] | None = None) -> None:
        """Store new tokens behind those that the rows hold, see ``KVState.write``."""
        batch, count = keys.shape[0], keys.shape[2]
        keys, values = (t.transpose(0, 1).flatten(1, 2)[None] for t in (keys, values))  # [1,G,B·T,head_dim]
        counts = [count] * batch
        if padding is not None:
            counts = [count - skip for skip in padding]
            kept = torch.cat(
                [torch.arange(row * count + skip, (row + 1) * count, device="cpu") for row, skip in enumerate(padding)]
            )
            keys, values = (t[:, :, kept.to(t.device)] for t in (keys, values))
        self.write_packed(keys, values, lengths, counts)

    def write_packed(self, keys: Tensor, values: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Store new tokens [1,G,T,head_dim], ``counts`` of each row, one row after another."""
        places = self.table.slots(lengths, counts)
        for stored, new in ((self.keys, keys), (self.values, values)):
            stored.flatten(1, 2).index_copy_(1, places, self.slots.encode(new[0].detach()))

    def row(self, row: int, length: int) -> Run:
        """A row that holds so many tokens, as a batch of one: a copy, or a view where its pages follow one another."""
        count = pages_for(length)
        first = self.table.first_of_consecutive(row, count)
        if first is not None:
            return Run(slice(0, 1), *(t.flatten(1, 2)[None].narrow(2, first * PAGE, length) for t in self[:2]))
        numbers = self.table.numbers[row, :count]
        return Run(slice(0, 1), *(t.index_select(1, numbers).flatten(1, 2)[None, :, :length] for t in self[:2]))

    def runs(self, lengths: Sequence[int], extra: int = 0) -> Iterator[Run]:
        """The rows, see ``KVState.runs``.

        Each is a run of its own, so that its numbers do not depend on which other rows have its length.
        """
        for row, length in enumerate(lengths):
            yield self.row(row, length + extra)._replace(rows=slice(row, row + 1))


class PagedKVState:
    """Keys and values of one layer in the pages of a pool: a ``cache.State`` beside ``KVState``.

    It holds no rows of its own. Which pages a row has is the cache's to know, as its length is, so that the verbs that
    move rows have nothing to do here. Rows are read and written ``through`` a table.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def through(self, table: PageTable | None) -> PagedRows:
        """The rows of a pass."""
        if table is None:
            raise InputError("keys and values on pages belong to a cache that make_paged_cache made")
        return PagedRows(self.keys, self.values, table)

    def tensors(self) -> list[Tensor]:
        """None: the storage is the pool's."""
        return []

    def select(self, rows: Sequence[int], room: int | None = None) -> PagedKVState:
        """The layer itself: rows that are copied without their pages."""
        return self

    def keep(self, rows: Sequence[int]) -> PagedKVState:
        """The layer itself; the owner of the pages frees them."""
        return self

    def join(self, others: Sequence[PagedKVState]) -> PagedKVState:
        """The layer itself, which must be that of the others.

        Raises:
            InputError: they are of another pool.
        """
        for other in others:
            self._check_same(other)
        return self

    def reset(self) -> PagedKVState:
        """Nothing to do: slots behind a row's length are never read."""
        return self

    def mark(self) -> None:
        """Nothing: slots that later tokens fill lie behind those of this moment."""

    def rewind(self, mark: PagedKVState | None) -> PagedKVState:
        """Nothing to do: slots behind a row's length are never read."""
        return self

    def reserve(self, lengths: Sequence[int]) -> PagedKVState:
        """Nothing to do: the cache checks that the pages of its rows reach so far."""
        return self

    def first(self, count: int) -> PagedKVState:
        """The layer itself."""
        return self

    def blank(self, rows: int) -> PagedKVState:
        """The layer itself; empty rows use the scratch page."""
        return self

    def put(self, row: int, source: PagedKVState, source_row: int) -> None:
        """Nothing to do: the owner of the table replaces the row's pages.

        Raises:
            InputError: the source is of another pool.
        """
        self._check_same(source)

    def mutated(self) -> list[Tensor]:
        """Nothing: a step that runs twice writes the same numbers to the same slot."""
        return []

    def detach(self) -> PagedKVState:
        """Nothing to do: what is stored has no history."""
        return self

    def _check_same(self, other: PagedKVState) -> None:
        if not isinstance(other, PagedKVState) or other.keys.data_ptr() != self.keys.data_ptr():
            raise InputError("rows on pages of different pools cannot be joined: make their caches with one pool")
