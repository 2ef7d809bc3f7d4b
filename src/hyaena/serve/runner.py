"""Carries out the plans of the scheduler: owns the pages, the rows, the snapshots and the decoder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyaena.cache import Cache, StateSnapshot
from hyaena.decoding import (
    Decoding,
    EagerDecoder,
    IsolatedDecoder,
    PipelinedDecoder,
    StepOutput,
    make_decoder,
    sample_outputs,
)
from hyaena.errors import UnsupportedError
from hyaena.generation.loop import Row, seen_tokens
from hyaena.model import StripedHyena
from hyaena.ops import PAGE
from hyaena.packing import Snapshots
from hyaena.sampling import draw
from hyaena.serve.scheduler import Plan, Read

Key = int
Life = tuple[Key, int]


@dataclass(frozen=True)
class Chosen:
    """A token that was chosen for a request.

    Attributes:
        token: its id.
        logprob: its log-probability.
        top: the most probable (id, log-probability) pairs.
        finite: whether the logits were; where not, the token means nothing.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    finite: bool


class Runner:
    """See the module.

    Args:
        model: of all requests.
        pages: pages of keys and values.
        max_rows: rows that are decoded together.
        max_length: the most tokens of a row.
        decoding: how steps are evaluated; resolved, not ``"auto"``.
        isolated: decode every row in a step of its own, so that its numbers do not depend on its neighbours.
    """

    def __init__(
        self, model: StripedHyena, *, pages: int, max_rows: int, max_length: int, decoding: Decoding, isolated: bool
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.max_length = max_length
        self.pool = model.make_page_pool(pages)
        self.decoding: Decoding = decoding
        self.isolated = isolated
        self._reading: dict[Key, Cache] = {}
        self._lives: dict[Key, Life] = {}  # the decoder's key of a row; a row that comes back has another
        self._count = itertools.count()
        self._snapshots: dict[int, StateSnapshot] = {}
        self._decoder = self._make_decoder()

    def page_ends(self) -> dict[Key, int]:
        """Decoding rows whose states are those at the end of a page, and their number of tokens."""
        return {key: length for (key, _), length in self._decoder.lengths.items() if length % PAGE == 0}

    @torch.inference_mode()
    def run(self, plan: Plan, rows: Mapping[Key, Row], top: int) -> list[tuple[Key, Chosen]]:
        """Carry out a plan.

        Args:
            plan: of the scheduler.
            rows: of all requests in the plan and in the decoder.
            top: how many of the most probable tokens to report.

        Returns:
            The tokens that were chosen, those of the requests that were read first.
        """
        for key, number in plan.copy.items():
            self._snapshots[number] = self._decoder.snapshot_states(self._lives[key])
        self._drop(plan.drop)
        for start in plan.start:
            cache = self.model.make_paged_cache(self.pool, [start.pages], max_length=self.max_length)
            if start.snapshot is not None:
                cache.restore_states(0, self._snapshots[start.snapshot])
            self._reading[start.key] = cache
        for number in plan.forget:
            self._snapshots.pop(number, None)
        chosen = self._read(plan.reads, rows, top) if plan.reads else []
        for key, pages in plan.grow.items():
            self._decoder.extend(self._lives[key], pages)
        if plan.decode:
            self._decoder.top = top
            lives, output = self._decoder.next()
            tokens = zip(lives, _unpack(output), strict=True)
            chosen += [(life[0], token) for life, token in tokens if self._lives.get(life[0]) == life]
        return chosen

    def close(self) -> None:
        """Wait for the device."""
        self._decoder.wait()

    def _drop(self, keys: Sequence[Key]) -> None:
        decoding = []
        for key in keys:
            if self._reading.pop(key, None) is None:
                decoding.append(self._lives.pop(key))
        if decoding:
            self._decoder.remove(decoding)

    def _read(self, reads: Sequence[Read], rows: Mapping[Key, Row], top: int) -> list[tuple[Key, Chosen]]:
        """One pass over prompts; the first tokens of those that were read to their end."""
        cache = self._reading[reads[0].key]
        if len(reads) > 1:  # the last of their rows, which go on to the decoder together
            cache.extend([self._reading[read.key] for read in reads[1:]])
        logits = self._pass(cache, reads)
        for token in reads[0].replay:  # of one row alone
            ids = torch.tensor([[token]], device=self.model.device)
            logits = self.model(ids, cache=cache, logits_to_keep=1)[:, -1]
        if not reads[0].last:
            return []
        keys = [read.key for read in reads]
        for key in keys:
            del self._reading[key]
        return list(zip(keys, _unpack(self._begin(keys, [rows[key] for key in keys], cache, logits, top)), strict=True))

    def _pass(self, cache: Cache, reads: Sequence[Read]) -> Tensor:
        """Read the tokens of all rows of a cache; the logits [B,V] behind them."""
        stops = {
            row: [length - read.start for length in read.snapshots] for row, read in enumerate(reads) if read.snapshots
        }
        snapshots = Snapshots(stops) if stops else None
        ids = torch.tensor([[token for read in reads for token in read.tokens]], device=self.model.device)
        counts = [len(read.tokens) for read in reads] if len(reads) > 1 else None
        logits = self.model(ids, cache=cache, counts=counts, logits_to_keep=1, snapshots=snapshots)
        for row, read in enumerate(reads):
            for length, number in read.snapshots.items():
                assert snapshots is not None
                saved = snapshots.states(row, length - read.start)
                self._snapshots[number] = _state_snapshot(cache, saved, length)
        return logits[:, -1]

    def _begin(self, keys: list[Key], rows: list[Row], cache: Cache, logits: Tensor, top: int) -> StepOutput:
        """Choose the first tokens of rows, and hand the rows to the decoder."""
        params, generators = [row.params for row in rows], []
        for row in rows:
            generator = row.params.generator(row.prompt, row.repeat)
            if row.tokens:  # it was pre-empted: its next number is the one that it would have drawn
                draw(row.params, generator, len(row.tokens))
            generators.append(generator)
        seen = seen_tokens(rows, logits)
        ids, output = sample_outputs(logits, params, generators, seen, top)
        steps = [row.max_new_tokens - len(row.tokens) - 1 for row in rows]
        self._lives |= {key: (key, next(self._count)) for key in keys}
        lives = [self._lives[key] for key in keys]
        self._decoder.add(lives, steps, cache, ids, params, generators, seen=seen)
        return output

    def _make_decoder(self) -> EagerDecoder[Life] | PipelinedDecoder[Life] | IsolatedDecoder[Life]:
        if self.isolated:
            return IsolatedDecoder(self.model)
        if self.decoding == "eager":
            return EagerDecoder(self.model)
        return PipelinedDecoder(make_decoder(self.model, self.max_rows, self.decoding))


def _unpack(output: StepOutput) -> list[Chosen]:
    return [Chosen(*row) for row in zip(output.tokens, output.logprobs, output.top, output.finite, strict=True)]


def _state_snapshot(cache: Cache, saved: Mapping[int, Any], length: int) -> StateSnapshot:
    """A snapshot of the states that the layers saved in a pass; those on pages have none."""
    states = []
    for layer, state in enumerate(cache.states):
        if layer not in saved and state.tensors():
            raise UnsupportedError(
                f"the mixer of layer {layer} does not evaluate its state with ForwardContext.evaluate, so no snapshot "
                "can be taken inside a pass: serve without a prefix cache"
            )
        states.append(saved.get(layer, state))
    return StateSnapshot(states, length, cache._owner)
