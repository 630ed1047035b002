"""What the operator asks of a cache index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from services.cache_index.index import MAX_PREFIXES
from services.common.telemetry import TelemetryFlags
from services.common.tls import TlsFlags


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIndexConfig:
    """Tell schedulers which workers hold which prefixes, from the workers' cache events."""

    listen: str = "localhost:30030"
    """gRPC target to bind: `host:port` (port 0 picks one) or `unix:/path`."""

    scheduler: tuple[str, ...] = ()
    """gRPC target of a scheduler whose workers to follow; give it once for each replica."""

    max_pages: int = 4_000_000
    """Most distinct pages held, at about 200 bytes each. Beyond it the least recently stored are
    dropped."""

    metrics_port: int | None = None
    """Port of the Prometheus metrics over HTTP. Default: none."""

    health_port: int | None = None
    """Port of health checks (grpc.health.v1) in plain text, on all addresses, for probes that speak
    no TLS. Default: none."""

    tls: Annotated[TlsFlags, Parameter(name="*")] = TlsFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    telemetry: Annotated[TelemetryFlags, Parameter(name="*")] = TelemetryFlags()
    """Traces and the form of logs."""

    parent_pid: int | None = None
    """End when this process, the parent, dies."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pages <= MAX_PREFIXES:
            raise ValueError(f"max_pages must be in [1, {MAX_PREFIXES}], got {self.max_pages}")
