"""The whole service as one block: index, followers, gRPC server, metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rhizome.cache_index.v1 import cache_index_service_pb2 as pb
from rhizome.cache_index.v1.cache_index_service_pb2_grpc import (
    add_CacheIndexServiceServicer_to_server,
)
from services.cache_index.config import CacheIndexConfig
from services.cache_index.discovery import Discovery
from services.cache_index.index import PrefixIndex
from services.cache_index.metrics import IndexCollector
from services.cache_index.servicer import CacheIndexServicer
from services.common.metrics import metrics_server
from services.common.peer_tls import expiry_metrics, peer_tls, server_credentials
from services.common.rpc import running_server
from services.common.telemetry import running_tracer


@dataclass(frozen=True, slots=True)
class RunningCacheIndex:
    """A started cache index; `port` is 0 for a Unix socket."""

    port: int
    health_port: int | None
    index: PrefixIndex
    discovery: Discovery


@contextlib.asynccontextmanager
async def running_cache_index(config: CacheIndexConfig) -> AsyncIterator[RunningCacheIndex]:
    """Serve until the block ends. Raises OSError when an address cannot be bound,
    ValueError for bad files."""
    index = PrefixIndex(config.max_pages)
    async with contextlib.AsyncExitStack() as stack:
        tls = await stack.enter_async_context(peer_tls(config.tls))
        discovery = Discovery(index, config.scheduler, tls=tls)
        tracer = await stack.enter_async_context(running_tracer(config.telemetry, "cache_index"))
        servicer = CacheIndexServicer(index, discovery, tracer)
        await stack.enter_async_context(
            metrics_server(
                config.metrics_port, IndexCollector(index, discovery), *expiry_metrics(tls)
            )
        )
        server = await stack.enter_async_context(
            running_server(
                lambda server: add_CacheIndexServiceServicer_to_server(servicer, server),
                [pb.DESCRIPTOR.services_by_name["CacheIndexService"]],
                config.listen,
                credentials=server_credentials(tls),
                health_port=config.health_port,
            )
        )
        following = asyncio.create_task(discovery.run())
        try:
            yield RunningCacheIndex(server.port, server.health_port, index, discovery)
        finally:
            following.cancel()
            await asyncio.wait([following])
