"""What every layer needs to know of one forward pass, checked and computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyaena import ops
from hyaena.arguments import kind_of, whole
from hyaena.cache import Cache
from hyaena.errors import InputError
from hyaena.packing import Packing, Recurrence, Snapshots, Together, WithStates, evaluate


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
        by_document: the documents as rows of a packing, where plain torch evaluates recurrences, or None: a batch of
            documents of like length takes less time than one row that is reset at each of their boundaries.
        method: how long convolutions are evaluated; see ``ops.METHODS``.
        backend: what evaluates the operators; see ``ops.resolve_backend``.
        snapshots: where states inside the pass are copied to, or None.
        kv_dtype: the dtype of a cache as whose keys and values those of layers without a state are seen; None to see
            them as they are.
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
    by_document: Packing | None
    method: str
    backend: ops.Backend
    snapshots: Snapshots | None = None
    kv_dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        rotary: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]],
        ids: Tensor,
        *,
        cache: Cache | None,
        mask: Tensor | None,
        segment_ids: Tensor | None,
        counts: Sequence[int] | None = None,
        method: str,
        backend: ops.Backend,
        dtype: torch.dtype,
        snapshots: Snapshots | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> ForwardContext:
        """Check the arguments of a forward pass and compute what its layers share.

        Args:
            rotary: the model's rotary tables by position and dtype, see ``layers.Rotary``.
            kv_dtype: see the attribute.

        The others are those of ``StripedHyena.forward``.

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
        by_document = None
        if documents is not None and documents.lengths is not None and len(ids) == 1 and not backend.hyena:
            by_document = Packing([0] * len(documents.lengths[0]), documents.lengths[0], ids.device)
        if packing is not None and counts is not None and not any(lengths or ()):
            documents = ops.Documents.of([counts], ids.device)
        if packing is not None:
            parts = [
                torch.arange(n, device="cpu") + start for n, start in zip(counts or (), lengths or (), strict=True)
            ]
            positions = torch.cat(parts).to(ids.device)
        else:
            positions = _positions(length, ids.device, lengths, None if padding is None else padding[0], reset)
        return cls(
            lengths=lengths,
            counts=_counts(lengths, length, padding) if counts is None else counts,
            packing=packing,
            pages=None if cache is None or cache.pool is None else ops.PageTable.of(cache.pages, cache.pool.device),
            rotary=rotary(positions, dtype),
            padding=padding,
            mask=mask,
            reset=reset,
            documents=documents,
            by_document=by_document,
            method=method,
            backend=backend,
            snapshots=snapshots,
            kv_dtype=kv_dtype,
        )

    def evaluate(
        self,
        operator: Recurrence,
        z: Tensor,
        state: Any,
        with_states: WithStates | None = None,
        together: Together | None = None,
    ) -> tuple[Tensor, Any]:
        """Evaluate an operator whose state sums up all tokens before, over this pass.

        A packed pass is cut into its rows. Where snapshots are wanted ``with_states`` is called, or without it
        the rows are cut there, each piece from the state that the one before left.

        Args:
            operator: see ``Recurrence``.
            z: its inputs [B,T,E], or [1,T,E] of a packed pass.
            state: of all rows, or None.
            with_states: see ``WithStates``.
            together: evaluates all rows of a packed pass in one call, where that is possible.

        Returns:
            y [B,T,D] and the state after the pass.
        """
        padding = None if self.padding is None else self.padding[1]
        if self.packing is not None and together is not None:
            return self.packing.apply_together(together, z, state, self.snapshots)
        if self.packing is not None:
            return self.packing.apply(operator, z, state, self.snapshots, with_states)
        if self.by_document is not None and state is None:
            return self.by_document.apply(operator, z, None)
        rows = range(z.shape[0])
        return evaluate(operator, z, state, self.mask, self.reset, rows, padding, self.snapshots, with_states)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ForwardContext:
        """The same pass for layers on another device."""
        if self.rotary[0].device == torch.device(device):
            return self

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, tuple):
                parts = [moved(part) for part in value]
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            return value

        tensors = {name: moved(getattr(self, name)) for name in ("rotary", "padding", "mask", "reset", "documents")}
        return replace(self, **tensors)


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
    if padding is None and lengths is not None and any(lengths) and all(start == lengths[0] for start in lengths):
        return steps + lengths[0]
    if padding is not None:
        steps = (steps - padding[:, None]).clamp(min=0)
    if lengths is None or not any(lengths):
        return steps
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
    if lengths is not None and any(
        held and not full for held, full in zip(lengths, mask.all(dim=1).tolist(), strict=True)
    ):
        raise InputError(
            "padding is accepted before the first token of a row only, and this row of the cache holds some"
        )
    is_full = mask[:, -1] if lengths is None else mask[:, -1] | ~mask.any(dim=1)  # the row's tokens may come later
    if not bool(is_full.all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("padding must stand on the left: every row of the mask is False …, then True …")
    return mask
