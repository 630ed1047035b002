"""Prometheus metrics over HTTP, on a port of their own, and those that every service has.

Exemplars are in the answers to scrapers that ask for OpenMetrics, as Prometheus does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_LAG_INTERVAL_S = 0.25
_LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@contextlib.asynccontextmanager
async def metrics_server(port: int | None, *collectors: Collector) -> AsyncIterator[int | None]:
    """Serve `/metrics` until the block ends, on the port it yields; nothing without a port.

    What `collectors` give and what `process_metrics` adds. They are asked from a thread of the
    server's. Raises OSError for a port that cannot be bound.
    """
    if port is None:
        yield None
        return
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    async with process_metrics(registry), registry_server(port, registry) as bound:
        yield bound


@contextlib.asynccontextmanager
async def registry_server(
    port: int | None, registry: CollectorRegistry
) -> AsyncIterator[int | None]:
    """As `metrics_server`, and nothing more than what is in `registry`."""
    if port is None:
        yield None
        return
    try:
        server, thread = start_http_server(port, registry=registry)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot serve metrics on port {port}: {error}") from error
    logger.info("event=metrics_served port=%s", server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.asynccontextmanager
async def process_metrics(registry: CollectorRegistry) -> AsyncIterator[None]:
    """The process's memory, CPU time and open files, and how late its event loop is meanwhile."""
    ProcessCollector(registry=registry)
    lag = Histogram(
        "rhizome_event_loop_lag_seconds",
        "How late the event loop ran what was due; four observations a second.",
        buckets=_LAG_BUCKETS,
        registry=registry,
    )
    measuring = asyncio.create_task(_measure(lag))
    try:
        yield
    finally:
        measuring.cancel()
        await asyncio.wait([measuring])


async def _measure(lag: Histogram) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        lag.observe(max(0.0, loop.time() - due))
