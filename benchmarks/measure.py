"""Taking turns on the clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.registry import IncorrectError, Spread


@dataclass(frozen=True)
class Side:
    """One of the things compared.

    Attributes:
        run: what is timed.
        prepare: what puts things back before each run, off the clock.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


def take_turns(
    sides: Mapping[str, Side], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each side in each round: A B A B …, so that a slow moment of the machine meets both.

    Warming up is the caller's: what is cheap enough to repeat runs once before, what is not runs on a smaller input.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            if side.prepare is not None:
                side.prepare()
            gc.collect()
            began = clock()
            side.run()
            seconds[name].append(clock() - began)
    return seconds


def pairwise(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratios of what was measured side by side."""
    return Spread.of(a / b for a, b in zip(over, under, strict=True))


def require_equal(what: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    """Refuse to go on unless two results agree, relative to the largest entry.

    Raises:
        IncorrectError: with the difference.
    """
    scale = float(other.abs().max())
    difference = float((one - other).abs().max()) / scale
    if not difference <= tolerance:  # NaN fails too
        raise IncorrectError(f"{what}: the difference is {difference:.2g} of the largest entry, allowed {tolerance:g}")
