"""The generation loop: rows whose prompts are read, and rows that are decoded, at the same time.

Prompts are read shortest first, and equal ones once: their rows get copies of the cache. Short ones are read together,
without padding, long ones by themselves and in chunks, and no pass through the model carries more than a chunk's
tokens, so the memory of a prefill does not grow with the prompt (the cache does). A row is decoded as soon as its
prompt is read: between two passes over longer prompts, all rows that were read take one step. Rows that finish leave
the batch.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hyaena.cache import Cache
from hyaena.decoding import Decoding, EagerDecoder, PipelinedDecoder, StepOutput, make_decoder, sample_outputs
from hyaena.errors import NonFiniteError
from hyaena.generation.nonfinite import explain_non_finite
from hyaena.generation.stop_strings import StopStringFilter
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams

FinishReason = Literal["eos", "stop", "length"]
Progress = Callable[[int, int], None]

MAX_PREFILL_BATCH_TOKENS = 2048
"""The most tokens of prompts that share a pass: so many keep a device busy, and all of them wait for its end."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Timing and memory of one sequence. Seconds count work, not the time that the caller takes between events.

    Attributes:
        prompt_tokens: tokens before the completion, those of a prefix included.
        completion_tokens: tokens chosen, EOS included.
        time_to_first_token: seconds from the call to the first token, in a batch for the whole batch's prompts.
        decode_tokens_per_second: this row's speed after its first token; None when there was no second.
        peak_memory: bytes; on CUDA the most that tensors have held, elsewhere the process's largest resident size,
            both since the process began; None where the system does not tell.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    decode_tokens_per_second: float | None
    peak_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One token of one row.

    Attributes:
        index: the row: the place of its prompt in the list; with n samples of each prompt, that place · n + the sample.
        token: the id that was chosen.
        text: what can be shown now; empty while a character or a possible stop string is unfinished. The texts of
            a row, joined, are its completion.
        logprob: natural log-probability of the token under the model (no temperature, no penalty, no bias, no cut).
        top_logprobs: the most probable (id, log-probability) pairs, as many as ``logprobs`` names.
        finish_reason: set on the last event of a row: ``"eos"``, ``"stop"`` (a stop string) or ``"length"``.
        stats: set on the last event of a row.
    """

    index: int
    token: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(kw_only=True)
class Row:
    """Generation state of one sequence.

    Attributes:
        index: which row of the call; see ``Event``.
        prompt: the prompt's ids, those of a prefix included.
        params: how its tokens are chosen.
        text: turns its tokens into text.
        eos_ids: tokens that end it with finish_reason ``"eos"``.
        stop_ids: tokens that end it with finish_reason ``"stop"``.
        max_new_tokens: the number of tokens that ends it with finish_reason ``"length"``.
        repeat: how many rows of the call have the same prompt and come before it.
        tokens: the completion so far.
        first_token_at: seconds from the call to its first token.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    text: StopStringFilter
    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    max_new_tokens: int
    repeat: int = 0
    tokens: list[int] = field(default_factory=list)
    first_token_at: float = 0.0

    @cached_property
    def generator(self) -> torch.Generator:
        """Its own random numbers."""
        return self.params.generator(self.prompt, self.repeat)

    def take(self, token: int, now: float) -> tuple[str, FinishReason | None]:
        """Add a token; return the text to show and why the row ends, if it does."""
        if not self.tokens:
            self.first_token_at = now
        self.tokens.append(token)
        if token in self.eos_ids or token in self.stop_ids:
            text, stopped = self.text.finish()
            return text, "eos" if token in self.eos_ids and not stopped else "stop"
        text, stopped = self.text.push(token)
        if stopped:
            return text, "stop"
        if len(self.tokens) < self.max_new_tokens:
            return text, None
        rest, stopped = self.text.finish()
        return text + rest, "stop" if stopped else "length"

    def stats(self, now: float, device: torch.device) -> Stats:
        count = len(self.tokens)
        seconds = now - self.first_token_at
        return Stats(
            prompt_tokens=len(self.prompt),
            completion_tokens=count,
            time_to_first_token=self.first_token_at,
            decode_tokens_per_second=(count - 1) / seconds if count > 1 and seconds > 0 else None,
            peak_memory=peak_memory(device),
        )


def seen_tokens(rows: Sequence[Row], logits: Tensor) -> Tensor | None:
    """Which tokens occurred in each row, bool of the shape of logits [B,V]; None where no row has a penalty."""
    if all(row.params.repetition_penalty == 1 for row in rows):
        return None
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for i, row in enumerate(rows):
        seen[i, torch.tensor([*row.prompt, *row.tokens], device=logits.device)] = True
    return seen


