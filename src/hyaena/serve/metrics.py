"""What the server counts, for Prometheus: vLLM's names of metrics under our prefix."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hyaena.serve.engine import Engine

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

T = TypeVar("T", Counter, Gauge, Histogram)

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)


class Metrics:
    """Counters of one server, in a registry of its own. Times are in seconds.

    All have the label ``model_name``. Tokens, times and ends of a request count for the adapter that it names; what
    the models of an engine share counts for the model itself.

    Args:
        name: of the model.
    """

    def __init__(self, name: str = "model") -> None:
        self.name = name
        self.registry = CollectorRegistry()

        def make(kind: type[T], name: str, text: str, *labels: str, **options: Any) -> T:
            return kind("hyaena:" + name, text, ("model_name", *labels), registry=self.registry, **options)

        self.running = make(Gauge, "num_requests_running", "Requests that are read or decoded.").labels(name)
        self.waiting = make(Gauge, "num_requests_waiting", "Requests that wait.").labels(name)
        self.kv_usage = make(
            Gauge, "kv_cache_usage_perc", "Share of the pages of keys and values in use; 1 is all."
        ).labels(name)
        self.kv_bytes = make(Gauge, "kv_cache_bytes", "Bytes of the pages in use.").labels(name)
        self.state_bytes = make(Gauge, "state_bytes", "Bytes of the Hyena states of rows.").labels(name)
        self.snapshot_bytes = make(
            Gauge, "prefix_cache_state_bytes", "Bytes of the Hyena states in the prefix cache."
        ).labels(name)
        self.preemptions = make(Counter, "num_preemptions", "Requests that gave way to older ones.").labels(name)
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts.")
        self.generated_tokens = make(Counter, "generation_tokens", "Tokens that were generated.")
        self.prefix_queries = make(Counter, "prefix_cache_queries", "Tokens of prompts that were looked up.")
        self.prefix_hits = make(Counter, "prefix_cache_hits", "Tokens of prompts that the prefix cache spared.")
        self.finished_requests = make(Counter, "request_success", "Requests that ended, by reason.", "finished_reason")
        self.first_token = Times("time_to_first_token_seconds", "From arrival to the first token.", _LONG)
        self.next_token = Times("inter_token_latency_seconds", "From a token to the next.", _SHORT)
        self.registry.register(self.first_token)
        self.registry.register(self.next_token)
        self.latency = make(Histogram, "e2e_request_latency_seconds", "From arrival to the end.", buckets=_LONG)
        self._generated: dict[str, Counter] = {}  # by model: looking a label up takes longer than counting
        self._load = (0, 0, 0, 0, 0)  # as it was recorded: requests, pages, snapshots, pre-emptions

    def tokens(self, count: int, seconds: float, *, first: bool, adapter: str = "") -> None:
        """Count tokens of so many requests that came so long after the request, or after the token before each."""
        model = adapter or self.name
        if model not in self._generated:
            self._generated[model] = self.generated_tokens.labels(model)
        self._generated[model].inc(count)
        (self.first_token if first else self.next_token).observe(model, seconds, count)

    def finished(self, reason: str, *, prompt: int, cached: int | None, seconds: float, adapter: str = "") -> None:
        """Count a request that ended.

        Args:
            reason: why.
            prompt: its tokens.
            cached: those that the prefix cache spared; None where it ended while it waited, and nothing was read.
            seconds: from its arrival.
            adapter: that it named.
        """
        model = adapter or self.name
        self.finished_requests.labels(model, reason).inc()
        if cached is not None:
            self.prompt_tokens.labels(model).inc(prompt)
            self.prefix_queries.labels(model).inc(prompt)
            self.prefix_hits.labels(model).inc(cached)
        self.latency.labels(model).observe(seconds)

    def observe_load(self, engine: Engine) -> None:
        """Record what the engine holds at this moment, where that has changed."""
        scheduler, pages = engine.scheduler, engine.scheduler.pages
        used, snapshots, preemptions = pages.count - pages.free, scheduler.prefix.snapshots, scheduler.preemptions
        load = (scheduler.running, scheduler.waiting, used, snapshots, preemptions)
        if load == self._load:
            return
        self.running.set(scheduler.running)
        self.waiting.set(scheduler.waiting)
        self.kv_usage.set(used / pages.count)
        self.kv_bytes.set(used * engine.runner.pool.page_bytes)
        self.state_bytes.set(scheduler.running * engine.state_bytes)
        self.snapshot_bytes.set(snapshots * engine.state_bytes)
        self.preemptions.inc(preemptions - self._load[-1])
        self._load = load

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class Times(Collector):
    """A histogram of seconds by model that counts equal ones together: the rows of a turn get their tokens at one time.

    Args:
        name: without our prefix.
        text: what is measured.
        limits: of the buckets, rising.
    """

    def __init__(self, name: str, text: str, limits: Sequence[float]) -> None:
        self.name, self.text, self.limits = "hyaena:" + name, text, limits
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, seconds: float, count: int) -> None:
        """Count so many values; from one thread."""
        self._sums.setdefault(model, 0.0)  # first: another thread collects what has counts
        counts = self._counts.setdefault(model, [0] * (len(self.limits) + 1))
        counts[bisect_left(self.limits, seconds)] += count
        self._sums[model] += count * seconds

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self.name, self.text, labels=("model_name",))
        names = [*map(str, self.limits), "+Inf"]
        for model, counts in list(self._counts.items()):
            buckets = list(zip(names, accumulate(counts), strict=True))
            family.add_metric((model,), buckets, self._sums[model])
        return [family]


def merged(texts: Mapping[str, str]) -> bytes:
    """The metrics of several servers as one text.

    Args:
        texts: names of servers -> their metrics as text. The names become the label ``replica``.
    """
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            mine = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                mine.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterable[Metric]:
        return self.families
