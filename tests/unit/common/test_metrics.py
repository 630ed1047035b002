"""Metrics over HTTP: served while the block lasts, on the port that was asked."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from services.common.metrics import metrics_server, process_metrics, registry_server


def counted() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("apples", "Apples.", registry=registry).inc(3)
    return registry


def fetch(port: int | None, accept: str = "*/*") -> str:
    request = urllib.request.Request(f"http://localhost:{port}/metrics", headers={"accept": accept})
    with urllib.request.urlopen(request) as response:
        return str(response.read(), "utf-8")


async def test_metrics_are_served_over_http_and_stop_with_the_block() -> None:
    async with metrics_server(0, counted()) as port:
        text = fetch(port)
    assert "apples_total 3.0" in text
    assert "process_resident_memory_bytes" in text
    with pytest.raises(urllib.error.URLError):
        fetch(port)


async def test_a_blocked_event_loop_is_seen() -> None:
    registry = CollectorRegistry()
    async with process_metrics(registry):
        for _ in range(3):
            await asyncio.sleep(0.1)
            time.sleep(0.3)
        lag = registry.get_sample_value("rhizome_event_loop_lag_seconds_sum")
    assert lag is not None
    assert lag >= 0.1


async def test_without_a_port_nothing_is_served() -> None:
    async with metrics_server(None, counted()) as port:
        assert port is None


async def test_a_port_that_cannot_be_bound_is_named() -> None:
    async with metrics_server(0, counted()) as taken:
        for port in (taken, 70_000):
            with pytest.raises(OSError, match=f"metrics on port {port}"):
                async with metrics_server(port, counted()):
                    pass


async def test_exemplars_are_for_those_who_ask_for_openmetrics() -> None:
    registry = CollectorRegistry()
    weight = Histogram("weight", "Of apples.", buckets=(1.0,), registry=registry)
    weight.observe(0.5, {"trace_id": "abc"})
    async with metrics_server(0, registry) as port:
        plain = fetch(port)
        open_metrics = fetch(port, "application/openmetrics-text; version=1.0.0")
    assert '# {trace_id="abc"} 0.5' in open_metrics
    assert open_metrics.endswith("# EOF\n")
    assert "abc" not in plain


async def test_a_registry_can_be_served_as_it_is() -> None:
    async with registry_server(0, counted()) as port:
        text = fetch(port)
    assert "apples_total 3.0" in text
    assert "process_" not in text
