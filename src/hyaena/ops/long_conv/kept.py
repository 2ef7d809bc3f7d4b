"""Tables of a filter that are kept from one pass to the next, for inference.

To make the powers of all poles takes up to a fifth of a pass of a small model on a CPU.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from hyaena.ops.long_conv.blocked import CHUNK, BlockTables
from hyaena.ops.long_conv.modal import ModalFilter, RealModalFilter

MOST_BYTES = 8 * 2**20
"""Tables of more bytes are not kept: beside the matrix products of wide layers it costs little to make them."""

F = TypeVar("F", ModalFilter, RealModalFilter)


class TableStore:
    """Where the module of a filter keeps its tables.

    They are used where the filter holds the same numbers as when they were made: the numbers are compared, so that no
    way to change a parameter is missed. On other devices than a CPU, where to compare would be to wait, none are kept.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Tensor, ...], BlockTables] | None = None

    def __reduce__(self) -> tuple[type[TableStore], tuple[()]]:
        return type(self), ()  # a copy of a module keeps tables of its own

    def attach(self, filter: F) -> F:
        """The same filter, with its tables kept here where that is possible."""
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or filter[0].device.type != "cpu":
            return filter
        modes = filter[0].shape[1]
        if filter.groups * CHUNK * (CHUNK + 4 * modes) * filter.dtype.itemsize > MOST_BYTES:
            return filter
        kept = _KeptModal(*filter) if isinstance(filter, ModalFilter) else _KeptReal(*filter)
        kept.store = self
        return kept  # type: ignore[return-value]

    def tables(self, filter: ModalFilter | RealModalFilter) -> BlockTables:
        """The tables of a filter, made unless they are here."""
        numbers, kept = filter[:2], self._kept
        if kept is not None and all(map(_equal, numbers, kept[0])):
            return kept[1]
        made = BlockTables(filter.modes())
        self._kept = numbers, made
        return made


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class _KeptModal(ModalFilter):
    store: TableStore

    def block_tables(self) -> BlockTables:
        return self.store.tables(self)


class _KeptReal(RealModalFilter):
    store: TableStore

    def block_tables(self) -> BlockTables:
        return self.store.tables(self)
