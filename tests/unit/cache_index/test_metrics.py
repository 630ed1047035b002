"""The metrics show the index's numbers as they are when asked."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, generate_latest

from services.cache_index.discovery import Discovery
from services.cache_index.follower import Follower
from services.cache_index.holders import GPU
from services.cache_index.index import PrefixIndex
from services.cache_index.metrics import IndexCollector


def test_pages_and_prefixes_are_counted_by_worker_and_tier() -> None:
    index = PrefixIndex(100)
    discovery = Discovery(index, ())
    registry = CollectorRegistry()
    registry.register(IndexCollector(index, discovery))
    discovery.followers["a", "here"] = Follower(index, "a", "here", asyncio.Lock())
    assert b"rhizome_cache_index_prefixes 0.0" in generate_latest(registry)
    index.store(index.add_holder("a", 1), GPU, 0, [1, 2, 3])
    index.store(index.add_holder("b", 1), GPU, 99, [100])
    text = generate_latest(registry).decode()
    assert "rhizome_cache_index_prefixes 3.0" in text
    assert "rhizome_cache_index_orphans_total 1.0" in text
    assert 'rhizome_cache_index_resyncs_total{worker="a"} 0.0' in text
