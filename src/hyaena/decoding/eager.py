"""Decoding by calls of the model: any model, any device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hyaena.cache import Cache, StateSnapshot
from hyaena.decoding.sampler import StepOutput, pack_outputs
from hyaena.errors import InputError
from hyaena.model import StripedHyena
from hyaena.ops import pages_for
from hyaena.sampling import SamplingParams, bias_table, finite_rows, sample

K = TypeVar("K", bound=Hashable)


@torch.inference_mode()
def sample_outputs(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
    seen: Tensor | None,
    top: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, StepOutput]:
    """Choose a token per row from logits [B,V]: ids [B] and the outputs. Rows that are not finite get token 0.

    ``seen`` bool [B,V] is brought up to date. ``bias`` is the rows' ``bias_table``.
    """
    finite = finite_rows(logits, bias)
    if bool(finite.all()):
        ids = sample(logits, params, generators, seen=seen, bias=bias)
    else:
        usable = torch.where(finite[:, None], logits, 0)
        ids = torch.where(finite, sample(usable, params, generators, seen=seen, bias=bias), 0)
    if seen is not None:
        seen.scatter_(1, ids[:, None], True)
    return ids, StepOutput.unpack(pack_outputs(logits, ids, finite, top))


class EagerDecoder(Generic[K]):
    """The interface of ``PipelinedDecoder`` over ``model.forward``.

    Args:
        model: of all rows.
        top: how many of the most probable tokens to report.
    """

    def __init__(self, model: StripedHyena, *, top: int = 0) -> None:
        self.model = model
        self.top = top
        self.keys: list[K] = []
        self.params: list[SamplingParams] = []
        self.generators: list[torch.Generator] = []
        self.cache: Cache | None = None
        self.ids = torch.zeros(0, dtype=torch.int64, device=model.device)
        self.seen: Tensor | None = None
        self.bias: Tensor | None = None

    @torch.inference_mode()
    def add(
        self,
        keys: Sequence[K],
        steps: Sequence[int],
        cache: Cache,
        ids: Tensor,
        params: Sequence[SamplingParams],
        generators: Sequence[torch.Generator],
        *,
        seen: Tensor | None = None,
    ) -> None:
        """Add rows, see ``Decoder.add``."""
        if self.cache is None or not self.keys:
            self.cache = cache
        else:
            self.cache.extend([cache])
        self.ids = torch.cat([self.ids, ids.to(self.ids.device)])
        if seen is not None or self.seen is not None:
            none = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool, device=self.ids.device)
            mine = none.expand(len(self.keys), -1) if self.seen is None else self.seen
            self.seen = torch.cat([mine, none.expand(len(keys), -1) if seen is None else seen])
        self.keys += keys
        self.params += params
        self.generators += generators
        self.bias = bias_table(self.params, self.model.config.vocab_size, self.ids.device)

    @torch.inference_mode()
    def next(self) -> tuple[list[K], StepOutput]:
        """Read the last token of each row and choose the next; the keys of the rows, and the outputs."""
        logits = self.model(self.ids[:, None], cache=self.cache, logits_to_keep=1)[:, -1]
        self.ids, output = sample_outputs(logits, self.params, self.generators, self.seen, self.top, self.bias)
        return list(self.keys), output

    @torch.inference_mode()
    def remove(self, keys: Sequence[K]) -> None:
        """Drop rows."""
        gone = set(keys)
        rows = [row for row, key in enumerate(self.keys) if key not in gone]
        self.keys = [self.keys[row] for row in rows]
        self.params = [self.params[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        if self.cache is not None and rows:
            self.cache.keep(rows)
        self.ids = self.ids[rows]
        self.seen = None if self.seen is None else self.seen[rows]
        self.bias = None if self.bias is None else self.bias[rows]

    @property
    def lengths(self) -> dict[K, int]:
        """Tokens that the states of each row hold."""
        return {} if self.cache is None else dict(zip(self.keys, self.cache.lengths, strict=False))

    def missing_pages(self) -> dict[K, int]:
        """How many pages each row lacks for the next call of ``next``; rows that lack none are left out."""
        cache = self._cache()
        if cache.pool is None:
            return {}
        needed = [pages_for(length + 1) - len(pages) for length, pages in zip(cache.lengths, cache.pages, strict=True)]
        return {key: count for key, count in zip(self.keys, needed, strict=True) if count > 0}

    def extend(self, key: K, pages: Sequence[int]) -> None:
        """Add pages behind those of a row."""
        row, cache = self.keys.index(key), self._cache()
        cache.set_pages(row, [*cache.pages[row], *pages])

    def snapshot_states(self, key: K) -> StateSnapshot:
        """Copy the states of a row, its pages excepted; see ``Cache.snapshot_states``."""
        return self._cache().snapshot_states(self.keys.index(key))

    def _cache(self) -> Cache:
        if self.cache is None:
            raise InputError("the decoder has no rows: add some")
        return self.cache

    def wait(self) -> None:
        """Nothing runs in the background."""
