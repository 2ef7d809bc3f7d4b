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
from typing import Literal, NoReturn

import torch
from torch import Tensor

from hyaena.cache import Cache
from hyaena.errors import NonFiniteError
from hyaena.generation.diagnosis import first_non_finite
from hyaena.generation.text import TextEnd
from hyaena.model import StripedHyena
from hyaena.sampling import SamplingParams, log_probabilities, sample

FinishReason = Literal["eos", "stop", "length"]
Progress = Callable[[int, int], None]


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


@dataclass
class Row:
    """One prompt and what has become of it."""

    index: int
    prompt: list[int]
    params: SamplingParams
    text: TextEnd
    eos_id: int | None
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    first_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.generator = self.params.generator()

    def take(self, token: int, now: float) -> tuple[str, FinishReason | None]:
        """Add a token; return the text to show and why the row ends, if it does."""
        if not self.tokens:
            self.first_token_at = now
        self.tokens.append(token)
        if token == self.eos_id:
            text, stopped = self.text.finish()
            return text, "stop" if stopped else "eos"
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
    """The rows that are still being written, their cache, and the two passes: prefill and step."""

    cache: Cache | None = None
    seconds: float = 0.0  # of work, since the call

    def __init__(
        self, model: StripedHyena, rows: list[Row], *, method: str, chunk: int, top: int, progress: Progress | None
    ) -> None:
        self.model = model
        self.rows = rows
        self.method = method
        self.chunk = chunk
        self.top = top
        self.progress = progress
        self.seen: Tensor | None = None

    def events(self) -> Iterator[Event]:
        """Inference mode is on inside the passes only: a generator would leave it on for whoever iterates."""
        forward = self._prefill
        while self.rows:
            began = time.perf_counter()
            events = self._choose(forward(), began)
            self.seconds += time.perf_counter() - began
            yield from events
            forward = self._step

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        """Read all prompts; returns the logits [B,V] after them. The order of the rows becomes that of the cache."""
        groups = _groups(self.rows, self.chunk)
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
        self.cache = caches[0] if len(caches) == 1 else Cache.merge(caches, max_length=capacity)
        if any(row.params.repetition_penalty != 1 for row in self.rows):
            self.seen = torch.zeros(len(self.rows), logits[0].shape[-1], dtype=torch.bool, device=self.model.device)
            for i, row in enumerate(self.rows):
                self.seen[i, torch.tensor(row.prompt, device=self.seen.device)] = True
        return torch.cat(logits)

    @torch.inference_mode()
    def _step(self) -> Tensor:
        """Read the last token of each row; returns the logits [B,V] after it."""
        ids = torch.tensor([row.tokens[-1:] for row in self.rows], device=self.model.device)
        return self.model(ids, cache=self.cache, logits_to_keep=1)[:, -1]

    @torch.inference_mode()
    def _choose(self, logits: Tensor, began: float) -> list[Event]:
        """Choose the next token of each row, and drop the rows that this finishes."""
        try:
            ids = sample(
                logits, [row.params for row in self.rows], [row.generator for row in self.rows], seen=self.seen
            )
        except NonFiniteError:
            self._explain(logits)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        chosen, values, indices = (t.tolist() for t in log_probabilities(logits, ids, self.top))
        tokens = ids.tolist()  # waits for the device: the clock is read after it
        now = self.seconds + time.perf_counter() - began
        events, going = [], []
        for i, row in enumerate(self.rows):
            text, reason = row.take(tokens[i], now)
            events.append(
                Event(
                    index=row.index,
                    token=tokens[i],
                    text=text,
                    logprob=chosen[i],
                    top_logprobs=tuple(zip(indices[i], values[i], strict=True)),
                    finish_reason=reason,
                    stats=row.stats(now, self.model.device) if reason else None,
                )
            )
            if reason is None:
                going.append(i)
        if len(going) < len(self.rows):
            self.rows = [self.rows[i] for i in going]
            assert self.cache is not None
            self.cache = self.cache.select(going) if going else None
            self.seen = self.seen[going] if self.seen is not None else None
        return events

    def _explain(self, logits: Tensor) -> NoReturn:
        """Find where the numbers went wrong, and say so."""
        bad = ~torch.isfinite(logits.amax(dim=-1))
        row = self.rows[int(bad.nonzero()[0])]
        self.cache = None  # the search needs a cache of its own
        where = first_non_finite(self.model, row.prompt + row.tokens, method=self.method)
        raise NonFiniteError(
            f"the logits after {len(row.prompt)} prompt tokens and {len(row.tokens)} new ones are not finite: {where}; "
            "check the weights with `hyaena info`, or compute in float32"
        ) from None


def _groups(rows: list[Row], chunk: int) -> list[list[Row]]:
    """Rows to prefill together: as many as fit into one pass when padded to the longest, at least one."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        if groups and (len(groups[-1]) + 1) * len(row.prompt) <= chunk:
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
