"""Scoring of many texts in packed passes against one by one, with the bundled model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

import hyaena
from benchmarks.cpu import models
from benchmarks.cpu.memory import HOW, probe
from benchmarks.registry import IncorrectError, Row, Session, Step, Summary, Target, pairwise
from hyaena.bench.clock import Side, take_turns

SAME = 1e-4
"""Of every log-probability: two float32 evaluations of the same text."""


def unequal(session: Session) -> Iterator[Step]:
    """Texts of a sentence's length, where a pass costs more than its tokens, and of a page's, where tokens decide."""
    for low, high, target in ((8, 100, Target(">=", 3)), (100, 1000, None)):
        count = 8 if session.quick else 256 if target else 64
        yield Step(f"{count} texts of {low} to {high} bytes", partial(compare, session, count, low, high, target))


def compare(session: Session, count: int, low: int, high: int, target: Target | None) -> list[Row]:
    """The same texts in one call and in a call each."""
    model, tokenizer = models.cub()
    texts = passages(count, low, high)

    def together() -> list[hyaena.scoring.Score]:
        return hyaena.score(model, tokenizer, texts)

    def apart() -> list[hyaena.scoring.Score]:
        return [hyaena.score(model, tokenizer, text) for text in texts]

    difference = max(
        float(np.abs(one.logprobs - other.logprobs).max()) for one, other in zip(together(), apart(), strict=True)
    )
    if not difference <= SAME:
        raise IncorrectError(f"log-probabilities differ by {difference:.2g}, allowed {SAME:g}")
    seconds = take_turns({"together": Side(together), "apart": Side(apart)}, 1 if session.quick else 5)
    tokens = sum(map(len, texts))
    return [
        Row(
            what=f"scoring {count} texts of {low} to {high} bytes, cub",
            unit="tokens/s",
            ours=Summary.of(tokens / s for s in seconds["together"].values),
            baseline_name="one by one",
            baseline=Summary.of(tokens / s for s in seconds["apart"].values),
            ratio=pairwise(seconds["apart"].values, seconds["together"].values),
            ratio_name="ours / one by one",
            target=target,
            note=f"{tokens:,} bytes; largest difference of a log-probability {difference:.1g}.",
        )
    ]


def long_embedding(session: Session) -> list[Row]:
    """How much memory the embedding of a long sequence needs."""
    length = 3000 if session.quick else 100_000
    found = probe("--embed", length, torch.get_num_threads())
    config = models.EVO
    kept = length * config.hidden_size * 4 / 1e6
    return [
        Row(
            what=f"peak memory growth while {length:,} characters are embedded, a small model of Evo's kind",
            unit="MB",
            ours=Summary.of([found["growth"] / 1e6]),
            target=Target("<=", 500),
            note=f"{HOW}. In it: activations of all positions, {kept:.0f} MB, and one layer's keys and values, "
            f"{2 * kept:.0f} MB. {config.num_layers} layers, {config.hidden_size} channels, {found['seconds']:.0f} s.",
        )
    ]


def passages(count: int, low: int, high: int) -> list[str]:
    """Passages of this package's source, which is what cub reads; the same ones each time."""
    source = Path(models.__file__).read_text(encoding="ascii") * (1 + high // 1000)
    draw = random.Random(0)
    lengths = [draw.randint(low, high) for _ in range(count)]
    starts = [draw.randrange(len(source) - length) for length in lengths]
    return [source[start : start + length] for start, length in zip(starts, lengths, strict=True)]
