"""Decoding of every row by itself: its numbers do not depend on the rows beside it, bit for bit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from hyaena.cache import Cache, StateSnapshot
from hyaena.decoding.eager import EagerDecoder
from hyaena.decoding.sampler import StepOutput
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams

K = TypeVar("K", bound=Hashable)


class IsolatedDecoder(Generic[K]):
    """The interface of ``EagerDecoder`` over one such decoder per row.

    Products of several rows round otherwise than products of one; here every product has one row.

    Args:
        model: of all rows.
        top: how many of the most probable tokens to report.
    """

    def __init__(self, model: StripedHyena, *, top: int = 0) -> None:
        self.model = model
        self.top = top
        self.rows: dict[K, EagerDecoder[K]] = {}

    def add(
        self,
        keys: Sequence[K],
        steps: Sequence[int],
        cache: Cache,
        ids: Tensor,
        params: Sequence[SamplingParams],
        generators: Sequence,
        *,
        seen: Tensor | None = None,
    ) -> None:
        """Add one row, see ``Decoder.add``."""
        (key,) = keys
        self.rows[key] = EagerDecoder(self.model)
        self.rows[key].add(keys, steps, cache, ids, params, generators, seen=seen)

    def extend(self, key: K, pages: Sequence[int]) -> None:
        """Append pages to a row, see ``EagerDecoder.extend``."""
        self.rows[key].extend(key, pages)

    def next(self) -> tuple[list[K], StepOutput]:
        """Step every row; the keys of the rows, and the outputs."""
        outputs = []
        for decoder in self.rows.values():
            decoder.top = self.top
            outputs.append(decoder.next()[1])
        return list(self.rows), StepOutput(
            tokens=[token for output in outputs for token in output.tokens],
            logprobs=[logprob for output in outputs for logprob in output.logprobs],
            top=[top for output in outputs for top in output.top],
            finite=[finite for output in outputs for finite in output.finite],
        )

    def remove(self, keys: Sequence[K]) -> None:
        """Drop rows."""
        for key in keys:
            del self.rows[key]

    @property
    def lengths(self) -> dict[K, int]:
        """Tokens that the states of each row hold."""
        return {key: decoder.lengths[key] for key, decoder in self.rows.items()}

    def snapshot_states(self, key: K) -> StateSnapshot:
        """Copy the states of a row, its pages excepted; see ``Cache.snapshot_states``."""
        return self.rows[key].snapshot_states(key)

    def wait(self) -> None:
        """Nothing runs in the background."""
