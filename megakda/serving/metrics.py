"""Numbers about a server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import generate_latest as _generate
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from megakda.serving.loop import EngineLoop

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """One server's; `text` is what GET /metrics answers."""

    def __init__(self, loop: EngineLoop) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "megakda_requests",
            "HTTP requests by route and status; 499: the client left before the answer",
            ["route", "status"],
            registry=registry,
        )
        self.cut_streams = Counter(
            "megakda_cut_streams",
            "streams that began with status 200 and did not reach their end",
            ["reason"],
            registry=registry,
        )
        self.first_token = Histogram(
            "megakda_time_to_first_token_seconds",
            "from the arrival of a request to its first token, waiting included",
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "megakda_time_per_output_token_seconds",
            "mean over the tokens of an answer after the first",
            buckets=_SECONDS,
            registry=registry,
        )
        registry.register(_Engine(loop))
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        return _generate(self._registry)


class _Engine:
    """Reads the engine's own numbers when it is asked."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        loop, stats = self._loop, self._loop.stats
        gauges: dict[str, tuple[Any, str]] = {
            "healthy": (loop.failure is None, "0 after the engine failed"),
            "requests_waiting": (loop.waiting, "requests in the queue"),
            "requests_running": (stats.running, "requests in a slot"),
            "sequences_free": (stats.free_sequences, "free slots"),
            "sequences": (stats.max_sequences, "slots"),
            "cache_tokens_used": (stats.cache_tokens_used, "tokens in the cache"),
            "cache_tokens": (stats.cache_tokens, "tokens that the cache has room for"),
        }
        counters = {
            "prompt_tokens": (stats.prompt_tokens, "tokens of prompts"),
            "generated_tokens": (stats.generated_tokens, "new tokens"),
            "prefix_hits": (stats.prefix_hits, "prompts that began with a cached prefix"),
            "prefix_hit_tokens": (stats.prefix_hit_tokens, "tokens of prompts found in the cache"),
            "engine_steps": (stats.steps, "forward passes"),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"megakda_{name}", text, value=float(value))
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"megakda_{name}", text, value=float(value))
