"""``StripedHyenaCache``: a cache of this package as a cache of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hyaena import cache as native
from hyaena.arguments import kind_of, whole
from hyaena.errors import CapacityError, InputError, UnsupportedError
from hyaena.ops import StepContext

FIELD = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
"""What this version of transformers calls the cache: ``past_key_values``, or from 5.24 on ``cache``."""


class StripedHyenaCache(Cache):
    """What a model remembers of the sequences that it has read: a ``hyaena.cache.Cache``.

    ``generate`` makes one for each call. To continue a sequence over several calls, make one and pass it to each.

    Args:
        max_length: tokens of a row for which memory is reserved, for a static cache; by default the cache grows.

    Attributes:
        native: the cache itself, made with the first tokens; None before. It stores no padding.
        step: what layers need to know to read one more token per row in place, where the cache is static; else None.
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.max_length = None if max_length is None else whole("max_length", max_length, "at least 1", 1)
        self.native: native.Cache | None = None
        self.step: StepContext | None = None
        self._torn = False  # a step has failed midway: some layers have read its token, and others have not
        self._positions = 0  # that were read, without those of steps

    def count(self, positions: int) -> None:
        """Count positions that were read, those of padding included, as transformers does."""
        self._positions += positions

    def begin_steps(self, context: StepContext) -> None:
        """Go on with steps that count tokens on the device, where compiled code leaves them."""
        assert self.native is not None
        self.step = context
        for tensor in (*self.native.tensors(), context.lengths):
            torch._dynamo.mark_static_address(tensor)

    def end_steps(self) -> None:
        """Take over the tokens that steps have counted."""
        if self.native is not None and self.step is not None:
            before, self.native.lengths = self.native.lengths, self.step.lengths.tolist()
            self._positions += self.native.lengths[0] - before[0]
            self.step = None

    def check_whole(self) -> None:
        """Check that no step has failed midway.

        Raises:
            InputError: one has.
        """
        if self._torn:
            raise InputError(
                "a step of this cache failed midway, so that its layers differ: make another, or reset() it"
            )

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it, layers read a token in place: an error leaves a cache that cannot be used."""
        try:
            yield
        except BaseException:
            self._torn = True
            raise

    def check_room(self) -> None:
        """Check that every row has room for one more token.

        Raises:
            CapacityError: one is full.
        """
        assert self.step is not None
        if bool((self.step.lengths >= self.step.limits).any()):
            raise CapacityError(f"the cache is full: it was made for {self.max_length} tokens, make it larger")

    # --- what transformers looks at ------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that were read, those of padding included."""
        if self.native is None or self.step is None:
            return self._positions
        return self._positions + int(self.step.lengths[0]) - self.native.lengths[0]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a row may hold; -1 where there is no limit."""
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Positions that the next ``query_length`` tokens can see, and the first of them."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.native is None else self.native.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.native is not None

    @property
    def is_compileable(self) -> bool:
        return self.max_length is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer: none counts no positions, as layers with nothing but a state do in caches of transformers."""
        return [False] * max(len(self), 1)

    @property
    def is_sliding(self) -> list[bool]:
        return self.is_linear

    @property
    def is_dummy(self) -> list[bool]:
        return self.is_linear

    # --- verbs ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything."""
        self.native = self.step = None
        self._positions, self._torn = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by copies of these, as beam search does."""
        if self.native is not None:
            self.end_steps()
            self.native = self.native.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace the rows by copies of these."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.native is not None:
            self.reorder_cache(torch.arange(self.native.batch_size, device="cpu").repeat_interleave(repeats))

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
        return f"StripedHyenaCache({rows} rows, {self.get_seq_length()} positions, max_length={self.max_length})"


def as_cache(given: object) -> StripedHyenaCache | None:
    """The cache that a caller passed, under one of its two names.

    Raises:
        InputError: it is the cache of another model, or cannot be used any more.
    """
    if given is None:
        return None
    if isinstance(given, StripedHyenaCache):
        given.check_whole()
        return given
    raise InputError(
        f"the cache is {kind_of(given)}, which has no place for the states of Hyena blocks: leave it out, or pass a "
        "hyaena.hf.StripedHyenaCache()"
    )
