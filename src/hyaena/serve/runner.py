"""Carries out the plans of the scheduler: owns the pages, the rows, the snapshots and the decoder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyaena.cache import Cache, StateSnapshot
from hyaena.decoding import (
    Decoding,
    EagerDecoder,
    IsolatedDecoder,
    PipelinedDecoder,
    ShortPasses,
    StepOutput,
    make_decoder,
    sample_outputs,
)
from hyaena.decoding.short_passes import Answers
from hyaena.errors import UnsupportedError
from hyaena.generation.loop import Row, seen_tokens
from hyaena.model import StripedHyena
from hyaena.ops import PAGE, PagePool
from hyaena.packing import Snapshots
from hyaena.sampling import SamplingFeatures, draw
from hyaena.serve.scheduler import Plan, Read, Start

Key = int
Life = tuple[Key, int]
Rows = EagerDecoder[Life] | PipelinedDecoder[Life] | IsolatedDecoder[Life]


class Chosen(NamedTuple):
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

    Requests of different adapters share the pages; they are read and decoded one adapter after the other.

    Args:
        models: name of an adapter -> the model with it, and "" -> the model alone; all of one shape.
        pages: pages of keys and values.
        max_rows: rows that are decoded together.
        max_length: the most tokens of a row.
        decoding: how steps are evaluated; resolved, not ``"auto"``.
        isolated: decode every row in a step of its own, so that its numbers do not depend on its neighbours.
    """

    def __init__(
        self,
        models: Mapping[str, StripedHyena],
        *,
        pages: int,
        max_rows: int,
        max_length: int,
        decoding: Decoding,
        isolated: bool,
    ) -> None:
        self.pool = models[""].make_page_pool(pages)
        self._snapshots: dict[int, StateSnapshot] = {}
        self._lanes = {
            name: Lane(model, self.pool, max_length, _make_rows(model, max_rows, decoding, isolated), self._snapshots)
            for name, model in models.items()
        }
        self._lane_of: dict[Key, Lane] = {}

    def page_ends(self) -> dict[Key, int]:
        """Decoding rows whose states are those at the end of a page, and their number of tokens."""
        lengths = [item for lane in self._lanes.values() for item in lane.rows.lengths.items()]
        return {key: length for (key, _), length in lengths if length % PAGE == 0}

    def run(self, plan: Plan, rows: Mapping[Key, Row], top: int) -> list[tuple[Key, Chosen]]:
        """Carry out a plan.

        Args:
            plan: of the scheduler.
            rows: of the requests whose prompts are read.
            top: how many of the most probable tokens to report.

        Returns:
            The tokens that were chosen, those of the requests that were read first.
        """
        chosen = [] if plan.steps_only else self._change(plan, rows, top)
        for adapter in plan.decode:
            chosen += self._lanes[adapter].decode(top)
        return chosen

    @torch.inference_mode()  # here: a step enters it where it calls torch, and to leave it takes 0.05 ms
    def _change(self, plan: Plan, rows: Mapping[Key, Row], top: int) -> list[tuple[Key, Chosen]]:
        """All of a plan but its steps: the tokens that were chosen behind prompts."""
        lane_of = self._lane_of
        for key, number in plan.copy.items():
            self._snapshots[number] = lane_of[key].snapshot_states(key)
        for lane in self._lanes.values():
            lane.drop([key for key in plan.drop if lane_of[key] is lane])
        for key in plan.drop:
            del lane_of[key]
        for start in plan.start:
            lane_of[start.key] = self._lanes[start.adapter]
            lane_of[start.key].start(start)
        for number in plan.forget:
            self._snapshots.pop(number, None)
        chosen = []
        for lane in self._lanes.values():
            if reads := [read for read in plan.reads if lane_of[read.key] is lane]:
                chosen += lane.read(reads, rows, top)
        for key, pages in plan.grow.items():
            lane_of[key].extend(key, pages)
        return chosen

    def prepare(self) -> None:
        """Make ready what the next request needs, while nobody waits for a token."""
        for lane in self._lanes.values():
            lane.prepare()

    def close(self) -> None:
        """Wait for the device."""
        for lane in self._lanes.values():
            lane.rows.wait()


