"""Several rows in one pass without padding, and copies of states inside a pass: how recurrences are cut into pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.ops.hyena import RowTables

Recurrence = Callable[[Tensor, Any, Tensor | None, Tensor | None], tuple[Tensor, Any]]
"""``(z [b,T,E], state, mask bool [b,T] or None, reset bool [b,T] or None) -> (y [b,T,D], state)``, for any T."""

WithStates = Callable[[Tensor, Any, Tensor | None, Sequence[int | Tensor]], tuple[Tensor, Any, Sequence[Any]]]
"""``(z, state, mask, stops) -> (y, state, states)``: a recurrence, and the states after so many steps of z, or after a
number of steps for each row, int [b]."""


class Snapshots:
    """Copies of the layers' states inside a pass: what the cache would hold, had the pass ended there.

    Only states that sum up all tokens are copied. Keys and values of the first tokens are the first in the cache.

    Args:
        stops: row -> numbers of tokens of the pass, 1 … T, after which its states are copied.

    Attributes:
        layer: the layer that is evaluated; the model counts.
    """

    def __init__(self, stops: Mapping[int, Sequence[int]]) -> None:
        self.stops = {row: frozenset(numbers) for row, numbers in stops.items()}
        self.layer = 0
        self._saved: dict[tuple[int, int, int], Any] = {}

    def columns(self, width: int, rows: Sequence[int], padding: Sequence[int]) -> list[int]:
        """The columns of rows that are padded on the left to ``width`` where one of them has a stop, rising."""
        ends = set()
        for row, pad in zip(rows, padding, strict=True):
            for stop in self.stops.get(row, ()):
                if not 1 <= stop <= width - pad:
                    raise InputError(f"a snapshot after {stop} tokens is not part of a pass of {width - pad} tokens")
                ends.add(pad + stop)
        return sorted(ends)

    def places(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """Row and number of tokens of every stop, rising, for rows of so many tokens."""
        found = sorted((row, stop) for row, numbers in self.stops.items() for stop in numbers)
        for row, stop in found:
            if not 1 <= stop <= counts[row]:
                raise InputError(f"a snapshot after {stop} tokens is not part of a pass of {counts[row]} tokens")
        return found

    def save(self, column: int, state: Any, rows: Sequence[int], padding: Sequence[int]) -> None:
        """Copy the states of the rows that have a stop at a column."""
        for place, (row, pad) in enumerate(zip(rows, padding, strict=True)):
            if column - pad in self.stops.get(row, ()):
                self._saved[self.layer, row, column - pad] = state.select([place]).detach()

    def put(self, layer: int, row: int, stop: int, state: Any) -> None:
        """Keep a state that was copied elsewhere."""
        self._saved[layer, row, stop] = state

    def states(self, row: int, stop: int) -> dict[int, Any]:
        """Layer -> state of a row at a stop, of the layers whose mixers have states that sum up all tokens."""
        return {layer: state for (layer, *place), state in self._saved.items() if place == [row, stop]}


def evaluate(
    operator: Recurrence,
    z: Tensor,
    state: Any,
    mask: Tensor | None,
    reset: Tensor | None,
    rows: Sequence[int],
    padding: Sequence[int] | None,
    snapshots: Snapshots | None,
    with_states: WithStates | None,
) -> tuple[Tensor, Any]:
    """Evaluate a recurrence over rows, and save its states where snapshots are wanted.

    Without ``with_states`` the rows are cut there, which costs more.
    """
    stops: list[int] = []
    if snapshots is not None:
        padding = padding or [0] * len(rows)
        stops = snapshots.columns(z.shape[1], rows, padding)
    if snapshots is None or padding is None or not stops:
        return operator(z, state, mask, reset)
    if with_states is not None:
        inner = [stop for stop in stops if stop < z.shape[1]]
        y, state, states = with_states(z, state, mask, inner) if inner else (*operator(z, state, mask, reset), ())
        for stop, saved in zip(inner, states, strict=True):
            snapshots.save(stop, saved, rows, padding)
        snapshots.save(z.shape[1], state, rows, padding)  # to the bit what the rows go on from
        return y, state
    parts = []
    for start, stop in itertools.pairwise([0, *stops, z.shape[1]]):
        if start < stop:
            cut = (None if t is None else t[:, start:stop] for t in (mask, reset))
            y, state = operator(z[:, start:stop], state, *cut)
            snapshots.save(stop, state, rows, padding)
            parts.append(y)
    return torch.cat(parts, dim=1), state


Together = Callable[[Tensor, Any, RowTables, int], tuple[Tensor, Any, Any]]
"""``(z [1,T,E], state of all rows, rows, stops) -> (y [1,T,D], state, states at the stops)``, all rows in one call."""


class Group(NamedTuple):
    """Rows of a packed pass that a sequential operator reads together, padded to the longest.

    Rows that begin are padded on the left, and their padding is masked. Rows with a past are padded on the right, where
    no output sees it, and their states are taken before it: on the left, the state would decay through it.

    Attributes:
        rows: their places in the cache.
        source: int [b,T'], where each step is in the packed pass; the row's first or last token for padding.
        mask: bool [b,T'], False for padding on the left; None where there is none.
        steps: int, where the steps that are not padding are in [b·T'], row after row.
        padding: columns of padding on the left of each row.
        counts: int [b], the steps of rows that are padded on the right; None where there is no such padding.
    """

    rows: list[int]
    source: Tensor
    mask: Tensor | None
    steps: Tensor
    padding: list[int]
    counts: Tensor | None


class Groups(NamedTuple):
    """All rows of a packed pass in groups.

    Attributes:
        groups: each row is in one of them.
        places: int [T], where each position of the pass is in the steps of all groups, one group after another.
        row_places: where each row is in the rows of all groups.
    """

    groups: list[Group]
    places: Tensor
    row_places: list[int]


class Packing:
    """Several rows in one pass over ids [1,T]: the next tokens of each, one row after another, without padding.

    Projections, norms and MLPs read the pass as it is. Attention reads each row's part of it, and a recurrence the rows
    in groups, each row from its own state to its own last token.

    Attributes:
        spans: first and last position (exclusive) of each row in the pass.
        last: int [B], the last position of each row in the pass.
    """

    def __init__(self, lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        self.spans = list(itertools.pairwise(itertools.accumulate(counts, initial=0)))
        self.last = torch.tensor([stop - 1 for _, stop in self.spans], device="cpu").to(device)
        self._lengths, self._device = lengths, device
        self._tables: tuple[RowTables, list[tuple[int, int]]] | None = None
        self._groups: dict[frozenset[int], Groups] = {}

    def groups(self, alone: frozenset[int]) -> Groups:
        """Rows of like lengths, which differ by less than a factor of two, together: those that begin and those with a
        past; the rows ``alone`` each by itself where they have a past."""
        if alone not in self._groups:
            sizes: dict[object, list[int]] = {}
            for row, (length, (start, stop)) in enumerate(zip(self._lengths, self.spans, strict=True)):
                key = (row, "alone") if length and row in alone else ((stop - start).bit_length(), bool(length))
                sizes.setdefault(key, []).append(row)
            groups = [self._group(rows, self._device) for rows in sizes.values()]
            rows = [row for group in groups for row in group.rows]
            places = (
                torch.cat([torch.arange(*self.spans[row], device="cpu") for row in rows]).argsort().to(self._device)
            )
            self._groups[alone] = Groups(groups, places, sorted(range(len(rows)), key=rows.__getitem__))
        return self._groups[alone]

    def _group(self, rows: list[int], device: torch.device) -> Group:
        first, stop = torch.tensor([self.spans[row] for row in rows], device="cpu").T
        counts, past = stop - first, bool(self._lengths[rows[0]])
        width = int(counts.max())
        begin = torch.zeros_like(counts) if past else width - counts  # the column of a row's first step
        columns = torch.arange(width, device="cpu") - begin[:, None]
        inside = (columns >= 0) & (columns < counts[:, None])
        source = torch.minimum(first[:, None] + columns.clamp(min=0), stop[:, None] - 1).to(device)
        steps = inside.flatten().nonzero().flatten().to(device)
        padded = not bool(inside.all())
        mask = inside.to(device) if padded and not past else None
        return Group(rows, source, mask, steps, begin.tolist(), counts.to(device) if padded and past else None)

    def apply(
        self,
        operator: Recurrence,
        z: Tensor,
        state: Any,
        snapshots: Snapshots | None = None,
        with_states: WithStates | None = None,
    ) -> tuple[Tensor, Any]:
        """Evaluate a recurrence of every row: z [1,T,E] and the state of all rows -> y [1,T,D], and the state after.

        Without a state all rows begin, and none is returned.
        """
        parts, states = [], []
        stopped = set() if snapshots is None else {row for row, stops in snapshots.stops.items() if stops}
        groups, places, row_places = self.groups(frozenset(range(len(self.spans)) if with_states is None else stopped))
        for group in groups:
            inputs, before = z[0, group.source], None if state is None else state.select(group.rows)
            if group.counts is not None and with_states is not None:
                y, _, (new,) = with_states(inputs, before, None, [group.counts])
            else:
                y, new = evaluate(
                    operator, inputs, before, group.mask, None, group.rows, group.padding, snapshots, with_states
                )
            parts.append(y.flatten(0, 1)[group.steps])
            states.append(new)
        y = torch.cat(parts)[places].unsqueeze(0)
        return y, None if state is None else states[0].join(states[1:]).select(row_places)

    def apply_together(
        self, together: Together, z: Tensor, state: Any, snapshots: Snapshots | None
    ) -> tuple[Tensor, Any]:
        """``apply`` by a function that evaluates all rows in one call, and copies their states on the way."""
        rows, stops = self._row_tables(snapshots, z.device)
        y, state, copies = together(z, state, rows, len(stops))
        for place, (row, stop) in enumerate(stops):
            assert snapshots is not None
            snapshots.put(snapshots.layer, row, stop, copies.select([place]).detach())
        return y, state

    def _row_tables(self, snapshots: Snapshots | None, device: torch.device) -> tuple[RowTables, list[tuple[int, int]]]:
        """The tables of a pass, the same for all its layers, and row and number of tokens of every stop."""
        if self._tables is None:
            counts = [stop - start for start, stop in self.spans]
            stops = [] if snapshots is None else snapshots.places(counts)
            ends = [sum(row < end for row, _ in stops) for end in range(len(counts) + 1)]
            parts = [[start for start, _ in self.spans], counts, ends, [stop for _, stop in stops] or [0]]
            numbers = torch.tensor([n for part in parts for n in part], dtype=torch.int32, device="cpu").to(device)
            self._tables = RowTables(*numbers.split([len(part) for part in parts])), stops
        return self._tables
