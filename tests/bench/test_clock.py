"""Samples and timers. Nothing here depends on how long anything takes."""

from __future__ import annotations

import torch

from hyaena.bench.clock import Samples, Side, call_times, graph_times, ratios, take_turns

CPU = torch.device("cpu")


def test_samples() -> None:
    samples = Samples.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (samples.min, samples.median, samples.max, samples.count) == (1.0, 3.0, 100.0, 5)
    assert samples.spread == 33.0 and samples.middle_spread == 2 / 3
    assert Samples((5.0,)).middle_spread == 0
    assert samples.map(lambda v: 2 * v).values == (8.0, 2.0, 4.0, 6.0, 200.0)
    assert ratios([6.0, 9.0], [2.0, 1.0]).values == (3.0, 9.0)


def test_calls_are_warmed_up_and_counted() -> None:
    calls: list[None] = []
    assert call_times(lambda: calls.append(None), CPU, 4).count == 4 and len(calls) == 7
    calls.clear()
    assert call_times(lambda: calls.append(None), CPU, 1, warmup=0).count == 1 and len(calls) == 1


def test_a_graphs_time_is_that_of_one_call() -> None:
    names: list[str] = []
    samples = graph_times([lambda: names.append("a"), lambda: names.append("b")], CPU, 3)
    assert samples.count == 3 and names == ["a", "b"] * 4


def test_sides_take_turns_and_prepare_off_the_clock() -> None:
    calls: list[str] = []
    ticks = iter(range(100))

    def clock() -> float:
        calls.append("tick")
        return float(next(ticks))

    a = Side(lambda: calls.append("a"), prepare=lambda: calls.append("prepare"))
    seconds = take_turns({"a": a, "b": Side(lambda: calls.append("b"))}, 2, clock)
    assert calls == ["prepare", "tick", "a", "tick", "tick", "b", "tick"] * 2
    assert {name: samples.values for name, samples in seconds.items()} == {"a": (1.0, 1.0), "b": (1.0, 1.0)}
