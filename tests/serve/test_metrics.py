"""Histograms of times, beside those of prometheus_client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from hyaena.serve.metrics import Times


def test_equal_values_count_together_as_one_by_one() -> None:
    limits, values = (0.1, 0.5, 1.0), (0.05, 0.1, 0.1, 0.2, 3.0, 3.0, 3.0)
    ours, theirs = (CollectorRegistry() for _ in range(2))
    times = Times("seconds", "text", limits)
    ours.register(times)
    one = Histogram("hyaena:seconds", "text", ("model_name",), registry=theirs, buckets=limits)
    for value in set(values):
        times.observe("a", value, values.count(value))
    for value in values:
        one.labels("a").observe(value)

    def lines(registry: CollectorRegistry) -> list[str]:
        text = generate_latest(registry).decode()
        return [line for line in text.splitlines() if "_created" not in line and "_sum" not in line]

    assert lines(ours) == lines(theirs)
    total = ours.get_sample_value("hyaena:seconds_sum", {"model_name": "a"})
    assert total is not None and abs(total - sum(values)) < 1e-9
