"""Benchmarks by name, and the rows that they report. Imports nothing heavy: a list should appear without delay."""

from __future__ import annotations

import difflib
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["s", "MB", "GB", "tokens/s", "variants/s", "TB/s", "TFLOP/s", "modules", "tests", "passes"]


class IncorrectError(Exception):
    """A result is wrong, so that its times would mean nothing."""


class MissingError(Exception):
    """What a benchmark compares with is not installed or does not run; the message says what, and how to get it."""


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one quantity: their extremes, their median and their number."""

    min: float
    median: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """The summary of at least one value."""
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1], len(ordered))


@dataclass(frozen=True)
class Target:
    """What a row has to reach: the median of its ratio, or of our own side where there is no ratio."""

    relation: Literal[">=", "<=", ">"]
    value: float

    def met_by(self, value: float) -> bool:
        """Whether a value reaches the target."""
        holds = {">=": operator.ge, "<=": operator.le, ">": operator.gt}[self.relation]
        return holds(value, self.value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        what: the quantity, its sizes included.
        unit: of ``ours`` and ``baseline``.
        ours: our side.
        baseline_name: the other side: another method, another library, or a bound. Empty when there is none.
        baseline: the other side.
        ratio: oriented so that the target can be held against it; ``ratio_name`` names the two sides.
        ratio_name: such as ``"baseline / ours"``.
        target: None where the row only informs.
        note: how it was measured, and what the numbers leave out.
    """

    what: str
    unit: Unit
    ours: Summary
    baseline_name: str = ""
    baseline: Summary | None = None
    ratio: Summary | None = None
    ratio_name: str = ""
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.target.met_by((self.ratio or self.ours).median)


def pairwise(over: Sequence[float], under: Sequence[float]) -> Summary:
    """The ratios of what was measured in turns, pair by pair."""
    return Summary.of(a / b for a, b in zip(over, under, strict=True))


def spanning(over: Summary, under: Summary) -> Summary:
    """The ratio of what was measured one after the other: of the medians, with all that the extremes allow."""
    count = min(over.count, under.count)
    return Summary(over.min / under.max, over.median / under.median, over.max / under.min, count)


def require_equal(what: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    """Refuse to go on unless two results agree, relative to the largest entry.

    Raises:
        IncorrectError: with the difference.
    """
    scale = float(other.abs().max())
    difference = float((one - other).abs().max()) / scale
    if not difference <= tolerance:  # NaN fails too
        raise IncorrectError(f"{what}: the difference is {difference:.2g} of the largest entry, allowed {tolerance:g}")


@dataclass
class Session:
    """One run of benchmarks.

    Attributes:
        quick: tiny sizes, to see that everything runs.
        deadline: on ``time.perf_counter``; nothing is begun after it.
    """

    quick: bool = False
    deadline: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def release(self) -> None:
        """Called before each step: give back memory that the last one used."""


@dataclass(frozen=True)
class Step:
    """A part of a benchmark that stands by itself: one that fails takes no other with it."""

    what: str
    run: Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and where it is.

    Attributes:
        name: on the command line.
        target: ``"module:function"``; the function takes the session and returns rows, or steps that do.
        summary: one line.
        minutes: about how long it takes in full.
        required: the others are not run when it finds something wrong.
    """

    name: str
    target: str
    summary: str
    minutes: float
    required: bool = False

    def load(self) -> Callable[[Any], Iterable[Row | Step]]:
        """Import the function."""
        return load(self.target)


def load(target: str) -> Callable[..., Any]:
    """Import ``"module:function"`` of this package."""
    module, function = target.split(":")
    return getattr(import_module(f"benchmarks.{module}"), function)


@dataclass(frozen=True)
class Suite:
    """Benchmarks that share a page.

    Attributes:
        name: of ``python -m benchmarks.NAME`` and of the files ``NAME.md`` and ``NAME.json``.
        title: of the page.
        method: how the figures were taken, for the head of the page.
        benchmarks: in the order of the page.
        session: ``"module:function"`` that makes a Session from ``quick`` and ``deadline``.
        appendix: ``"module:function"`` that writes the end of the page, or nothing.
        packages: whose versions the page names.
        cuda: whether a full run needs a CUDA device.
        limit: seconds after which nothing is begun.
        threads: of torch, or None for its own choice.
    """

    name: str
    title: str
    method: str
    benchmarks: tuple[Benchmark, ...]
    session: str = "registry:Session"
    appendix: str = ""
    packages: tuple[str, ...] = ("transformers", "numpy")
    cuda: bool = False
    limit: float = float("inf")
    threads: int | None = None

    def select(self, only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Benchmark]:
        """The benchmarks to run, in the suite's order: those named, or all of them, less those to skip.

        Raises:
            ValueError: an unknown name (the message offers the nearest one), or nothing left to run.
        """
        known = [benchmark.name for benchmark in self.benchmarks]
        for name in (*only, *skip):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
                raise ValueError(f"unknown benchmark {name!r}: {hint}")
        chosen = [b for b in self.benchmarks if b.name not in skip and (not only or b.name in only)]
        if not chosen:
            raise ValueError("every benchmark that was named is also skipped: skip fewer")
        return chosen
