"""What the server counts, for Prometheus: vLLM's names of metrics under our prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from hyaena.serve.engine import Engine

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)


class Metrics:
    """Counters of one server, in a registry of its own. Times are in seconds."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.running = Gauge("hyaena:num_requests_running", "Requests that are read or decoded.", registry=registry)
        self.waiting = Gauge("hyaena:num_requests_waiting", "Requests that wait.", registry=registry)
        self.kv_usage = Gauge(
            "hyaena:kv_cache_usage_perc", "Share of the pages of keys and values in use; 1 is all.", registry=registry
        )
        self.kv_bytes = Gauge("hyaena:kv_cache_bytes", "Bytes of the pages in use.", registry=registry)
        self.state_bytes = Gauge("hyaena:state_bytes", "Bytes of the Hyena states of rows.", registry=registry)
        self.snapshot_bytes = Gauge(
            "hyaena:prefix_cache_state_bytes", "Bytes of the Hyena states in the prefix cache.", registry=registry
        )
        self.preemptions = Counter("hyaena:num_preemptions", "Requests that gave way to older ones.", registry=registry)
        self.prompt_tokens = Counter("hyaena:prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("hyaena:generation_tokens", "Tokens that were generated.", registry=registry)
        self.prefix_queries = Counter(
            "hyaena:prefix_cache_queries", "Tokens of prompts that were looked up.", registry=registry
        )
        self.prefix_hits = Counter(
            "hyaena:prefix_cache_hits", "Tokens of prompts that the prefix cache spared.", registry=registry
        )
        self.finished_requests = Counter(
            "hyaena:request_success", "Requests that ended, by reason.", ["finished_reason"], registry=registry
        )
        self.first_token = Histogram(
            "hyaena:time_to_first_token_seconds", "From arrival to the first token.", buckets=_LONG, registry=registry
        )
        self.next_token = Histogram(
            "hyaena:inter_token_latency_seconds", "From a token to the next.", buckets=_SHORT, registry=registry
        )
        self.latency = Histogram(
            "hyaena:e2e_request_latency_seconds", "From arrival to the end.", buckets=_LONG, registry=registry
        )
        self._seen_preemptions = 0

    def token(self, seconds: float, *, first: bool) -> None:
        """Count a token that came so long after the request, or after the token before it."""
        self.generated_tokens.inc()
        (self.first_token if first else self.next_token).observe(seconds)

    def finished(self, reason: str, *, prompt: int, cached: int, seconds: float) -> None:
        """Count a request that ended."""
        self.finished_requests.labels(reason).inc()
        self.prompt_tokens.inc(prompt)
        self.prefix_queries.inc(prompt)
        self.prefix_hits.inc(cached)
        self.latency.observe(seconds)

    def observe_load(self, engine: Engine) -> None:
        """Record what the engine holds at this moment."""
        scheduler, pages = engine.scheduler, engine.scheduler.pages
        used = pages.count - pages.free
        self.running.set(scheduler.running)
        self.waiting.set(scheduler.waiting)
        self.kv_usage.set(used / pages.count)
        self.kv_bytes.set(used * engine.runner.pool.page_bytes)
        self.state_bytes.set(scheduler.running * engine.state_bytes)
        self.snapshot_bytes.set(scheduler.prefix.snapshots * engine.state_bytes)
        self.preemptions.inc(scheduler.preemptions - self._seen_preemptions)
        self._seen_preemptions = scheduler.preemptions

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
