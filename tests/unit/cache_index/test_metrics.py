"""The metrics show the index's numbers as they are when asked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from rhizome.cache_index.v1 import cache_index_service_pb2 as pb
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


def test_pain_11_k_a_worker_whose_events_do_not_arrive_is_told_from_a_cold_one() -> None:
    index = PrefixIndex(100)
    discovery = Discovery(index, ())
    registry = CollectorRegistry()
    registry.register(IndexCollector(index, discovery))
    for name in ("cold", "silent"):
        discovery.followers[name, "here"] = Follower(index, name, "here", asyncio.Lock())
    discovery.followers["cold", "here"].state = pb.FOLLOWER_STATE_LIVE

    def following(worker: str) -> float | None:
        return registry.get_sample_value("rhizome_cache_index_following", {"worker": worker})

    assert (following("cold"), following("silent")) == (1.0, 0.0)
    discovery.followers["cold", "here"].state = pb.FOLLOWER_STATE_SNAPSHOT
    assert following("cold") == 0.0


async def test_pain_11_k_a_worker_that_cannot_be_reached_is_named_in_the_log(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/nobody.sock"
    follower = Follower(PrefixIndex(100), "silent", address, asyncio.Lock(), unreached_s=0.05)
    running = asyncio.create_task(follower.run())
    async with asyncio.timeout(10):
        while "event=worker_unreached worker=silent" not in caplog.text:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
