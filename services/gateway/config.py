"""What the operator asks of a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.edge_flags import EdgeFlags
from services.common.redis_url import check_redis_url
from services.common.telemetry import TelemetryFlags
from services.common.tls import TlsFlags
from services.gateway.replica_names import names_all


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Serve the OpenAI-compatible and native HTTP APIs and the public gRPC API."""

    schedulers: tuple[str, ...]
    """gRPC target of a scheduler, preferred first; give the flag again for each replica."""

    tokenizers: tuple[str, ...]
    """gRPC target of a tokenizer; give the flag again for each replica, or once
    `dns+all:host:port` for all addresses that a name has, as they change."""

    host: str = "127.0.0.1"
    """Address to serve HTTP on."""

    port: int = 30000
    """Port to serve HTTP on; 0 picks a free one."""

    grpc_listen: str = "localhost:30001"
    """gRPC target to bind for the public API: `host:port` or `unix:/path`."""

    gateway_id: str | None = None
    """Name of this gateway among its replicas; drawn when absent."""

    max_body_bytes: int = 64 * 1024 * 1024
    """Largest HTTP request body; larger ones are answered 413."""

    max_inflight_requests: int = 4096
    """Most prompts served at a time, of one tenant eight ninths; more are answered 429."""

    tenants: Path | None = None
    """JSON file of tenants' limits per minute, the scheduler's too. Default: no limits."""

    redis_url: str | None = None
    """Redis in which several gateways count tenants' requests and tokens together, such as
    `redis://host:6379/0`. Default: each counts what it sees."""

    max_client_buffer_bytes: int = 4 * 1024 * 1024
    """Output a slow reader may leave unread before its request is cancelled."""

    keepalive_s: float = 10.0
    """Longest silence on an event stream before a comment is sent."""

    request_timeout_s: float | None = None
    """Time a request may take in all; absent means no limit."""

    drain_delay_s: float = 0.0
    """Time after SIGTERM in which health checks fail while requests are still taken: what a load
    balancer needs to send them elsewhere."""

    shutdown_grace_s: float = 30.0
    """Time that running requests then get to finish."""

    metrics_port: int | None = None
    """Port that serves Prometheus metrics at /metrics too, which the HTTP port always does.
    Default: none."""
    health_port: int | None = None
    """Port of health checks (grpc.health.v1) in plain text, on all addresses, for probes that speak
    no TLS. Default: none."""

    edge: Annotated[EdgeFlags, Parameter(name="*")] = EdgeFlags()

    tls: Annotated[TlsFlags, Parameter(name="*")] = TlsFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    telemetry: Annotated[TelemetryFlags, Parameter(name="*")] = TelemetryFlags()
    """Traces and the form of logs."""

    parent_pid: int | None = None
    """Die when this process, the parent, dies."""

    def __post_init__(self) -> None:
        if not self.schedulers:
            raise ValueError("schedulers must name at least one target")
        if not self.tokenizers:
            raise ValueError("tokenizers must name at least one target")
        for target in self.tokenizers:
            names_all(target)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        for name in ("max_body_bytes", "max_inflight_requests", "max_client_buffer_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        check_redis_url(self.redis_url)
        if self.keepalive_s <= 0:
            raise ValueError(f"keepalive_s must be > 0, got {self.keepalive_s}")
        if self.drain_delay_s < 0:
            raise ValueError(f"drain_delay_s must be >= 0, got {self.drain_delay_s}")
        if self.request_timeout_s is not None and self.request_timeout_s <= 0:
            raise ValueError(f"request_timeout_s must be > 0, got {self.request_timeout_s}")
