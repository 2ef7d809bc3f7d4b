"""The benchmarks by name, and the rows that they report. Imports nothing heavy: a list should appear at once."""

from __future__ import annotations

import difflib
import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

Unit = Literal["s", "MB", "GB", "tokens/s", "TB/s", "TFLOP/s", "modules"]


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, as their extremes and their median."""

    min: float
    median: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1], len(ordered))


@dataclass(frozen=True)
class Bar:
    """What a row has to reach: the median of its ratio, or of our own side where there is no ratio."""

    relation: Literal[">=", "<=", ">"]
    value: float

    def met_by(self, value: float) -> bool:
        """Whether a value reaches the bar."""
        holds = {">=": operator.ge, "<=": operator.le, ">": operator.gt}[self.relation]
        return holds(value, self.value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        what: the quantity, its sizes included.
        unit: of ``ours`` and ``peer``.
        ours: our side.
        peer_name: the other side: another method, another library, or a floor. Empty when there is none.
        peer: the other side, measured in turns with ours.
        ratio: pairwise, oriented so that the bar can be held against it; ``ratio_name`` says which way.
        ratio_name: such as ``"peer / ours"``.
        bar: None where the row only informs.
        note: how it was measured, and what the numbers leave out.
    """

    what: str
    unit: Unit
    ours: Spread
    peer_name: str = ""
    peer: Spread | None = None
    ratio: Spread | None = None
    ratio_name: str = ""
    bar: Bar | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        if self.bar is None:
            return None
        return self.bar.met_by((self.ratio or self.ours).median)


class IncorrectError(Exception):
    """The two sides of a benchmark disagree: its times would mean nothing."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and where it lives.

    Attributes:
        name: what the command line calls it.
        target: ``"module:function"``; the function takes ``quick`` and returns rows.
        summary: one line.
        minutes: about how long it takes in full on two cores.
    """

    name: str
    target: str
    summary: str
    minutes: float

    def load(self) -> Callable[[bool], list[Row]]:
        """Import the function."""
        module, function = self.target.split(":")
        return getattr(import_module(f"benchmarks.{module}"), function)


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("startup", "startup:command_help", "`hyaena --help`: torch stays out; its wall time", 0.5),
    Benchmark("long_conv", "long_conv:blocked_against_fft", "the long convolution, `blocked` against `fft`", 0.5),
    Benchmark("prefill", "prefill_decode:prefill", "129M model, prefill of 8,192 tokens against Mistral", 3.5),
    Benchmark("prefill_chunks", "prefill_decode:prefill_chunks", "the same prefill in other chunk sizes", 2),
    Benchmark("prefill_memory", "memory:prefill_memory", "the same prefill, how much memory it needs", 1),
    Benchmark("decode_8k", "prefill_decode:decode_long", "129M model, decoding at 8,192 against Mistral", 1.5),
    Benchmark("decode_512", "prefill_decode:decode_short", "129M model, decoding at 512 against its floor", 0.5),
    Benchmark("cub_memory", "memory:cub_memory", "cub, memory of a prompt of 262,144 bytes against 16,384", 10.5),
)


def select(
    names: Sequence[str], skip: Sequence[str] = (), benchmarks: Sequence[Benchmark] = BENCHMARKS
) -> list[Benchmark]:
    """The benchmarks to run, in the order of the registry: those named, or all of them, less those to skip.

    Raises:
        ValueError: an unknown name (the message offers the nearest one), or nothing left to run.
    """
    known = [benchmark.name for benchmark in benchmarks]
    for name in (*names, *skip):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise ValueError(f"unknown benchmark {name!r}: {hint}")
    chosen = [b for b in benchmarks if b.name not in skip and (not names or b.name in names)]
    if not chosen:
        raise ValueError("every benchmark that was named is also skipped: skip fewer")
    return chosen
