"""Puts a gateway together from its configuration, and takes it apart again."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rhizome.inference.v1 import inference_service_pb2
from rhizome.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from services.common.metrics import process_metrics, registry_server
from services.common.peer_tls import PeerTls, expiry_metrics, peer_tls
from services.common.process import background
from services.common.rpc import RunningServer, running_server
from services.common.shared_store import SharedStore
from services.common.telemetry import running_tracer
from services.common.tenants import TenantSet, read_tenants
from services.gateway.app import GatewayApp
from services.gateway.config import GatewayConfig
from services.gateway.control_plane import ControlPlane
from services.gateway.edge import following_edge
from services.gateway.exchange import KeepAlive
from services.gateway.http_server import running_http_server
from services.gateway.inference_servicer import InferenceServicer
from services.gateway.metrics import GatewayMetrics
from services.gateway.pipeline import Pipeline
from services.gateway.serving import Limits, Serving
from services.gateway.table_metrics import TableCollector
from services.gateway.tokenizers import TokenizerPool
from services.gateway.worker_pool import WorkerSessions

_READINESS_INTERVAL_S = 0.2


@dataclass(slots=True)
class RunningGateway:
    """A gateway that serves: its bound ports (0 for a Unix socket) and its pipeline."""

    http_port: int
    grpc_port: int
    health_port: int | None
    pipeline: Pipeline


@contextlib.asynccontextmanager
async def running_gateway(config: GatewayConfig) -> AsyncIterator[RunningGateway]:
    """Serve HTTP and gRPC until the block ends; then health checks fail, `drain_delay_s` later
    nothing new is taken, and running requests may finish.

    Raises ValueError for a bad file, OSError for an address that cannot be bound.
    """
    gateway_id = config.gateway_id or f"gateway-{secrets.token_hex(4)}"
    async with contextlib.AsyncExitStack() as stack:
        tls = await stack.enter_async_context(peer_tls(config.tls))
        tracer = await stack.enter_async_context(
            running_tracer(config.telemetry, "gateway", gateway_id)
        )
        metrics = GatewayMetrics()
        edge = await stack.enter_async_context(following_edge(config.edge, metrics))
        pipeline = _pipeline(config, gateway_id, metrics, tls)
        serving = Serving(
            pipeline,
            KeepAlive(config.keepalive_s),
            Limits(config.max_body_bytes, config.max_client_buffer_bytes, config.request_timeout_s),
            edge.access,
            tls,
            tracer,
        )
        for metric in (*expiry_metrics(tls), TableCollector(pipeline.control.table)):
            metrics.registry.register(metric)
        await stack.enter_async_context(process_metrics(metrics.registry))
        await stack.enter_async_context(registry_server(config.metrics_port, metrics.registry))
        await stack.enter_async_context(pipeline.control.following())
        await stack.enter_async_context(pipeline.tokenizers.following())
        await stack.enter_async_context(_shared_limits(config.redis_url, pipeline))
        stack.push_async_callback(pipeline.workers.aclose)
        await stack.enter_async_context(
            background(pipeline.workers.watch(), serving.keep_alive.run())
        )
        server = await stack.enter_async_context(
            running_server(
                lambda server: add_InferenceServiceServicer_to_server(
                    InferenceServicer(serving), server
                ),
                [inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"]],
                config.grpc_listen,
                ready=False,
                grace_s=config.shutdown_grace_s,
                credentials=None if edge.tls is None else edge.tls.server_credentials(),
                health_port=config.health_port,
            )
        )
        await stack.enter_async_context(background(_follow_readiness(server, pipeline)))
        http_port = await stack.enter_async_context(
            running_http_server(
                GatewayApp(serving),
                config.host,
                config.port,
                grace_s=config.shutdown_grace_s,
                tls=None if edge.tls is None else edge.tls.context,
            )
        )
        try:
            yield RunningGateway(http_port, server.port, server.health_port, pipeline)
        finally:
            pipeline.closing = True
            await server.set_ready(False)
            await asyncio.sleep(config.drain_delay_s)


def _pipeline(
    config: GatewayConfig, gateway_id: str, metrics: GatewayMetrics, tls: PeerTls | None
) -> Pipeline:
    control = ControlPlane(
        config.schedulers, metrics, lambda worker: workers.num_choices(worker), tls
    )
    tokenizers = TokenizerPool(config.tokenizers, lambda: control.table.identity, tls=tls)
    workers = WorkerSessions(gateway_id, tokenizers, control.table.has_ready_worker_beside, tls)
    tenants = TenantSet() if config.tenants is None else read_tenants(config.tenants)
    return Pipeline(control, tokenizers, workers, metrics, config.max_inflight_requests, tenants)


@contextlib.asynccontextmanager
async def _shared_limits(redis_url: str | None, pipeline: Pipeline) -> AsyncIterator[None]:
    """Count tenants together with other gateways until the block ends; alone without Redis."""
    if redis_url is None:
        yield
        return
    store = SharedStore(redis_url, pipeline.metrics.registry, "rhizome_gateway")
    async with contextlib.aclosing(store), background(pipeline.rates.share(store)):
        yield


async def _follow_readiness(server: RunningServer, pipeline: Pipeline) -> None:
    """gRPC health says SERVING while a request could be served."""
    ready = False
    while True:
        if pipeline.ready != ready:
            ready = not ready
            await server.set_ready(ready)
        await asyncio.sleep(_READINESS_INTERVAL_S)
