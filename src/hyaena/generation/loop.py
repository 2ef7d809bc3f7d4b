"""The machinery of generation: rows, prefill, step, choice.

Short prompts are read together, padded on the left, long ones by themselves and in chunks, and no pass through the
model carries more than a chunk's tokens, so the memory of a prefill does not grow with the prompt (the cache does).
Rows that finish leave the batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hyaena.cache import Cache
from hyaena.decoding import Decoder, Decoding, PipelinedDecoder, StepOutput, pack_outputs
from hyaena.errors import NonFiniteError
from hyaena.generation.nonfinite import first_non_finite
from hyaena.generation.stop_strings import StopStringFilter
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams, finite_rows, sample

FinishReason = Literal["eos", "stop", "length"]
Progress = Callable[[int, int], None]

MAX_PREFILL_BATCH_TOKENS = 2048
"""The most tokens, padding included, of prompts that share a pass: they keep a device busy, and padding, for which
attention needs a mask of the pass's length squared, stays cheap."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What one row took. Seconds count work, not the time between events that the caller keeps for itself.

    Attributes:
        prompt_tokens: tokens read.
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
        index: the row: the place of its prompt in the list.
        token: the id that was chosen.
        text: what can be shown now; empty while a character or a possible stop string is unfinished. The texts of
            a row, joined, are its completion.
        logprob: natural log-probability of the token under the model (no temperature, no penalty, no cut).
        top_logprobs: the most probable (id, log-probability) pairs, as many as ``logprobs`` asked for.
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
        index: the place of its prompt in the list.
        prompt: the prompt's ids.
        params: how its tokens are chosen.
        text: turns its tokens into text.
        eos_ids: tokens that end it with finish_reason ``"eos"``.
        stop_ids: tokens that end it with finish_reason ``"stop"``.
        max_new_tokens: the number of tokens that ends it with finish_reason ``"length"``.
        repeat: how many rows of the call have the same prompt and come before it.
        tokens: the completion so far.
        first_token_at: seconds from the call to its first token.
        generator: its own random numbers.
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

    def __post_init__(self) -> None:
        self.generator = self.params.generator(self.prompt, self.repeat)

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