class Lane:
    """The requests of one model: those that are being read, and the rows that are decoded.

    Args:
        model: of these requests.
        pool: of the pages of all lanes.
        max_length: the most tokens of a row.
        rows: decodes them.
        snapshots: of all lanes, by number.
    """

    def __init__(
        self, model: StripedHyena, pool: PagePool, max_length: int, rows: Rows, snapshots: dict[int, StateSnapshot]
    ) -> None:
        self.model = model
        self.rows = rows
        self._empty = model.make_paged_cache(pool, [[]], max_length=max_length)
        self._spare: Cache | None = None  # for the next row
        self._short: ShortPasses | None = None
        if isinstance(rows, PipelinedDecoder) and rows.decoder.cuda_graph and not ShortPasses.unsupported_reason(model):
            self._short = ShortPasses(model, pool, cuda_graph=True)
        self._packed = all(getattr(layer.mixer, "packs", False) for layer in model.layers)
        self._snapshots = snapshots
        self._new: dict[Key, Sequence[int]] = {}  # pages of rows of which nothing was read: they have no cache yet
        self._reading: dict[Key, Cache] = {}
        self._lives: dict[Key, Life] = {}  # the decoder's key of a row; a row that comes back has another
        self._count = itertools.count()

    def prepare(self) -> None:
        """Make the cache of the next row, which takes some milliseconds on a GPU, and what its pass needs."""
        if self._spare is None:
            self._spare = self._empty.with_pages([[]])
        if self._short is not None:
            self._short.prepare()

    def start(self, start: Start) -> None:
        """Set up a row."""
        if start.snapshot is None:
            self._new[start.key] = start.pages
            return
        cache = self._make([start.pages])
        cache.restore_states(0, self._snapshots[start.snapshot])
        self._reading[start.key] = cache

    def _make(self, pages: Sequence[Sequence[int]]) -> Cache:
        """A cache of new rows on these pages."""
        if self._spare is None or len(pages) > 1:
            return self._empty.with_pages(pages)
        cache, self._spare = self._spare, None
        cache.set_pages(0, pages[0])
        return cache

    def drop(self, keys: Sequence[Key]) -> None:
        """Drop rows."""
        decoding = []
        for key in keys:
            if self._new.pop(key, None) is None and self._reading.pop(key, None) is None:
                decoding.append(self._lives.pop(key))
        if decoding:
            self.rows.remove(decoding)

    def extend(self, key: Key, pages: Sequence[int]) -> None:
        """Append pages to a row that is decoded."""
        self.rows.extend(self._lives[key], pages)

    def snapshot_states(self, key: Key) -> StateSnapshot:
        """Copy the states of a row that is decoded."""
        return self.rows.snapshot_states(self._lives[key])

    def decode(self, top: int) -> list[tuple[Key, Chosen]]:
        """A step of all rows; their tokens."""
        self.rows.top = top
        lives, output = self.rows.next()
        tokens = zip(lives, _unpack(output), strict=True)
        return [(life[0], token) for life, token in tokens if self._lives.get(life[0]) == life]

    def read(self, reads: Sequence[Read], rows: Mapping[Key, Row], top: int) -> list[tuple[Key, Chosen]]:
        """One pass over prompts; the first tokens of those that were read to their end."""
        reads = sorted(reads, key=lambda read: read.key in self._new)  # new rows are made together
        caches = [self._reading.pop(read.key) for read in reads if read.key not in self._new]
        if new := [self._new.pop(read.key) for read in reads if read.key in self._new]:
            caches.append(self._make(new))
        cache = caches[0]
        if len(caches) > 1:
            cache.extend(caches[1:])
        answers = self._pass(cache, reads)
        for token in reads[0].replay:  # of one row alone
            ids = torch.tensor([[token]], device=self.model.device)
            answers = self.model(ids, cache=cache, logits_to_keep=1)[:, -1]
        if not reads[0].last:  # it is alone
            self._reading[reads[0].key] = cache
            return []
        keys = [read.key for read in reads]  # they go on to the decoder together
        output = self._begin(keys, [rows[key] for key in keys], cache, answers, top)
        return list(zip(keys, _unpack(output), strict=True))

    def _pass(self, cache: Cache, reads: Sequence[Read]) -> Tensor | Answers:
        """Read the tokens of all rows of a cache; the logits [B,V] behind them, or what a short pass answers."""
        stops = {
            row: [length - read.start for length in read.snapshots] for row, read in enumerate(reads) if read.snapshots
        }
        snapshots = Snapshots(stops) if stops else None
        counts = [len(read.tokens) for read in reads]
        if self._short is not None and self._short.takes(cache, counts, snapshots):
            answers = self._short.read([read.tokens for read in reads], cache, snapshots)
        else:
            ids = torch.tensor([[token for read in reads for token in read.tokens]], device=self.model.device)
            packed = counts if self._packed and (len(reads) > 1 or stops) else None
            answers = self.model(ids, cache=cache, counts=packed, logits_to_keep=1, snapshots=snapshots)[:, -1]
        for row, read in enumerate(reads):
            for length, number in read.snapshots.items():
                assert snapshots is not None
                saved = snapshots.states(row, length - read.start)
                self._snapshots[number] = _state_snapshot(cache, saved, length)
        return answers

    def _begin(self, keys: list[Key], rows: list[Row], cache: Cache, answers: Tensor | Answers, top: int) -> StepOutput:
        """Choose the first tokens of rows, and have the rows decoded."""
        params, generators = [row.params for row in rows], []
        for row in rows:
            generator = row.params.generator(row.prompt, row.repeat)
            if row.tokens:  # it was pre-empted: its next number is the one that it would have drawn
                draw(row.params, generator, len(row.tokens))
            generators.append(generator)
        steps = [row.max_new_tokens - len(row.tokens) - 1 for row in rows]
        self._lives |= {key: (key, next(self._count)) for key in keys}
        lives = [self._lives[key] for key in keys]
        greedy = not top and SamplingFeatures.of(params) == SamplingFeatures()
        if isinstance(answers, Answers) and greedy:  # the host works while the device does
            self.rows.add(lives, steps, cache, answers.ids, params, generators)
            return answers.output()
        logits = answers.logits if isinstance(answers, Answers) else answers
        seen = seen_tokens(rows, logits)
        ids, output = sample_outputs(logits, params, generators, seen, top)
        self.rows.add(lives, steps, cache, ids, params, generators, seen=seen)
        return output


def _make_rows(model: StripedHyena, max_rows: int, decoding: Decoding, isolated: bool) -> Rows:
    if isolated:
        return IsolatedDecoder(model)
    if decoding == "eager":
        return EagerDecoder(model)
    under_way = 1 if decoding == "compiled" else 2
    return PipelinedDecoder(make_decoder(model, max_rows, decoding), under_way=under_way)


def _unpack(output: StepOutput) -> list[Chosen]:
    return list(map(Chosen, output.tokens, output.logprobs, output.top, output.finite))


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
