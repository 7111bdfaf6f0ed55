"""What the retriever tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from searche1.retrieval.workers import Pool

PREFIX = "searche1_retriever_"
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Monitor:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(PREFIX + "requests", "requests by HTTP status", ["status"], registry=registry)
        self.request_seconds = Histogram(
            PREFIX + "request_seconds", "time to answer a request", buckets=SECONDS, registry=registry
        )
        self.queries = Counter(PREFIX + "queries", "queries asked for", registry=registry)
        self.remembered = Counter(PREFIX + "remembered_queries", "queries answered from the cache", registry=registry)
        self.faults = Counter(PREFIX + "failed_queries", "queries whose search failed", registry=registry)
        self.batch_size = Histogram(
            PREFIX + "batch_size", "queries searched together", buckets=SIZES, registry=registry
        )
        self._stages = Histogram(
            PREFIX + "stage_seconds", "time of a batch in a stage", ["stage"], buckets=SECONDS, registry=registry
        )

    def stage(self, name: str, seconds: float) -> None:
        """A batch was in this stage for so long."""
        self._stages.labels(name).observe(seconds)

    def watch(self, pending: Callable[[], int], pools: Sequence[Pool]) -> None:
        """Adds what is read when it is asked for: queries not answered yet, and the state of worker processes."""
        gauge = Gauge(PREFIX + "pending_queries", "queries not answered yet", registry=self._registry)
        gauge.set_function(pending)
        alive = Gauge(PREFIX + "workers", "processes that are ready", ["pool"], registry=self._registry)
        restarts = Gauge(PREFIX + "worker_restarts", "processes started again", ["pool"], registry=self._registry)
        for number, pool in enumerate(pools):
            label = f"{pool.name}{number}"
            alive.labels(label).set_function(partial(_num_alive, pool))
            restarts.labels(label).set_function(partial(getattr, pool, "num_restarts"))

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)


def _num_alive(pool: Pool) -> int:
    return len(pool.pids())