class GenerationLoop:
    """Reads the prompts of all rows and decodes them.

    Args:
        model: of all rows.
        rows: to be read.
        prefix: a cache of one row that has read a beginning which all prompts share, shorter than each; or None.
        method: how long convolutions of the prompts are evaluated.
        decoding: how single steps are evaluated; resolved, not ``"auto"``.
        chunk: the most tokens of one pass over prompts.
        top: how many of the most probable tokens to report.
        progress: called with the prompt tokens that were read, and all prompt tokens, after each pass.
    """

    def __init__(
        self,
        model: StripedHyena,
        rows: list[Row],
        *,
        prefix: Cache | None,
        method: str,
        decoding: Decoding,
        chunk: int,
        top: int,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.rows = {row.index: row for row in rows}  # not finished
        self.method = method
        self.decoding: Decoding = decoding
        self.chunk = chunk
        self.top = top
        self.progress = progress
        self.seconds = 0.0  # of work, since the call
        prompts = _by_prompt(rows)
        start = 0 if prefix is None else prefix.length
        most = min(chunk, MAX_PREFILL_BATCH_TOKENS)
        packs = start == 0 and all(getattr(layer.mixer, "packs", False) for layer in model.layers)
        groups = _groups(prompts, start, most, packs=packs)
        self.waiting = deque(Prefill(model, group, prefix, method, chunk) for group in groups)
        self.total, self.read = sum(len(equal[0].prompt) - start for equal in prompts), 0
        self.decoder: EagerDecoder[int] | PipelinedDecoder[int] | None = None
        self.decoding_rows: set[int] = set()

    def events(self) -> Iterator[Event]:
        """Events, as they come. Inference mode is on inside the passes only: a generator would leave it on outside."""
        try:
            while self.waiting or self.decoding_rows:
                if self.waiting:
                    yield from self._work(self._read)
                if self.decoding_rows:
                    yield from self._work(self._decode)
        finally:
            if self.decoder is not None:
                self.decoder.wait()

    def _work(self, part: Callable[[], tuple[list[int], StepOutput] | None]) -> list[Event]:
        """Do one part of the work, with its time counted."""
        began = time.perf_counter()
        result = part()
        events = [] if result is None else self._take(*result, began)
        self.seconds += time.perf_counter() - began
        return events

    @torch.inference_mode()
    def _read(self) -> tuple[list[int], StepOutput] | None:
        """One pass over prompts; where it was the last of a group, the first tokens of the group's rows."""
        prefill = self.waiting[0]
        logits = prefill.run_pass()
        self.read += prefill.last_count
        if self.progress is not None:
            self.progress(self.read, self.total)
        if logits is None:
            return None
        self.waiting.popleft()
        rows = prefill.rows
        logits = logits[prefill.places]
        params, generators = [row.params for row in rows], [row.generator for row in rows]
        seen = seen_tokens(rows, logits)
        ids, output = sample_outputs(logits, params, generators, seen, self.top)
        keys = [row.index for row in rows]
        steps = [row.max_new_tokens - 1 for row in rows]
        if all(output.finite) and any(steps):
            if self.decoder is None:
                self.decoder = self._make_decoder()
            cache = prefill.cache if len(rows) == len(prefill.group) else prefill.cache.select(prefill.places)
            self.decoder.add(keys, steps, cache, ids, params, generators, seen=seen)
            self.decoding_rows |= set(keys)
        return keys, output

    def _decode(self) -> tuple[list[int], StepOutput]:
        assert self.decoder is not None
        return self.decoder.next()

    def _make_decoder(self) -> EagerDecoder[int] | PipelinedDecoder[int]:
        if self.decoding == "eager":
            return EagerDecoder(self.model, top=self.top)
        decoder = make_decoder(self.model, len(self.rows), self.decoding, top=self.top)
        return PipelinedDecoder(decoder, under_way=1 if self.decoding == "compiled" else 2)

    def _take(self, keys: list[int], output: StepOutput, began: float) -> list[Event]:
        """Add the tokens of one step to their rows; rows that finish leave."""
        now = self.seconds + time.perf_counter() - began
        events, finished = [], []
        for i, key in enumerate(keys):
            row = self.rows.get(key)
            if row is None:  # it finished while this step was computed
                continue
            if not output.finite[i]:
                raise self._explain(row)
            text, reason = row.take(output.tokens[i], now)
            events.append(
                Event(
                    index=row.index,
                    token=output.tokens[i],
                    text=text,
                    logprob=output.logprobs[i],
                    top_logprobs=output.top[i],
                    finish_reason=reason,
                    stats=row.stats(now, self.model.device) if reason else None,
                )
            )
            if reason is not None:
                finished.append(key)
        for key in finished:
            del self.rows[key]
        leaving = [key for key in finished if key in self.decoding_rows]
        if leaving and self.decoder is not None:
            self.decoding_rows -= set(leaving)
            self.decoder.remove(leaving)
        return events

    def _explain(self, row: Row) -> NonFiniteError:
        """Find where the numbers went wrong, and make the error."""
        if self.decoder is not None:
            self.decoder.wait()
        self.decoder = None  # the search for the cause needs a cache of its own
        cause = explain_non_finite(self.model, row.prompt + row.tokens, method=self.method)
        return NonFiniteError(
            f"the logits after {len(row.prompt)} prompt tokens and {len(row.tokens)} new ones are not finite: {cause}"
        )


class Prefill:
    """Reads prompts together, pass by pass, into a cache of their own.

    Attributes:
        group: the prompts that are read, each as the rows that have it.
        rows: all of them.
        places: for each row the place of its prompt in the group.
        cache: of one row per prompt, with room for the prompts and the new tokens.
        last_count: prompt tokens that the last pass read.
    """

    def __init__(
        self, model: StripedHyena, group: list[list[Row]], prefix: Cache | None, method: str, chunk: int
    ) -> None:
        self.model = model
        self.group = group
        self.rows = [row for equal in group for row in equal]
        self.places = [place for place, equal in enumerate(group) for _ in equal]
        self.prefix = prefix
        self.method = method
        self.last_count = 0
        start = 0 if prefix is None else prefix.length
        prompts = [equal[0].prompt[start:] for equal in group]
        self._passes = _passes(prompts, chunk)
        self._left = 1 if len(prompts) > 1 else -(-len(prompts[0]) // chunk)
        self._cache: Cache | None = None

    @property
    def cache(self) -> Cache:
        if self._cache is None:  # made when the first pass is, so that waiting prompts cost nothing
            room = max(len(row.prompt) + row.max_new_tokens for row in self.rows)
            if self.prefix is None:
                self._cache = self.model.make_cache(len(self.group), max_length=room, method=self.method)
            else:
                self._cache = self.prefix.select([0] * len(self.group), max_length=room)
        return self._cache

    def run_pass(self) -> Tensor | None:
        """Read the next pass; after the last one the logits [B,V] that follow the prompts, before it None."""
        ids, counts = next(self._passes)
        logits = self.model(
            ids.to(self.model.device), cache=self.cache, counts=counts, logits_to_keep=1, method=self.method
        )
        self.last_count = ids.numel()
        self._left -= 1
        return None if self._left else logits[:, -1]


def _by_prompt(rows: list[Row]) -> list[list[Row]]:
    """The rows of each prompt, the shortest prompt first."""
    equal: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        equal.setdefault(tuple(row.prompt), []).append(row)
    return sorted(equal.values(), key=lambda rows: len(rows[0].prompt))


def _groups(prompts: list[list[Row]], start: int, most: int, *, packs: bool) -> list[list[list[Row]]]:
    """Prompts to read together: as many as have ``most`` tokens behind the prefix of ``start`` tokens, at least one.

    Prompts of several lengths are read together where the model takes them packed. After a prefix they are not: packed
    rows that have a past pass through a recurrence one by one, and rows of one length together.
    """
    groups: list[list[list[Row]]] = []
    total = 0
    for equal in prompts:
        length = len(equal[0].prompt)
        total += length - start
        if groups and total <= most and (packs or len(groups[-1][0][0].prompt) == length):
            groups[-1].append(equal)
        else:
            groups.append([equal])
            total = length - start
    return groups


def _passes(prompts: list[list[int]], chunk: int) -> Iterator[tuple[Tensor, list[int] | None]]:
    """The ids of each pass over prompts: chunks of a long one, [1,T]; several in one pass, [B,T] where they are of one
    length, else [1,ΣT] and the counts of tokens of each.
    """
    counts = [len(prompt) for prompt in prompts]
    if len(set(counts)) > 1:
        yield torch.tensor([[token for prompt in prompts for token in prompt]], device="cpu"), counts
    elif len(prompts) > 1:
        yield torch.tensor(prompts, device="cpu"), None
    else:
        for start in range(0, counts[0], chunk):
            yield torch.tensor([prompts[0][start : start + chunk]], device="cpu"), None


def peak_memory(device: torch.device) -> int | None:
    """The most bytes used since the process began: by tensors on a CUDA device, elsewhere by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
