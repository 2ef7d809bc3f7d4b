"""What every layer needs to know of one forward pass, checked and computed once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena import ops
from hyaena.arguments import kind_of, whole
from hyaena.cache import Cache
from hyaena.config import ModelConfig
from hyaena.errors import InputError

Recurrence = Callable[[Tensor, Any, Tensor | None, Tensor | None], tuple[Tensor, Any]]
"""Maps inputs [b,T,E], the state before them (or None), mask and reset (bool [b,T] or None) to outputs and state."""


class Group(NamedTuple):
    """Rows of a packed pass that a sequential operator reads together, padded on the left to the longest.

    Attributes:
        rows: their places in the cache.
        source: int [b,T'], where each step is in the packed pass; the row's first token for padding, which is masked.
        mask: bool [b,T'], False for padding; None where there is none.
        steps: int, where the steps that are not padding are in [b·T'], row after row.
    """

    rows: list[int]
    source: Tensor
    mask: Tensor | None
    steps: Tensor


class Packing:
    """Several rows in one pass over ids [1,T]: the next tokens of each, one row after another, without padding.

    Projections, norms and MLPs read the pass as it is. Attention reads each row's part of it, and a recurrence the rows
    in groups, each row from its own state to its own last token.

    Attributes:
        spans: first and last position (exclusive) of each row in the pass.
        groups: of rows that a recurrence reads together. Rows that begin are grouped if their lengths differ by less
            than a factor of two; a row with a past is a group of its own, since padding before its tokens would be part
            of them.
        places: int [T], where each position of the pass is in the steps of all groups, one group after another.
        row_places: where each row is in the rows of all groups.
        last: int [B], the last position of each row in the pass.
    """

    def __init__(self, lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        self.spans = list(itertools.pairwise(itertools.accumulate(counts, initial=0)))
        sizes: dict[object, list[int]] = {}
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            sizes.setdefault((row, "past") if length else count.bit_length(), []).append(row)
        self.groups = [self._group(rows, device) for rows in sizes.values()]
        rows = [row for group in self.groups for row in group.rows]
        self.row_places = sorted(range(len(rows)), key=rows.__getitem__)
        positions = torch.cat([torch.arange(*self.spans[row]) for row in rows])
        self.places = positions.argsort().to(device)
        self.last = torch.tensor([stop - 1 for _, stop in self.spans]).to(device)

    def _group(self, rows: list[int], device: torch.device) -> Group:
        counts = torch.tensor([self.spans[row][1] - self.spans[row][0] for row in rows])
        width = int(counts.max())
        mask = torch.arange(width) >= (width - counts)[:, None]
        first, last = torch.tensor([self.spans[row] for row in rows]).T
        source = torch.maximum(torch.arange(width) + (last - width)[:, None], first[:, None])
        steps = mask.flatten().nonzero().flatten()
        return Group(rows, source.to(device), None if bool(mask.all()) else mask.to(device), steps.to(device))


class Snapshots:
    """Copies of the layers' states inside a pass: what the cache would hold, had the pass ended there.

    A mixer whose state sums up all tokens is evaluated by ``ForwardContext.recur``, which saves its state behind every
    stop. Keys and values need no copy: those of the first tokens are the first in the cache.

    Args:
        stops: columns of the pass after which states are saved, in rising order: 1 … T.

    Attributes:
        layer: the layer that is evaluated; the model counts.
    """

    def __init__(self, stops: Sequence[int]) -> None:
        if not stops or any(b <= a for a, b in itertools.pairwise([0, *stops])):
            raise InputError(f"snapshots take columns of the pass, from 1 on and rising, not {stops}")
        self.stops = tuple(stops)
        self.layer = 0
        self._saved: dict[tuple[int, int], tuple[Any, int | None]] = {}

    def save(self, stop: int, state: Any, at: int | None = None) -> None:
        """Keep the state of the layer behind a column: of all rows, or ``at``, the one that a column belongs to."""
        self._saved[self.layer, stop] = state.detach(), at

    def row(self, row: int, stop: int) -> dict[int, Any]:
        """Layer -> state of one row behind a stop, copied; of the layers whose mixers saved one."""
        return {
            layer: state.select([row if at is None else at])
            for (layer, place), (state, at) in self._saved.items()
            if place == stop
        }


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """One pass over ids [B,T].

    Attributes:
        lengths: tokens that each row of the cache holds before this pass; None without a cache.
        counts: tokens that this pass adds to each row of the cache: T, less its padding, or its part of a packed pass;
            None without a cache.
        packing: how the rows of the cache lie in a packed pass, or None.
        pages: the pages of the rows of a cache that has them, else None.
        rotary: cos and sin of the positions of this pass, [T,head_dim/2] or [B,T,head_dim/2].
        padding: leading positions of each row that are padding, as int [B] and as numbers; None where there are none.
        mask: bool [B,T], False where this pass reads padding, or None.
        reset: bool [B,T], True at the first token of every packed document but the first, or None.
        documents: the packed documents, found once per pass, or None.
        method: how long convolutions are evaluated; see ``ops.METHODS``.
        backend: what evaluates the operators; see ``ops.resolve_backend``.
        snapshots: where mixers save their states inside the pass, or None.
    """

    lengths: Sequence[int] | None
    counts: Sequence[int] | None
    packing: Packing | None
    pages: ops.PageTable | None
    rotary: tuple[Tensor, Tensor]
    padding: tuple[Tensor, Sequence[int]] | None
    mask: Tensor | None
    reset: Tensor | None
    documents: ops.Documents | None
    method: str
    backend: ops.Backend
    snapshots: Snapshots | None = None

    def recur(self, operator: Recurrence, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Evaluate a recurrence of every row, z [B,T,E]: the outputs [B,T,D], and the state of all rows after the pass.

        Rows of a packed pass are read in groups, and the pass in pieces where states are to be saved inside it.
        """
        stops = () if self.snapshots is None else self.snapshots.stops
        if stops and stops[-1] > z.shape[1]:
            raise InputError(f"a snapshot behind column {stops[-1]} is not part of a pass of {z.shape[1]} tokens")
        if self.packing is None:
            return self._pieces(operator, z, state, self.mask, self.reset, {stop: [(stop, None)] for stop in stops})
        parts, states = [], []
        for group in self.packing.groups:
            width, saves = group.source.shape[1], dict[int, list[tuple[int, int | None]]]()
            for at, (first, last) in enumerate(self.packing.spans[row] for row in group.rows):
                for stop in stops:
                    if first < stop <= last:
                        saves.setdefault(width - last + stop, []).append((stop, at))
            here = z[0, group.source]
            y, new = self._pieces(operator, here, state.select(group.rows), group.mask, None, saves)
            parts.append(y.flatten(0, 1)[group.steps])
            states.append(new)
        y = torch.cat(parts)[self.packing.places].unsqueeze(0)
        return y, states[0].join(states[1:]).select(self.packing.row_places)

    def _pieces(
        self,
        operator: Recurrence,
        z: Tensor,
        state: Any,
        mask: Tensor | None,
        reset: Tensor | None,
        saves: Mapping[int, Sequence[tuple[int, int | None]]],
    ) -> tuple[Tensor, Any]:
        """A recurrence piece by piece; ``saves`` names the stops, and rows, for which the state behind a column is."""
        if not saves:
            return operator(z, state, mask, reset)
        parts = []
        for start, stop in itertools.pairwise(sorted({0, *saves, z.shape[1]})):
            here = slice(None), slice(start, stop)
            y, state = operator(
                z[here], state, None if mask is None else mask[here], None if reset is None else reset[here]
            )
            parts.append(y)
            for place, at in saves.get(stop, ()):
                assert self.snapshots is not None
                self.snapshots.save(place, state, at)
        return torch.cat(parts, dim=1), state

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        ids: Tensor,
        *,
        cache: Cache | None,
        mask: Tensor | None,
        segment_ids: Tensor | None,
        counts: Sequence[int] | None,
        method: str,
        backend: ops.Backend,
        dtype: torch.dtype,
        snapshots: Snapshots | None = None,
    ) -> ForwardContext:
        """Check the arguments of a forward pass and compute what its layers share.

        Raises:
            InputError: shapes, ids or masks that do not fit.
        """
        _check_ids(ids)
        length = ids.shape[1]
        lengths = None if cache is None else tuple(cache.lengths)
        for name, value in (("mask", mask), ("segment_ids", segment_ids)):
            if value is not None and not isinstance(value, Tensor):
                raise InputError(f"{name} must be a tensor of the shape of ids, not {kind_of(value)}")
        if segment_ids is not None and (cache is not None or mask is not None or segment_ids.shape != ids.shape):
            raise InputError("segment_ids must have the shape of ids, and go without cache and without mask")
        packing = None
        if counts is not None:
            counts = _check_packed(counts, ids, cache, mask)
            packing = Packing(lengths or (), counts, ids.device)
        mask = _check_mask(mask, ids, lengths)
        padding = None
        if mask is not None:
            leading = (~mask).sum(dim=1)
            padding = leading, tuple(leading.tolist())
        reset = documents = None
        if segment_ids is not None:  # a number that comes back later is another document
            reset = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
            documents = ops.find_documents(reset)
        if packing is not None and counts is not None and not any(lengths or ()):
            documents = ops.Documents.of([counts], ids.device)
        if packing is not None:
            parts = [torch.arange(n) + start for n, start in zip(counts or (), lengths or (), strict=True)]
            positions = torch.cat(parts).to(ids.device)
        else:
            positions = _positions(length, ids.device, lengths, None if padding is None else padding[0], reset)
        return cls(
            lengths=lengths,
            counts=_counts(lengths, length, padding) if counts is None else counts,
            packing=packing,
            pages=None if cache is None or cache.pool is None else ops.PageTable.of(cache.pages, cache.pool.device),
            rotary=ops.rotary_table(
                positions, config.head_dim, config.rope_theta, config.rope_scaling_factor, dtype=dtype
            ),
            padding=padding,
            mask=mask,
            reset=reset,
            documents=documents,
            method=method,
            backend=backend,
            snapshots=snapshots,
        )


def _counts(
    lengths: Sequence[int] | None, length: int, padding: tuple[Tensor, Sequence[int]] | None
) -> Sequence[int] | None:
    if lengths is None:
        return None
    return [length] * len(lengths) if padding is None else [length - skip for skip in padding[1]]


def _positions(
    length: int, device: torch.device, lengths: Sequence[int] | None, padding: Tensor | None, reset: Tensor | None
) -> Tensor:
    """The position of every token in its sequence: int [T], or [B,T] where rows or documents differ."""
    steps = torch.arange(length, device=device)
    if reset is not None:  # every document begins at 0
        return steps - torch.where(reset, steps, 0).cummax(dim=1).values
    if padding is not None:
        return (steps - padding[:, None]).clamp(min=0)
    if lengths is None or not any(lengths):
        return steps
    if all(start == lengths[0] for start in lengths):
        return steps + lengths[0]
    return steps + torch.tensor(lengths, device=device)[:, None]


def _check_ids(ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = f"a tensor of {ids.dtype}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise InputError(f"the model takes token ids as a tensor of integers, and was given {kind}")
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise InputError(f"the model takes token ids of shape [B>=1, T>=1], and was given {tuple(ids.shape)}")


def _check_packed(counts: Sequence[int], ids: Tensor, cache: Cache | None, mask: Tensor | None) -> list[int]:
    """The counts of a packed pass as numbers."""
    if cache is None or mask is not None:
        raise InputError("counts go with a cache, one for each of its rows, and without mask")
    numbers = [whole("a count", count, "a whole number of at least 1", 1) for count in counts]
    if len(numbers) != cache.batch_size or ids.shape[0] != 1 or sum(numbers) != ids.shape[1]:
        raise InputError(
            f"a packed pass takes ids [1, T] and a count for each of the {cache.batch_size} rows of the cache, T in "
            f"all, and was given ids {list(ids.shape)} and {len(numbers)} counts of {sum(numbers)} tokens"
        )
    return numbers


def _check_mask(mask: Tensor | None, ids: Tensor, lengths: Sequence[int] | None) -> Tensor | None:
    """The mask as bool, or None where it hides nothing."""
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise InputError(f"the mask has shape {tuple(mask.shape)} and the ids {tuple(ids.shape)}")
    mask = mask.to(torch.bool)
    if bool(mask.all()):
        return None
    if lengths is not None and any(lengths):
        raise InputError("padding is accepted with a cache's first tokens only")
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("padding must stand on the left: every row of the mask is False …, then True …")
    return mask
