"""The same numbers under SGLang's names, for dashboards and endpoint pickers that know those.

Only what a worker can say truthfully; a request's times and counts are the gateway's
(`services/gateway/sglang_metrics.py`). Units are tokens where ours are pages.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

from services.worker.replica import Replica
from services.worker.step_totals import RECENT_S, Distribution

_PREFIX = "sglang:"
_LABELS = ("model_name", "engine_type", "tp_rank", "pp_rank")
# SGLang calls a cache that is fuller than this fully used.
_FULL = 0.9


def sglang_metrics(replica: Replica) -> Iterator[Metric]:
    """All of them; those of the cache are absent until the engine is ready."""
    # One series for each worker, of its rank 0, which plans for all ranks.
    labels = (replica.identity.pool.served_model_name, "unified", "0", "0")
    for name, documentation, value in (*_queues(replica), *_cache(replica)):
        gauge = GaugeMetricFamily(f"{_PREFIX}{name}", documentation, labels=_LABELS)
        gauge.add_metric(labels, value)
        yield gauge
    for name, documentation, count in _counts(replica):
        counter = CounterMetricFamily(f"{_PREFIX}{name}", documentation, labels=_LABELS)
        counter.add_metric(labels, count)
        yield counter
    totals = replica.totals
    for name, documentation, distribution in (
        ("queue_time_seconds", "Time that sequences waited here.", totals.queue_seconds),
        ("inter_token_latency_seconds", "Between a sequence's tokens.", totals.token_seconds),
    ):
        yield _histogram(f"{_PREFIX}{name}", documentation, distribution, labels)
    if (ready := replica.ready) is not None:
        info = GaugeMetricFamily(
            f"{_PREFIX}cache_config_info",
            "The cache's pages; always 1.",
            labels=(*_LABELS, "page_size", "num_pages"),
        )
        info.add_metric((*labels, str(ready.page_size), str(ready.num_pages)), 1)
        yield info


def _queues(replica: Replica) -> Iterator[tuple[str, str, float]]:
    load, totals = replica.load, replica.totals
    yield "num_running_reqs", "Sequences that run.", load.num_running
    yield "num_queue_reqs", "Sequences that wait to run.", load.num_waiting
    yield "gen_throughput", f"Output tokens a second, of {RECENT_S} s.", totals.output_rate()
    yield "cache_hit_rate", "Share of prompt tokens found in the cache.", totals.hit_rate()
    preempted = totals.num_recent_preemptions()
    yield "num_retracted_reqs", f"Sequences that gave way in {RECENT_S} s.", preempted


def _cache(replica: Replica) -> Iterator[tuple[str, str, float]]:
    ready, load = replica.ready, replica.load
    if ready is None:
        return
    size = ready.page_size
    used = max(0, ready.num_pages - load.num_free_pages - load.num_evictable_pages)
    usage = used / ready.num_pages
    running = load.num_running / ready.max_running_sequences
    yield "token_usage", "Share of the cache that sequences use.", usage
    yield "utilization", "The larger of running and cache use.", max(running, usage / _FULL)
    yield "num_used_tokens", "Room that sequences use.", used * size
    yield "kv_used_tokens", "Room that sequences use.", used * size
    yield "kv_available_tokens", "Room that holds nothing.", load.num_free_pages * size
    yield "kv_evictable_tokens", "Cached, used by none.", load.num_evictable_pages * size
    yield "max_total_num_tokens", "Room of the cache.", ready.num_pages * size
    yield "page_size", "Tokens of a page.", size
    yield "num_pages", "Pages of the cache.", ready.num_pages
    yield "context_len", "Longest sequence.", ready.context_length


def _counts(replica: Replica) -> Iterator[tuple[str, str, float]]:
    load = replica.load
    yield "num_retracted_requests", "Times a sequence gave way to others.", load.num_preemptions
    if (ready := replica.ready) is not None:
        evicted = load.num_evicted_pages * ready.page_size
        yield "evicted_tokens", "Cached tokens that gave way to others.", evicted


def _histogram(
    name: str, documentation: str, distribution: Distribution, labels: tuple[str, ...]
) -> Metric:
    family = HistogramMetricFamily(name, documentation, labels=_LABELS)
    family.add_metric(labels, buckets=distribution.buckets(), sum_value=distribution.total)
    return family
