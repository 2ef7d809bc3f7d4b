"""Suites: tasks that are run together, with published figures to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """A published figure.

    Attributes:
        task: its name in lm-evaluation-harness.
        metric: ``"acc"`` or ``"acc_norm"``, the accuracy with log-probabilities divided by the answers' lengths.
        value: as published.
    """

    task: str
    metric: str
    value: float


@dataclass(frozen=True)
class Suite:
    """Tasks with one number of few-shot examples.

    Attributes:
        source: where the figures were published.
        num_fewshot: examples in front of each question.
        references: the figures, one per task.
    """

    source: str
    num_fewshot: int
    references: tuple[Reference, ...]

    @property
    def tasks(self) -> list[str]:
        return [reference.task for reference in self.references]


SUITES: Mapping[str, Suite] = {
    "readme": Suite(
        source="README of togethercomputer/stripedhyena, StripedHyena-Hessian-7B",
        num_fewshot=10,
        references=(
            Reference("arc_challenge", "acc_norm", 0.570),
            Reference("hellaswag", "acc_norm", 0.816),
            Reference("winogrande", "acc", 0.735),
        ),
    )
}
