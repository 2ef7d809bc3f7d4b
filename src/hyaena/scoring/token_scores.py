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
        count: tokens that were predicted.
        sum: of their log-probabilities, in float64.
        strands: with ``both_strands`` the scores of the two strands, the other one in its own direction. ``sum`` is
            then the mean of the two sums; ``logprobs`` and ``entropies`` are means over the two of each position, or
            the one there is; ``tokens`` are those of the text and ``ranks`` None.
    """

    tokens: Any
    logprobs: Any
    entropies: Any | None
    ranks: Any | None
    count: int
    sum: float
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


def token_statistics(logits: Tensor, targets: Tensor, *, entropy: bool, rank: bool) -> Tensor:
    """Compute what logits say of one target each, in float32 (float64 for float64).

    Equations: ``logprob = z_target - log Σ exp z``; ``entropy = -Σ p log p`` in nats; ``rank = 1 + #{z > z_target}``.

    Args:
        logits: [n,V].
        targets: int64 [n].
        entropy, rank: whether to compute them.

    Returns:
        [k,n]: log-probabilities, then entropies and ranks where they are wanted.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.log_softmax(-1, dtype=wide)
    rows = [logp.gather(-1, targets[:, None]).squeeze(-1)]
    if rank:
        above = logits > logits.gather(-1, targets[:, None])
        rows.append(1 + above.sum(-1).to(wide))
    if entropy:
        # xlogy-like: where p underflows to 0, p·log p is 0 and not 0·(-inf)
        p = logp.exp()
        rows.insert(1, -(p.mul_(logp.clamp_(min=torch.finfo(wide).min))).sum(-1))
    return torch.stack(rows)


def logits_at_once(model: StripedHyena) -> int:
    """At how many positions logits are computed at a time."""
    most = LOGITS_AT_ONCE.get(model.device.type, LOGITS_AT_ONCE["cpu"])
    return max(1, most // model.config.vocab_size)


class TokenScorer:
    """Observes the final norm, and collects the statistics of every token.

    Args:
        model: whose head is applied.
        entropy, rank: whether to compute them.
    """

    def __init__(self, model: StripedHyena, *, entropy: bool, rank: bool) -> None:
        self.model = model
        self.entropy, self.rank = entropy, rank
        self._parts: dict[Record, list[Tensor]] = {}
        self.positions = logits_at_once(model)

    def observe(self, place: str, x: Tensor, spans: Sequence[Span]) -> None:
        """Take x [1,t,D], the norm's output at the tokens of ``spans``."""
        counts = [min(span.stop, len(span.record) - 1) - span.start for span in spans]  # the last token predicts none
        if not any(counts):
            return
        targets = torch.cat([s.record.ids[s.start + 1 : s.start + 1 + n] for s, n in zip(spans, counts, strict=True)])
        places = torch.cat([torch.arange(s.rows.start, s.rows.start + n) for s, n in zip(spans, counts, strict=True)])
        places, targets = places.to(x.device), targets.to(x.device)
        values = torch.cat(
            [
                token_statistics(self.model.logits(x[0, at]), wanted, entropy=self.entropy, rank=self.rank)
                for at, wanted in zip(places.split(self.positions), targets.split(self.positions), strict=True)
            ],
            dim=1,
        ).cpu()
        for span, part in zip(spans, values.split(counts, dim=1), strict=True):
            self._parts.setdefault(span.record, []).append(part)

    def take(self, record: Record) -> Tensor:
        """Return the statistics [k,T] of a record that was read; NaN for a first token that nothing predicts."""
        rows = 1 + self.entropy + self.rank
        parts = self._parts.pop(record, [])
        values = torch.cat(parts, dim=1) if parts else torch.empty(rows, 0)
        if not record.context:
            values = torch.nn.functional.pad(values, (1, 0), value=math.nan)
        return values[:, max(0, record.context - 1) :]


def make_score(record: Record, values: Tensor, *, entropy: bool, rank: bool, as_torch: bool) -> Score:
    """Build a Score of the statistics [k,T] of ``TokenScorer.take``."""
    logprobs = values[0]
    predicted = logprobs[1:] if not record.context else logprobs

    def result(x: Tensor) -> Any:
        return x.clone() if as_torch else x.numpy()  # a clone can be trained with; what inference mode made can not

    return Score(
        tokens=result(record.tokens),
        logprobs=result(logprobs.float()),
        entropies=result(values[1].float()) if entropy else None,
        ranks=result(values[-1].nan_to_num(0).int()) if rank else None,
        count=len(predicted),
        sum=float(predicted.double().sum()),
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
