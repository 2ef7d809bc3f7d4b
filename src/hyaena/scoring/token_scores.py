"""Log-probability, entropy and rank of every token of a record, from the output of the final norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyaena.model import StripedHyena
from hyaena.scoring.reader import Span
from hyaena.scoring.records import Record

LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Logits that exist at a time on a kind of device; positions are taken in chunks of so many over V."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """What a model says of the tokens of one text.

    Arrays have one entry per token of the text; BOS in front of it is none of them. A first token without BOS in front
    is not predicted by anything: its log-probability and entropy are NaN, its rank is 0.

    Attributes:
        tokens: int64 [T].
        logprobs: float32 [T], the natural log-probability of each token after those before it.
        entropies: float32 [T], in nats, of the distribution that predicted the token; None unless computed.
        ranks: int32 [T], 1 where the token was the most probable one; None unless computed.
        top_ids: int64 [T,k], the most probable tokens at each position, the best first (-1 where nothing predicts
            the token); None unless computed.
        top_logprobs: float32 [T,k], their log-probabilities.
        count: tokens that were predicted.
        sum: of their log-probabilities, in float64.
        strands: with ``both_strands`` the scores of the two strands, the other one in its own direction. ``sum`` is
            then the mean of the two sums; ``logprobs`` and ``entropies`` are means over the two of each position, or
            the one there is; ``tokens`` are those of the text, and what belongs to one strand alone is None.
    """

    tokens: Any
    logprobs: Any
    entropies: Any | None
    ranks: Any | None
    count: int
    sum: float
    top_ids: Any | None = None
    top_logprobs: Any | None = None
    strands: tuple[Score, Score] | None = None

    @property
    def mean(self) -> float:
        """Log-probability per predicted token; NaN where there is none."""
        return self.sum / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """``exp(-mean)``; infinite where that overflows."""
        try:
            return math.exp(-self.mean)
        except OverflowError:
            return math.inf


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is computed beside log-probabilities: entropies, ranks, and the ``top`` most probable tokens."""

    entropy: bool = True
    rank: bool = True
    top: int = 0

    @property
    def sections(self) -> list[int]:
        """How many numbers per token: of log-probability, entropy, rank, top log-probabilities and top ids."""
        return [1, int(self.entropy), int(self.rank), self.top, self.top]


def token_statistics(logits: Tensor, targets: Tensor, wanted: Wanted) -> Tensor:
    """Compute what logits say of one target each, in float32 (float64 for float64).

    Equations: ``logprob = z_target - log Σ exp z``; ``entropy = -Σ p log p`` in nats; ``rank = 1 + #{z > z_target}``.

    Args:
        logits: [n,V].
        targets: int64 [n].
        wanted: what to compute beside log-probabilities.

    Returns:
        [k,n], numbers in the order of ``Wanted.sections``; float32 holds every id exactly.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.log_softmax(-1, dtype=wide)
    rows = [logp.gather(-1, targets[:, None])]  # each [n,…]
    if wanted.entropy:
        p = logp.exp()
        rows.append(torch.special.entr(p, out=p).sum(-1, keepdim=True))  # -p·log p, 0 where p is 0
    if wanted.rank:
        above = logits > logits.gather(-1, targets[:, None])
        rows.append(above.sum(-1, keepdim=True).to(wide) + 1)
    if wanted.top:
        best = logp.topk(wanted.top, dim=-1)
        rows += [best.values, best.indices.to(wide)]
    return torch.cat(rows, dim=1).T


def logits_at_once(model: StripedHyena) -> int:
    """At how many positions logits are computed at a time."""
    most = LOGITS_AT_ONCE.get(model.device.type, LOGITS_AT_ONCE["cpu"])
    return max(1, most // model.config.vocab_size)


class TokenScorer:
    """Observes the final norm, and collects the statistics of every token.

    Args:
        model: whose head is applied.
        wanted: what to compute beside log-probabilities.
    """

    def __init__(self, model: StripedHyena, wanted: Wanted) -> None:
        self.model = model
        self.wanted = wanted
        self._parts: dict[Record, list[Tensor]] = {}
        self.positions = logits_at_once(model)

    def observe(self, place: str, x: Tensor, spans: Sequence[Span]) -> None:
        """Take x [1,t,D], the norm's output at the tokens of ``spans``."""
        counts = [min(span.stop, len(span.record) - 1) - span.start for span in spans]  # the last token predicts none
        if not any(counts):
            return
        targets = torch.cat([s.record.ids[s.start + 1 : s.start + 1 + n] for s, n in zip(spans, counts, strict=True)])
        places = torch.cat(
            [torch.arange(s.rows.start, s.rows.start + n, device="cpu") for s, n in zip(spans, counts, strict=True)]
        )
        places, targets = places.to(x.device), targets.to(x.device)
        values = torch.cat(
            [
                token_statistics(self.model.logits(x[0, at], wide=True), following, self.wanted)
                for at, following in zip(places.split(self.positions), targets.split(self.positions), strict=True)
            ],
            dim=1,
        ).cpu()
        for span, part in zip(spans, values.split(counts, dim=1), strict=True):
            self._parts.setdefault(span.record, []).append(part)

    def take(self, record: Record) -> Tensor:
        """Return the statistics [k,T] of a record that was read; NaN for a first token that nothing predicts."""
        parts = self._parts.pop(record, [])
        values = torch.cat(parts, dim=1) if parts else torch.empty(sum(self.wanted.sections), 0, device="cpu")
        if not record.context:
            values = torch.nn.functional.pad(values, (1, 0), value=math.nan)
        return values[:, max(0, record.context - 1) :]


def make_score(record: Record, values: Tensor, wanted: Wanted, *, as_torch: bool) -> Score:
    """Build a Score of the statistics [k,T] of ``TokenScorer.take``."""
    (logprobs,), entropies, ranks, top_logprobs, top_ids = values.split(wanted.sections)
    predicted = logprobs[1:] if not record.context else logprobs

    def result(x: Tensor) -> Any:
        return x.clone() if as_torch else x.numpy()  # a clone can be trained with; what inference mode made can not

    return Score(
        tokens=result(record.tokens),
        logprobs=result(logprobs.float()),
        entropies=result(entropies[0].float()) if wanted.entropy else None,
        ranks=result(ranks[0].nan_to_num(0).int()) if wanted.rank else None,
        count=len(predicted),
        sum=float(predicted.double().sum()),
        top_ids=result(top_ids.T.nan_to_num(-1).long()) if wanted.top else None,
        top_logprobs=result(top_logprobs.T.float()) if wanted.top else None,
    )


def mean_of_strands(one: Score, other: Score) -> Score:
    """Combine the scores of the two strands of a sequence; see ``Score.strands``."""

    def mean(mine: Any, theirs: Any) -> Any:
        if isinstance(mine, Tensor):
            return torch.stack([mine, theirs.flip(0)]).nanmean(0)
        pair = np.stack([mine, theirs[::-1]])
        there = ~np.isnan(pair)
        with np.errstate(invalid="ignore"):
            return np.where(there, pair, 0).sum(0) / there.sum(0).astype(pair.dtype)

    return Score(
        tokens=one.tokens,
        logprobs=mean(one.logprobs, other.logprobs),
        entropies=None if one.entropies is None else mean(one.entropies, other.entropies),
        ranks=None,
        count=one.count,
        sum=(one.sum + other.sum) / 2,
        strands=(one, other),
    )
