"""``StripedHyenaCache``: a cache of this package as a cache of transformers."""

from __future__ import annotations

import inspect
from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hyaena import cache as native
from hyaena.arguments import kind_of
from hyaena.errors import InputError, UnsupportedError

FIELD = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
"""What this version of transformers calls the cache: ``past_key_values``, or from 5.24 on ``cache``."""


class StripedHyenaCache(Cache):
    """What a model remembers of the sequences that it has read: a ``hyaena.cache.Cache``.

    ``generate`` makes one for each call. To continue a sequence over several calls, make one and pass it to each.

    Args:
        max_length: tokens of a row for which memory is reserved, for a static cache; by default the cache grows.

    Attributes:
        native: the cache itself, made with the first tokens; None before. It stores no padding.
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self.native: native.Cache | None = None
        self._positions = 0

    def count(self, positions: int) -> None:
        """Count positions that were read, those of padding included, as transformers does."""
        self._positions += positions

    # --- what transformers looks at ------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that were read, those of padding included."""
        return self._positions

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a row may hold; -1 where there is no limit."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Positions that the next ``query_length`` tokens can see, and the first of them."""
        return self._positions + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.native is None else self.native.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.native is not None

    @property
    def is_compileable(self) -> bool:
        return self.max_length is not None

    is_croppable = False
    is_linear = is_sliding = is_dummy = (False,)

    # --- verbs ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything."""
        self.native = None
        self._positions = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by copies of these, as beam search does."""
        if self.native is not None:
            self.native = self.native.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.native is not None:
            self.reorder_cache(torch.arange(self.native.batch_size).repeat_interleave(repeats))

    def crop(self, *_: object) -> NoReturn:
        """Refuse: Hyena blocks remember a state, from which no token can be taken away.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "the cache of a StripedHyena model cannot be cut: its Hyena blocks keep one state, not one per token; "
            "copy the cache (copy.deepcopy) before the tokens that may have to go"
        )

    activate_past_recording = crop

    def __len__(self) -> int:
        return 0 if self.native is None else len(self.native.states)

    def __repr__(self) -> str:
        rows = 0 if self.native is None else self.native.batch_size
        return f"StripedHyenaCache({rows} rows, {self._positions} positions, max_length={self.max_length})"


def as_cache(given: object) -> StripedHyenaCache | None:
    """The cache that a caller passed, under one of its two names.

    Raises:
        InputError: it is the cache of another model.
    """
    if given is None or isinstance(given, StripedHyenaCache):
        return given
    raise InputError(
        f"the cache is {kind_of(given)}, which has no place for the states of Hyena blocks: leave it out, or pass a "
        "hyaena.hf.StripedHyenaCache()"
    )
