"""What Prometheus reads at /metrics."""

from __future__ import annotations

import math
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from runtime.launching.status import ServingStatus

__all__ = ["CONTENT_TYPE", "Metrics", "Stopwatch"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OF_REPLICAS = {
    "running": "Rows that have a place in the cache",
    "waiting": "Rows that wait for one",
    "tokens_cached": "Tokens in the cache",
    "tokens_that_fit": "Tokens that the cache has room for",
    "prefix_hits": "Prompt tokens that another row had run before, since the start",
    "prefill_tokens": "Prompt tokens that were run, since the start",
    "decode_tokens": "New tokens that were run, since the start",
    "preemptions": "How often a row gave its place to an older one, since the start",
}
"""As `runtime.launching.status.ReplicaStatus` has them."""


class Metrics:
    """Of one server: it has a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "partitioner_requests", "Requests that were answered", ["path", "status"], registry=registry
        )
        self.running = Gauge("partitioner_rows", "Rows that run or wait", registry=registry)
        self.left = Counter("partitioner_requests_left", "Requests whose client went away", registry=registry)
        self.prompt_tokens = Counter("partitioner_prompt_tokens", "Tokens of prompts", registry=registry)
        self.new_tokens = Counter("partitioner_generation_tokens", "Tokens that were written", registry=registry)
        self.first_s = Histogram(
            "partitioner_time_to_first_token_seconds",
            "From a request to its first token",
            buckets=_FIRST_S,
            registry=registry,
        )
        self.token_s = Histogram(
            "partitioner_time_per_output_token_seconds",
            "From a row's first token to its last, per token",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self.whole_s = Histogram(
            "partitioner_request_seconds", "From a row's request to its end", buckets=_WHOLE_S, registry=registry
        )
        self._replicas = Gauge("partitioner_replicas", "Replicas by state", ["state"], registry=registry)
        self._of_replicas = {
            name: Gauge(f"partitioner_replica_{name}", said, ["replica"], registry=registry)
            for name, said in _OF_REPLICAS.items()
        }

    def text(self, states: dict[str, int], status: ServingStatus) -> bytes:
        for state, number in states.items():
            self._replicas.labels(state).set(number)
        for number, replica in enumerate(status.replicas):
            values = vars(replica)
            for name, gauge in self._of_replicas.items():
                gauge.labels(str(number)).set(math.nan if values[name] is None else values[name])
        return generate_latest(self._registry)


class Stopwatch:
    """Of one row."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = time.monotonic()
        self._first = self._last = self._begin
        self._count = 0

    def tokens(self, count: int) -> None:
        """So many more have come."""
        self._last = time.monotonic()
        if not self._count:
            self._first = self._last
            self._metrics.first_s.observe(self._first - self._begin)
        self._count += count
        self._metrics.new_tokens.inc(count)

    def end(self) -> None:
        if self._count > 1:
            self._metrics.token_s.observe((self._last - self._first) / (self._count - 1))
        if self._count:
            self._metrics.whole_s.observe(self._last - self._begin)
