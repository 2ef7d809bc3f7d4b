"""Narrow weights: the 7B's shape in 8 and 4 bits and in FP8, beside the same shape in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.gpu.model import decoding_row, time_decoding
from benchmarks.gpu.session import GpuSession
from benchmarks.registry import Row, Step, Summary, Target, spanning
from hyaena.bench.measure import Figure, measure_prefill
from hyaena.bench.run import random_model


@dataclass(frozen=True)
class Goal:
    """How many times the tokens/s of wide weights a scheme has to reach: by rows of a step, and in a prefill."""

    scheme: str
    decoding: dict[int, float]
    prefill: float | None = None


GOALS = (Goal("int8", {1: 1.8}), Goal("int4", {1: 2.8, 16: 1.0}), Goal("float8", {1: 1.8}, prefill=1.3))
OF_BANDWIDTH = 0.88
"""Share of its own bound that a step of one row has to reach."""


def narrow(session: GpuSession) -> Iterator[Step]:
    """Scheme by scheme."""
    for goal in GOALS:
        yield Step(f"{goal.scheme} weights", partial(compare, session, goal))


def compare(session: GpuSession, goal: Goal) -> Iterator[Row]:
    """Steps, and a prefill, by the model with wide weights and by one with narrow ones, one right after the other."""
    context, length = (24, 48) if session.quick else (2048, 8192)
    wide = session.model
    made = random_model(replace(wide.config, weights=goal.scheme), session.device, session.dtype)
    for batch, target in goal.decoding.items():
        theirs, ours = (time_decoding(session, model, batch, context) for model in (wide, made))
        what = f"decoding with {goal.scheme} weights, batch {batch}, context {context:,}"
        yield decoding_row(what, ours, OF_BANDWIDTH if batch == 1 else None)
        yield beside(what, ours, theirs, batch, target)
    if goal.prefill is not None:
        theirs, ours = (measure_prefill(model, length) for model in (wide, made))
        what = f"prefill of {length:,} tokens with {goal.scheme} weights"
        yield beside(what, ours, theirs, length, goal.prefill)


def beside(what: str, ours: Figure, theirs: Figure, tokens: int, target: float) -> Row:
    """Tokens per second with narrow and with wide weights; ``tokens`` are those of one sample."""
    narrow, wide = (Summary.of(tokens / s for s in figure.seconds.values) for figure in (ours, theirs))
    return Row(
        what=what,
        unit="tokens/s",
        ours=narrow,
        baseline_name="wide weights",
        baseline=wide,
        ratio=spanning(narrow, wide),
        ratio_name="narrow / wide",
        target=Target(">=", target),
    )
