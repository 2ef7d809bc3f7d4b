"""A pass over some tokens of several rows by the operators of a decoding step, so that it can be captured.

The tokens of the rows stand one after another in x [T,D]; places behind them are padding, which belongs to a row on
a scratch page. Which token is whose, and where a row begins and ends, are tables on the device: a graph that was
captured for T places and R rows reads any rows that fit. ``PackedOperators`` computes what ``StripedHyena.forward``
does with ``counts``; products of all tokens are those of a step of T rows.

The tables are parts of one tensor, so that one copy brings a pass to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from hyaena.ops.gate import gate as multiply_gate
from hyaena.ops.hyena import HyenaState, RowTables
from hyaena.ops.kv import KVState
from hyaena.ops.linear import Linear, linear
from hyaena.ops.long_conv import Filter, ModalFilter
from hyaena.ops.pages import PagedKVState
from hyaena.ops.step import Norm, StepContext
from hyaena.ops.triton.decode import rope_kv
from hyaena.ops.triton.decode.few_rows import Products
from hyaena.ops.triton.decode.operators import FusedDecodeOperators, together
from hyaena.ops.triton.decode.packed_attention import BLOCK_TOKENS, packed_attention
from hyaena.ops.triton.decode.packed_hyena import packed_hyena


@dataclass(frozen=True)
class PackedShape:
    """What a captured pass depends on.

    Attributes:
        tokens: places of tokens.
        rows: places of rows.
        stops: places of states that are copied inside the pass.
        pages: of a row, at the most.
    """

    tokens: int
    rows: int
    stops: int
    pages: int

    @property
    def blocks(self) -> int:
        """The most blocks of neighbouring tokens of one row."""
        return self.tokens // BLOCK_TOKENS + self.rows

    @property
    def sizes(self) -> list[int]:
        """Of the tables, one after another."""
        return (
            [self.tokens] * 3
            + [self.rows] * 3
            + [self.rows + 1, max(1, self.stops), 3 * self.blocks]
            + [(self.rows + 1) * self.pages]
        )


class PackedTables(NamedTuple):
    """Which tokens a pass reads, int32.

    Attributes:
        ids: [T].
        owners: [T], the row of each token; the number of rows for padding.
        lengths: [T], tokens of the row up to this one, itself included.
        begins, counts: [R], the first place of each row, and its tokens.
        last: [R], the place of its last token.
        stop_begins: [R+1], where the stops of each row begin and end.
        stops: [S], numbers of tokens of this pass after which the states of a row are copied, rising.
        blocks: [BLOCKS·3], row, first place and tokens of runs of at most ``BLOCK_TOKENS`` tokens of one row.
        pages: [R+1,W], of each row, and of padding.
    """

    ids: Tensor
    owners: Tensor
    lengths: Tensor
    begins: Tensor
    counts: Tensor
    last: Tensor
    stop_begins: Tensor
    stops: Tensor
    blocks: Tensor
    pages: Tensor

    @classmethod
    def over(cls, numbers: Tensor, shape: PackedShape) -> PackedTables:
        """The tables that lie in a tensor of ``sum(shape.sizes)`` numbers."""
        tables = cls(*numbers.split(shape.sizes))
        return tables._replace(pages=tables.pages.view(shape.rows + 1, shape.pages))

    def fill(
        self,
        ids: Sequence[Sequence[int]],
        pasts: Sequence[int],
        stops: Sequence[Sequence[int]],
        pages: Sequence[Sequence[int]],
        scratch: int,
    ) -> None:
        """Write tables on the host.

        Args:
            ids: of each row.
            pasts: tokens that each row holds before.
            stops: of each row, see above.
            pages: of each row, those that hold its tokens at least.
            scratch: the page that belongs to nobody.
        """
        counts = np.array([len(row) for row in ids], np.int32)
        total, rows = int(counts.sum()), len(counts)
        begins = counts.cumsum() - counts
        t: Any = PackedTables(*(cast("Any", table.numpy()) for table in self))
        for table in t:
            table[:] = 0
        t.owners[:], t.lengths[:], t.pages[:] = len(t.pages) - 1, 1, scratch
        owners = np.arange(rows).repeat(counts)
        t.ids[:total] = [token for row in ids for token in row]
        t.owners[:total] = owners
        t.lengths[:total] = np.arange(1, total + 1) + (np.array(pasts, np.int32) - begins)[owners]
        t.begins[:rows], t.counts[:rows], t.last[:rows] = begins, counts, begins + counts - 1
        ends = np.cumsum([len(row) for row in stops])
        t.stop_begins[1 : rows + 1] = ends
        t.stop_begins[rows + 1 :] = ends[-1:].sum()
        flat = [stop for row in stops for stop in row]
        t.stops[: len(flat)] = flat
        blocks = [
            number
            for row, (begin, count) in enumerate(zip(begins.tolist(), counts.tolist(), strict=True))
            for first in range(0, count, BLOCK_TOKENS)
            for number in (row, begin + first, min(BLOCK_TOKENS, count - first))
        ]
        t.blocks[: len(blocks)] = blocks
        for row, numbers in enumerate(pages):
            here = numbers[: t.pages.shape[1]]
            t.pages[row, : len(here)] = here


class PackedHyenaState(NamedTuple):
    """What a pass changes of a Hyena layer.

    Attributes:
        rows: the state of R rows, which moves to the end of each row's tokens.
        copies: of S rows, where copies at the stops are written to; None where there are no stops.
    """

    rows: HyenaState
    copies: HyenaState | None


class PackedOperators(FusedDecodeOperators):
    """The operators of a pass. The states of Hyena layers are ``PackedHyenaState``, those of attention on pages.

    Args:
        tables: of the pass.
        products, overlap: see ``FusedDecodeOperators``.
    """

    def __init__(self, tables: PackedTables, *, products: Products | None = None, overlap: bool = False) -> None:
        super().__init__(products=products, overlap=overlap)
        self.tables = tables

    def embed(self, ids: Tensor, table: Tensor | Callable[[Tensor], Tensor], context: StepContext) -> Tensor:
        return torch.nn.functional.embedding(ids, table) if isinstance(table, Tensor) else table(ids)

    def last_tokens(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.tables.last)

    def gate(self, x: Tensor, gate: Linear, up: Linear, *, norm: Norm | None = None, activation: str) -> Tensor:
        if together(gate, up) and self.products.takes(x, gate, up):
            return super().gate(x, gate, up, norm=norm, activation=activation)
        x = self.normalise(x, norm)
        return multiply_gate(linear(x, gate), linear(x, up), activation, backend=self.backend)

    def rotate_and_cache(self, qkv: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        return rope_kv.rotate_and_cache(qkv, rows, context, owners=self.tables.owners, overlap=self.overlap)

    def attend(self, q: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        return packed_attention(q, rows, self.tables.blocks, context.lengths, overlap=self.overlap)

    def hyena(
        self, z: Tensor, short_weight: Tensor, short_bias: Tensor | None, long_filter: Filter, state: Any
    ) -> Tensor:
        assert isinstance(long_filter, ModalFilter) and isinstance(state, PackedHyenaState)
        t = self.tables
        rows = RowTables(t.begins, t.counts, t.stop_begins, t.stops)
        return packed_hyena(
            z, short_weight, short_bias, long_filter, state.rows, rows, state.copies, overlap=self.overlap
        )
