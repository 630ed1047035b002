"""A running scheduler: its parts put together, its server, and its clock's ticks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from grpc import aio

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.lease import Lease
from services.common.peer_tls import PeerTls, peer_tls, server_credentials
from services.common.rpc import RunningServer, open_channel, running_server
from services.common.shared_store import SharedStore
from services.common.spans import Tracer
from services.common.telemetry import running_tracer
from services.common.tenants import read_tenants
from services.scheduler.config import SchedulerConfig
from services.scheduler.endpoints import WorkerTable
from services.scheduler.index_client import MATCH_DEADLINE_S, IndexClient, index_client
from services.scheduler.leadership import Leadership
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.overlay import PredictionOverlay
from services.scheduler.placement import Placer
from services.scheduler.policies import make_policy
from services.scheduler.pool_load import PoolLoadCollector, PoolLoads
from services.scheduler.pools import PoolSet, read_declarations
from services.scheduler.redis_lease import RedisLease
from services.scheduler.reservations import ReservationBook
from services.scheduler.servicer import SchedulerServicer
from services.scheduler.watch import TableWatch

logger = logging.getLogger(__name__)

_SWEEP_INTERVAL_S = 0.05
_SERVICE = pb.DESCRIPTOR.services_by_name["SchedulerService"]


@dataclass(frozen=True, slots=True)
class RunningScheduler:
    server: RunningServer
    metrics: SchedulerMetrics
    # None: it speaks plain text.
    tls: PeerTls | None


@contextlib.asynccontextmanager
async def running_scheduler(
    config: SchedulerConfig,
    *,
    grace_s: float = 1.0,
    match_deadline_s: float = MATCH_DEADLINE_S,
) -> AsyncIterator[RunningScheduler]:
    """Serve until the block ends. Raises ValueError for bad files, OSError for a bad address."""
    pools = PoolSet(read_declarations(config.pools) if config.pools is not None else ())
    metrics = SchedulerMetrics()
    async with (
        peer_tls(config.tls) as tls,
        index_client(_index_channel(config, tls), metrics, match_deadline_s) as index,
        running_tracer(config.telemetry, "scheduler") as tracer,
    ):
        table = WorkerTable(config.lease_s)
        watch = TableWatch(table, pools)
        table.on_change = watch.notify
        placer, servicer = _assemble(config, pools, table, watch, metrics, index, tracer)

        def add(server: aio.Server) -> None:
            pb_grpc.add_SchedulerServiceServicer_to_server(servicer, server)

        sweeper = asyncio.create_task(_sweep_for_ever(placer))
        try:
            async with (
                running_server(
                    add,
                    [_SERVICE],
                    config.listen,
                    grace_s=grace_s,
                    credentials=server_credentials(tls),
                    health_port=config.health_port,
                ) as server,
                _standing(config, pools, table, watch, metrics),
            ):
                yield RunningScheduler(server, metrics, tls)
        finally:
            sweeper.cancel()
            await asyncio.gather(sweeper, return_exceptions=True)


def _index_channel(config: SchedulerConfig, tls: PeerTls | None) -> aio.Channel | None:
    return None if config.cache_index is None else open_channel(config.cache_index, tls)


def _assemble(
    config: SchedulerConfig,
    pools: PoolSet,
    table: WorkerTable,
    watch: TableWatch,
    metrics: SchedulerMetrics,
    index: IndexClient | None,
    tracer: Tracer,
) -> tuple[Placer, SchedulerServicer]:
    rng = random.Random()
    clock = time.monotonic
    policy = make_policy(
        config.policy,
        rng,
        prefix_weight=config.prefix_weight,
        load_weight=config.load_weight,
        session_weight=config.session_weight,
        stall_weight=config.stall_weight,
        eviction_weight=config.eviction_weight,
    )
    placer = Placer(
        table,
        pools,
        policy,
        ReservationBook(table, rng),
        PredictionOverlay(clock()),
        metrics,
        clock,
        max_queued=config.max_queued_requests,
        max_wait_s=config.max_queue_wait_s,
        tenants=read_tenants(config.tenants) if config.tenants is not None else None,
        worker_wait_s=config.worker_wait_s,
    )
    loads = PoolLoads(pools, table, placer.queue, clock)
    metrics.registry.register(PoolLoadCollector(loads))
    servicer = SchedulerServicer(
        placer, table, pools, watch, metrics, index, config.lease_s, loads, tracer
    )
    return placer, servicer


@contextlib.asynccontextmanager
async def _standing(
    config: SchedulerConfig,
    pools: PoolSet,
    table: WorkerTable,
    watch: TableWatch,
    metrics: SchedulerMetrics,
) -> AsyncIterator[None]:
    """Stand for leader until the block ends; nothing without a lease."""
    async with _lease(config, metrics) as lease:
        if lease is None:
            yield
            return
        # Not without an election: nobody leading would be nothing to worry about.
        metrics.gauge(
            "leads", "Whether gateways prefer this one", lambda: float(watch.leader_term > 0)
        )
        leadership = Leadership(
            lease, lambda: any(map(table.num_ready, pools.pools)), on_change=watch.lead
        )
        standing = asyncio.create_task(leadership.run())
        try:
            yield
        finally:
            standing.cancel()
            await asyncio.gather(standing, return_exceptions=True)


@contextlib.asynccontextmanager
async def _lease(config: SchedulerConfig, metrics: SchedulerMetrics) -> AsyncIterator[Lease | None]:
    """The lease of the leader, where the operator wants one. Raises ValueError."""
    if config.redis_url is not None:
        store = SharedStore(config.redis_url, metrics.registry, "rhizome_scheduler")
        async with contextlib.aclosing(store):
            yield RedisLease(store)
    elif config.leader_lease is not None:
        # The client takes 30 MB, which those do without that need no Kubernetes.
        from services.common.kubernetes_api import open_kubernetes
        from services.common.kubernetes_lease import KubernetesLease

        async with contextlib.aclosing(await open_kubernetes(config.kubeconfig)) as api:
            yield KubernetesLease(api, config.leader_lease)
    else:
        yield None


async def _sweep_for_ever(placer: Placer) -> None:
    while True:
        await asyncio.sleep(_SWEEP_INTERVAL_S)
        try:
            placer.sweep()
        except Exception:
            logger.exception("event=sweep_failed")