class Run:
    """The rows that are still being written: their prefill, and what is made of each token."""

    seconds: float = 0.0  # of work, since the call

    def __init__(
        self,
        model: StripedHyena,
        rows: list[Row],
        *,
        method: str,
        decoding: Decoding,
        chunk: int,
        top: int,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.method = method
        self.decoding = decoding
        self.chunk = chunk
        self.top = top
        self.progress = progress

    def events(self) -> Iterator[Event]:
        """Inference mode is on inside the passes only: a generator would leave it on for whoever iterates."""
        steps: Forward | PipelinedDecoder | None = None
        try:
            while self.rows:
                began = time.perf_counter()
                if steps is None:
                    choice, steps = self._begin()
                else:
                    choice = steps.next()
                if not all(choice.finite):
                    if isinstance(steps, PipelinedDecoder):
                        steps.wait()
                    steps = None  # the search for the cause needs a cache of its own
                    raise self._explain(self.rows[choice.finite.index(False)])
                events, going = self._take(choice, began)
                if len(going) < len(self.rows):
                    self.rows = [self.rows[i] for i in going]
                    steps.keep(going)
                self.seconds += time.perf_counter() - began
                yield from events
        finally:
            if isinstance(steps, PipelinedDecoder):
                steps.wait()

    @torch.inference_mode()
    def _begin(self) -> tuple[StepOutput, Forward | PipelinedDecoder]:
        """Read the prompts and choose the first token of each; and the way to the others."""
        logits, cache = self._prefill()
        seen = None
        if any(row.params.repetition_penalty != 1 for row in self.rows):
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for i, row in enumerate(self.rows):
                seen[i, torch.tensor(row.prompt, device=logits.device)] = True
        forward = Forward(self.model, cache, self.rows, seen, self.top)
        choice = forward.choose(logits)
        most = max(row.max_new_tokens for row in self.rows) - 1
        if self.decoding == "eager" or most == 0 or not all(choice.finite):
            return choice, forward
        decoder = Decoder(
            self.model,
            cache,
            forward.ids,
            [row.params for row in self.rows],
            [row.generator for row in self.rows],
            seen=seen,
            top=self.top,
            captured=self.decoding == "cuda_graph",
        )
        return choice, PipelinedDecoder(decoder, most)

    @torch.inference_mode()
    def _prefill(self) -> tuple[Tensor, Cache]:
        """Read all prompts; the logits [B,V] after them. The order of the rows becomes that of the cache."""
        groups = _groups(self.rows, min(self.chunk, MAX_PREFILL_BATCH_TOKENS))
        self.rows = [row for group in groups for row in group]
        longest = max(len(row.prompt) for row in self.rows)
        capacity = longest + self.rows[0].max_new_tokens
        total, done = sum(len(row.prompt) for row in self.rows), 0
        caches, logits = [], []
        for group in groups:
            width = max(len(row.prompt) for row in group)
            # Where caches are merged, each only has to hold its prompts: the merged one gets the room to write.
            room = capacity if len(groups) == 1 else width
            cache = self.model.make_cache(len(group), max_length=room, method=self.method)
            for part, mask in _passes(group, width, self.chunk):
                device = self.model.device
                out = self.model(
                    part.to(device),
                    cache=cache,
                    mask=None if mask is None else mask.to(device),
                    logits_to_keep=1,
                    method=self.method,
                )
                done += int(part.numel() if mask is None else mask.sum())
                if self.progress is not None:
                    self.progress(done, total)
            caches.append(cache)
            logits.append(out[:, -1])
        return torch.cat(logits), caches[0] if len(caches) == 1 else Cache.merge(caches, max_length=capacity)

    def _take(self, choice: StepOutput, began: float) -> tuple[list[Event], list[int]]:
        """What the next token of each row means, and which rows go on."""
        now = self.seconds + time.perf_counter() - began
        events, going = [], []
        for i, row in enumerate(self.rows):
            text, reason = row.take(choice.tokens[i], now)
            events.append(
                Event(
                    index=row.index,
                    token=choice.tokens[i],
                    text=text,
                    logprob=choice.logprobs[i],
                    top_logprobs=choice.top[i],
                    finish_reason=reason,
                    stats=row.stats(now, self.model.device) if reason else None,
                )
            )
            if reason is None:
                going.append(i)
        return events, going

    def _explain(self, row: Row) -> NonFiniteError:
        """Find where the numbers went wrong; what to say of it."""
        where = first_non_finite(self.model, row.prompt + row.tokens, method=self.method)
        return NonFiniteError(
            f"the logits after {len(row.prompt)} prompt tokens and {len(row.tokens)} new ones are not finite: {where}; "
            "check the weights with `hyaena info`, or compute in float32"
        )


class Forward:
    """Decoding by calls of the model: any model, any device."""

    def __init__(self, model: StripedHyena, cache: Cache, rows: list[Row], seen: Tensor | None, top: int) -> None:
        self.model = model
        self.cache = cache
        self.params = [row.params for row in rows]
        self.generators = [row.generator for row in rows]
        self.seen = seen
        self.top = top
        self.ids = torch.zeros(0)

    @torch.inference_mode()
    def next(self) -> StepOutput:
        """Read the last token of each row, and choose the next."""
        return self.choose(self.model(self.ids[:, None], cache=self.cache, logits_to_keep=1)[:, -1])

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> StepOutput:
        """Choose a token per row from logits [B,V]; none where any row's are not finite."""
        finite = finite_rows(logits)
        if bool(finite.all()):
            self.ids = sample(logits, self.params, self.generators, seen=self.seen)
        else:
            self.ids = torch.zeros(len(finite), dtype=torch.int64, device=logits.device)
        if self.seen is not None:
            self.seen.scatter_(1, self.ids[:, None], True)
        return StepOutput.unpack(pack_outputs(logits, self.ids, finite, self.top))

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Go on with these rows."""
        if not rows:
            return
        self.cache = self.cache.select(rows)
        self.ids = self.ids[rows]
        self.params = [self.params[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        self.seen = None if self.seen is None else self.seen[rows]


def _groups(rows: list[Row], most: int) -> list[list[Row]]:
    """Rows to prefill together: as many as have ``most`` tokens when padded to the longest, at least one."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        if groups and (len(groups[-1]) + 1) * len(row.prompt) <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _passes(group: list[Row], width: int, chunk: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The ids [B,T] and mask of each pass over a group: one pass for several rows, chunks for a long one."""
    if len(group) > 1:
        padding = torch.tensor([[width - len(row.prompt)] for row in group])
        mask = torch.arange(width) >= padding
        ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in group])
        yield ids, mask
        return
    for start in range(0, width, chunk):
        yield torch.tensor([group[0].prompt[start : start + chunk]]), None


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
