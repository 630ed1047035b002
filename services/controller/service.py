"""A running controller: its parts put together, its metrics and its health."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

from services.common.kubernetes_api import open_kubernetes
from services.common.kubernetes_lease import KubernetesLease
from services.common.metrics import metrics_server
from services.common.peer_tls import expiry_metrics, peer_tls
from services.common.rpc import running_server
from services.controller.candidacy import Candidacy
from services.controller.cluster import Cluster
from services.controller.config import ControllerConfig
from services.controller.controller import Controller
from services.controller.follower import Follower
from services.controller.metrics import ControllerMetrics
from services.controller.schedulers import Schedulers


@contextlib.asynccontextmanager
async def running_controller(config: ControllerConfig) -> AsyncIterator[ControllerMetrics]:
    """Look after the release until the block ends. Raises ValueError and OSError."""
    metrics = ControllerMetrics()
    async with (
        peer_tls(config.tls) as tls,
        contextlib.aclosing(await open_kubernetes(config.kubeconfig)) as api,
        Schedulers(config.scheduler, metrics, tls).connected() as schedulers,
    ):
        controller = Controller(
            Follower(api, config.release),
            Cluster(api, metrics, socket.gethostname()),
            schedulers,
            Candidacy(KubernetesLease(api, config.lease_name)),
            metrics,
            force_delete_after_s=config.force_delete_after_s,
        )
        async with (
            metrics_server(config.metrics_port, metrics.registry, *expiry_metrics(tls)),
            _health(config.health_port),
            controller.running(),
        ):
            yield metrics


@contextlib.asynccontextmanager
async def _health(port: int | None) -> AsyncIterator[None]:
    """SERVING also while another replica acts: this one is ready to."""
    if port is None:
        yield
        return
    async with running_server(lambda server: None, (), f"[::]:{port}", grace_s=0.0):
        yield
