"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE", "Metrics", "Stopwatch"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


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

    def text(self, replicas: Callable[[], dict[str, int]]) -> bytes:
        for state, number in replicas().items():
            self._replicas.labels(state).set(number)
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
