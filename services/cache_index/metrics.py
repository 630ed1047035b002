"""Prometheus metrics of the index, read when they are asked for, so that nothing counts twice."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rhizome.cache_index.v1 import cache_index_service_pb2 as index_pb
from services.cache_index.discovery import Discovery
from services.cache_index.index import PrefixIndex

_TIER_NAMES = ("gpu", "host", "remote")


class IndexCollector(Collector):
    """The index's and its followers' numbers as they are now."""

    def __init__(self, index: PrefixIndex, discovery: Discovery) -> None:
        self._index = index
        self._discovery = discovery

    def collect(self) -> Iterator[Metric]:
        index, prefix = self._index, "rhizome_cache_index"
        yield GaugeMetricFamily(f"{prefix}_prefixes", "Prefixes held.", index.num_prefixes)
        yield GaugeMetricFamily(
            f"{prefix}_max_prefixes", "Bound on the prefixes held.", index.max_prefixes
        )
        yield CounterMetricFamily(
            f"{prefix}_dropped_prefixes", "Prefixes dropped to hold the bound.", index.num_dropped
        )
        yield CounterMetricFamily(
            f"{prefix}_orphans", "Pages announced without their parent.", index.num_orphans
        )
        pages = GaugeMetricFamily(
            f"{prefix}_pages", "Pages a worker holds.", labels=("worker", "tier")
        )
        lag = GaugeMetricFamily(
            f"{prefix}_lag_seconds",
            "Age of a worker's newest event when applied.",
            labels=["worker"],
        )
        following = GaugeMetricFamily(
            f"{prefix}_following",
            "1 while a worker's events arrive; else its pages are unknown, or old.",
            labels=["worker"],
        )
        resyncs = CounterMetricFamily(
            f"{prefix}_resyncs", "Snapshots taken again.", labels=["worker"]
        )
        for follower in list(self._discovery.followers.values()):
            holder = follower.holder
            for name, count in zip(_TIER_NAMES, holder.num_pages if holder else (), strict=False):
                pages.add_metric((follower.worker_id, name), count)
            lag.add_metric((follower.worker_id,), follower.lag_ns / 1e9)
            is_live = follower.state == index_pb.FOLLOWER_STATE_LIVE
            following.add_metric((follower.worker_id,), is_live)
            resyncs.add_metric((follower.worker_id,), follower.num_resyncs)
        yield from (pages, lag, following, resyncs)
