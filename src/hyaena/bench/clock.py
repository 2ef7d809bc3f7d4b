"""Samples of a quantity, and the timers that take them."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity, in the order in which they were taken."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Samples:
        """The samples of at least one value."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (self.max - self.min) / self.median

    @property
    def middle_spread(self) -> float:
        """(third quartile - first quartile) / median: what a single outlier does not change."""
        if self.count < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return (third - first) / self.median

    def map(self, function: Callable[[float], float]) -> Samples:
        """The same measurements in another unit."""
        return Samples(tuple(map(function, self.values)))


def ratios(over: Sequence[float], under: Sequence[float]) -> Samples:
    """The ratios of what was measured side by side."""
    return Samples.of(a / b for a, b in zip(over, under, strict=True))


def wall_seconds(run: Call) -> float:
    """Seconds of one call on the host's clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def call_times(run: Call, device: torch.device, repeats: int, *, warmup: int = 3) -> Samples:
    """How long each of several calls keeps a device busy, in seconds.

    Calls before them, off the clock, compile, choose algorithms and wake the device. On a CUDA device all calls are
    queued before any is waited for, so that the host's share of a launch hides behind the call before, and events
    around each take the time.
    """
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(repeats):
            run()
            stamps.append(time.perf_counter())
        return Samples.of(end - begin for begin, end in itertools.pairwise(stamps))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return Samples.of(begin.elapsed_time(end) / 1e3 for begin, end in events)


def graph_times(calls: Sequence[Call], device: torch.device, repeats: int) -> Samples:
    """Seconds per call of several calls that a CUDA device replays as one graph: no gaps between launches."""

    def run_all() -> None:
        for call in calls:
            call()

    run_all()
    if device.type != "cuda":
        return call_times(run_all, device, repeats, warmup=0).map(lambda s: s / len(calls))
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    return call_times(graph.replay, device, repeats).map(lambda s: s / len(calls))


@dataclass(frozen=True)
class Side:
    """One of several things that are compared.

    Attributes:
        run: what is timed.
        prepare: what puts things back before each run, off the clock.
    """

    run: Call
    prepare: Call | None = None


def take_turns(
    sides: Mapping[str, Side], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Samples]:
    """Seconds of each side in each round, A B A B …, so that a slow moment of the machine meets both.

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
    return {name: Samples.of(values) for name, values in seconds.items()}


def release() -> None:
    """Give back what the last measurement allocated: graphs and caches, and the allocator's free blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
