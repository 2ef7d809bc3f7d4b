"""The verbs of a state whose tensors all have the row as their first axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hyaena.errors import InputError
from hyaena.tensor_files.memory import Shelf

S = TypeVar("S", bound="RowTensors")


class RowTensors:
    """Mixin for a NamedTuple of tensors [B, ...]: a state of constant size per row. See ``hyaena.cache.State``."""

    __slots__ = ()

    if TYPE_CHECKING:

        def __iter__(self) -> Iterable[Tensor]: ...

    def tensors(self) -> list[Tensor]:
        return list(self)  # type: ignore[arg-type]

    def select(self: S, rows: Sequence[int], room: int | None = None) -> S:
        """Copy the given rows, in that order; the size does not depend on the number of tokens."""
        if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):  # no index goes to the device
            return self._map(lambda t: t[rows[0] : rows[-1] + 1].clone())
        return self._map(lambda t: t[torch.as_tensor(rows, device=t.device)])

    def keep(self: S, rows: Sequence[int]) -> S:
        """Drop all rows but these."""
        return self.select(rows)

    def join(self: S, others: Sequence[S]) -> S:
        """Append the rows of other states of the same kind."""
        columns = list(zip(self.tensors(), *(other.tensors() for other in others), strict=True))
        if any(t.shape[1:] != c[0].shape[1:] or t.dtype != c[0].dtype for c in columns for t in c):
            raise InputError(
                "states of different sizes cannot be joined: make the caches with the same method and dtype"
            )
        return type(self)(*(torch.cat(column) for column in columns))

    def reset(self: S) -> S:
        """Forget everything."""
        return self._map(torch.zeros_like)

    def mark(self: S) -> S:
        """A copy: what was forgotten cannot be computed back."""
        return self._map(torch.clone)

    def rewind(self: S, mark: S | None) -> S:
        """Return to a copy."""
        assert mark is not None
        return mark._map(torch.clone)

    def reserve(self: S, lengths: Sequence[int]) -> S:
        """Nothing to do: the size does not depend on the number of tokens."""
        return self

    def first(self: S, count: int) -> S:
        """The first rows, over the same storage."""
        return self._map(lambda t: t[:count])

    def blank(self: S, rows: int) -> S:
        """An empty state of this kind and size for so many rows."""
        return self._map(lambda t: t.new_zeros(rows, *t.shape[1:]))

    def settled(self: S, shelf: Shelf) -> S:
        """On large pages."""
        return self._map(shelf.settled)

    def put(self: S, row: int, source: S, source_row: int) -> None:
        """Overwrite a row, in place, by a row of another state."""
        for mine, theirs in self.pairs(row, source._map(lambda t: t[source_row : source_row + 1])):
            mine.copy_(theirs)

    def mutated(self) -> list[Tensor]:
        """Everything: a step that ran twice would move the state on twice."""
        return self.tensors()

    def detach(self: S) -> S:
        """The same numbers without their autograd history."""
        return self._map(torch.Tensor.detach)

    def _map(self: S, function) -> S:  # type: ignore[no-untyped-def]
        return type(self)(*(function(t) for t in self.tensors()))

    def pairs(self: S, start: int, source: S) -> list[tuple[Tensor, Tensor]]:
        """What ``copy_all`` copies to overwrite the rows from ``start`` on by all rows of another state.

        Raises:
            InputError: the states are of different sizes.
        """
        pairs = list(zip(self.tensors(), source.tensors(), strict=True))
        if any(mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype for mine, theirs in pairs):
            raise InputError(
                "rows of one decoder must have states of one size: make their caches with the same method and dtype"
            )
        return [(mine[start : start + len(theirs)], theirs) for mine, theirs in pairs]


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first, those of one dtype in one launch."""
    together: Any = torch
    for dtype in {target.dtype for target, _ in pairs}:
        alike = [pair for pair in pairs if pair[0].dtype == dtype]
        together._foreach_copy_([target for target, _ in alike], [source for _, source in alike], non_blocking=True)
