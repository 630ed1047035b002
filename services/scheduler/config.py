"""What the operator asks of a scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.policies import PolicyName
from services.common.redis_url import check_redis_url
from services.common.telemetry import TelemetryFlags
from services.common.tls import TlsFlags
from services.scheduler.policies import (
    DEFAULT_EVICTION_WEIGHT,
    DEFAULT_PREFIX_WEIGHT,
    DEFAULT_STALL_WEIGHT,
)

_NOT_NEGATIVE = (
    "worker_wait_s",
    "prefix_weight",
    "load_weight",
    "session_weight",
    "stall_weight",
    "eviction_weight",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Place requests on workers."""

    listen: str = "localhost:30020"
    """gRPC target to bind: `host:port` (port 0 picks one) or `unix:/path`."""

    cache_index: str | None = None
    """gRPC target of the cache index. Without one, only recent placements show who holds what."""

    policy: PolicyName = "prefix_load"
    """How a worker is chosen; docs/scheduling-policies.md describes each."""

    pools: Path | None = None
    """JSON file that declares the pools. Default: one pool, declared by its first worker."""

    max_queued_requests: int = 4096
    """Most requests that wait for room in one pool. When there are more, those that hold most of
    the queue give way, with a retry hint."""

    max_queue_wait_s: float = 60.0
    """Refuse at once, with a retry hint, what would probably wait for longer; `inf` leaves
    requests' own deadlines only."""

    tenants: Path | None = None
    """JSON file of tenants' weights and bounds. Default: all are alike."""

    redis_url: str | None = None
    """Redis in which several schedulers agree on the one that gateways prefer, such as
    `redis://host:6379/0`. Default: gateways go by the order of their own flags."""

    leader_lease: str | None = None
    """Name of the Kubernetes Lease in which several schedulers agree on the one that gateways
    prefer; instead of Redis."""

    kubeconfig: Path | None = None
    """File to reach Kubernetes with, for `leader_lease`. Default: the pod's service account."""

    worker_wait_s: float = 5.0
    """How long a request waits when no worker may serve it (workers may be restarting)."""

    lease_s: float = 3.0
    """Silence after which a worker counts as gone. After 1 s it gets no new requests."""

    prefix_weight: float = DEFAULT_PREFIX_WEIGHT
    """Weight of the predicted prefill of uncached tokens in `prefix_load`."""

    load_weight: float = 1.0
    """Weight of the predicted wait and decoding time in `prefix_load`."""

    session_weight: float = 1.0
    """Weight of leaving a session's worker in `prefix_load`."""

    stall_weight: float = DEFAULT_STALL_WEIGHT
    """Weight of the time that others on the worker lose in `prefix_load`."""

    eviction_weight: float = DEFAULT_EVICTION_WEIGHT
    """Weight of the cached prefixes that the worker would evict in `prefix_load`."""

    metrics_port: int | None = None
    """Port that serves Prometheus metrics at /metrics. Default: none."""

    health_port: int | None = None
    """Port of health checks (grpc.health.v1) in plain text, on all addresses, for probes that speak
    no TLS. Default: none."""

    tls: Annotated[TlsFlags, Parameter(name="*")] = TlsFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    telemetry: Annotated[TelemetryFlags, Parameter(name="*")] = TelemetryFlags()
    """Traces and the form of logs."""

    parent_pid: int | None = None
    """Exit when this process, the parent, does."""

    def __post_init__(self) -> None:
        if self.max_queued_requests < 1:
            raise ValueError(f"max_queued_requests must be >= 1, got {self.max_queued_requests}")
        if not self.max_queue_wait_s > 0:
            raise ValueError(f"max_queue_wait_s must be > 0, got {self.max_queue_wait_s}")
        if self.lease_s <= 1.0:
            raise ValueError(f"lease_s must be > 1, got {self.lease_s}")
        check_redis_url(self.redis_url)
        if self.redis_url is not None and self.leader_lease is not None:
            raise ValueError("leader_lease and redis_url both elect a leader: give one of them")
        if self.leader_lease == "":
            raise ValueError("leader_lease must not be empty")
        if self.kubeconfig is not None and self.leader_lease is None:
            raise ValueError("kubeconfig is for leader_lease, which is not given")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
