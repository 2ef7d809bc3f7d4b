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


class PackedHost:
    """The tables of passes of one shape on the host, in memory that each pass fills anew and one copy sends.

    Args:
        shape: of the passes.
        scratch: the page that belongs to nobody.
        pinned: the memory can be copied to a GPU without being waited for.

    Attributes:
        numbers: the tables, int32 [``sum(shape.sizes)``].
        read: of the last pass, when it has read them; None unless pinned.
    """

    def __init__(self, shape: PackedShape, scratch: int, *, pinned: bool) -> None:
        self.numbers = torch.empty(sum(shape.sizes), dtype=torch.int32, pin_memory=pinned, device="cpu")
        self._all = self.numbers.numpy()
        t: Any = PackedTables(*(cast("Any", table.numpy()) for table in PackedTables.over(self.numbers, shape)))
        self.read = torch.cuda.Event() if pinned else None
        self._tables = t
        self._all[:] = 0
        t.owners[:], t.lengths[:], t.pages[:] = shape.rows, 1, scratch
        self._blank = self._all.copy()  # padding only

    def fill(
        self,
        ids: Sequence[Sequence[int]],
        pasts: Sequence[int],
        stops: Sequence[Sequence[int]],
        pages: Sequence[Sequence[int]],
    ) -> None:
        """Write the tables of a pass.

        Args:
            ids: of each row.
            pasts: tokens that each row holds before.
            stops: of each row, see ``PackedTables``.
            pages: of each row, those that hold its tokens at least.
        """
        if self.read is not None:
            self.read.synchronize()
        t, place, stop, block = self._tables, 0, 0, 0
        self._all[:] = self._blank
        for row, (tokens, past, cuts, numbers) in enumerate(zip(ids, pasts, stops, pages, strict=True)):
            end = place + len(tokens)
            t.ids[place:end] = tokens
            t.owners[place:end] = row
            t.lengths[place:end] = range(past + 1, past + 1 + len(tokens))
            t.begins[row], t.counts[row], t.last[row] = place, len(tokens), end - 1
            t.stops[stop : stop + len(cuts)] = cuts
            stop += len(cuts)
            t.stop_begins[row + 1 :] = stop
            runs = [n for at in range(place, end, BLOCK_TOKENS) for n in (row, at, min(BLOCK_TOKENS, end - at))]
            t.blocks[block : block + len(runs)] = runs
            block += len(runs)
            here = numbers[: t.pages.shape[1]]
            t.pages[row, : len(here)] = here
            place = end

    def sent(self) -> None:
        """Say that all that reads the tables was launched: they are filled again when it has ended."""
        if self.read is not None:
            self.read.record()


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

    def attention(self, qkv: Tensor, state: KVState | PagedKVState, context: StepContext) -> Tensor:
        rows = state.through(context.pages)
        q = rope_kv.rotate_and_cache(qkv, rows, context, owners=self.tables.owners, overlap=self.overlap)
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
