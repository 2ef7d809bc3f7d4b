"""Masks, positions and packed documents, as transformers and TRL send them, in the terms of ``ForwardContext``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyaena.arguments import kind_of
from hyaena.errors import InputError, UnsupportedError


class Layout(NamedTuple):
    """Where the tokens of a batch are.

    Attributes:
        mask: bool [B,T], False at padding on the left; None where there is none.
        segment_ids: int [B,T], the documents of packed rows; None where nothing is packed.
        right_padded: some rows end in padding. No token of theirs sees it, but a cache would.
    """

    mask: Tensor | None
    segment_ids: Tensor | None
    right_padded: bool


def read_layout(
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Layout:
    """The layout of a batch of new tokens that follow nothing.

    Args:
        shape: B, T.
        attention_mask: [B,T], nonzero where there is a token; padding on the left, on the right, or both.
        position_ids: [B,T] or [1,T]; a new document begins where the position is not one more than the last.
        seq_idx: int [B,T], the number of the document of each token.
        cu_seq_lens: int [documents+1], where documents begin in the rows one after another, and the end of the last.

    Raises:
        InputError: shapes that do not fit, or padding between tokens.
        UnsupportedError: packed documents in rows with padding on the left.
    """
    tokens = None if attention_mask is None else _tokens(attention_mask, shape)
    mask, right_padded = _sides(tokens)
    segments = _segments(shape, tokens, position_ids, seq_idx, cu_seq_lens)
    if segments is not None and mask is not None:
        raise UnsupportedError(
            "packed documents in rows with padding on the left are not supported: pad on the right, or not at all"
        )
    return Layout(mask, segments, right_padded)


def read_continuation(
    shape: tuple[int, int],
    lengths: Sequence[int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    **packing: Tensor | None,
) -> Layout:
    """The layout of tokens that follow those of a cache, whose rows hold ``lengths`` tokens.

    Rows of padding alone may begin later; otherwise there is no padding among them, and no new document.

    Raises:
        InputError: there is.
    """
    if shape[1] < 1:
        raise InputError(
            f"the cache holds {max(lengths):,} tokens, and no others were given: ids of the whole sequence must go on "
            "behind them"
        )
    if any(value is not None for value in packing.values()):
        raise InputError("packed documents cannot follow a cache: read them without one")
    if shape[1] == 1 and all(lengths):  # one token is never padding, and looking would stall a GPU in each step
        return Layout(None, None, False)
    tokens = None if attention_mask is None else _tokens(attention_mask[:, -shape[1] :], shape)
    if _starts(shape, tokens, position_ids) is not None:
        raise InputError("positions that restart cannot follow a cache: read packed documents without one")
    mask, right_padded = _sides(tokens)
    return Layout(mask, None, right_padded)


def last_tokens(
    attention_mask: Tensor | None, ids: Tensor | None, pad_id: int | None, shape: tuple[int, int]
) -> Tensor:
    """The index of the last token of each row that is not padding, int [B].

    Padding is where the mask is zero or, without a mask, where the id is ``pad_id``.
    """
    if attention_mask is not None:
        tokens = attention_mask != 0
    elif ids is not None and pad_id is not None:
        tokens = ids != pad_id
    else:
        device = None if ids is None else ids.device
        return torch.full((shape[0],), shape[1] - 1, device=device)
    steps = torch.arange(shape[1], device=tokens.device)
    return torch.where(tokens, steps, 0).amax(dim=1)


def _tokens(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask as bool [B,T]."""
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
        given = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InputError(f"attention_mask must have the shape of the ids, {shape}, and is {given}")
    return attention_mask != 0


def _sides(tokens: Tensor | None) -> tuple[Tensor | None, bool]:
    """The padding on the left as a mask, and whether there is any on the right."""
    if tokens is None or bool(tokens.all()):
        return None, False
    count = tokens.cumsum(dim=1)
    begun, ended = count > 0, count == count[:, -1:]
    after = ended & ~tokens & begun
    if bool((begun & ~tokens & ~after).any()):
        raise InputError("attention_mask hides positions between tokens: padding must stand at the ends of a row")
    return (None if bool(begun.all()) else begun), bool(after.any())


def _segments(
    shape: tuple[int, int],
    tokens: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> Tensor | None:
    """The documents of each position, int [B,T]; None where every row is one."""
    if seq_idx is not None:
        if not isinstance(seq_idx, Tensor) or seq_idx.shape != shape:
            raise InputError(f"seq_idx must have the shape of the ids, {shape}, and is {kind_of(seq_idx)}")
        return seq_idx
    if cu_seq_lens is not None:
        size = shape[0] * shape[1]
        wanted = f"cu_seq_lens_q must be a tensor that rises from 0 to the {size:,} tokens of the batch"
        if not isinstance(cu_seq_lens, Tensor) or cu_seq_lens.ndim != 1 or not len(cu_seq_lens):
            raise InputError(f"{wanted}, and is {kind_of(cu_seq_lens)}")
        if cu_seq_lens[0] != 0 or cu_seq_lens[-1] > size or bool((cu_seq_lens.diff() < 0).any()):
            raise InputError(wanted)
        starts = torch.zeros(size + 1, dtype=torch.int32, device=cu_seq_lens.device)
        starts[cu_seq_lens.long()] = 1
        return starts[:-1].cumsum(0).reshape(shape)
    return _starts(shape, tokens, position_ids)


def _starts(shape: tuple[int, int], tokens: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """The documents that positions tell apart, int [B,T]: one begins where a position is not one more than the last.

    Positions of padding mean nothing, nor does the step from padding to the first token.
    """
    if position_ids is None or shape[1] == 1:
        return None
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in (shape, (1, shape[1])):
        raise InputError(f"position_ids must have the shape of the ids, {shape}, and is {kind_of(position_ids)}")
    starts = torch.nn.functional.pad(position_ids.diff() != 1, (1, 0)).expand(shape)
    if tokens is not None:
        starts = starts & tokens & torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    return starts.cumsum(dim=1) if bool(starts.any()) else None
