"""What the operator asks of a controller."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.logs import LogFormat
from services.common.tls import TlsFlags

_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerConfig:
    """Look after a release's workers in Kubernetes: restarts, draining, autoscaling."""

    release: str
    """The release whose workers to look after: the value of `app.kubernetes.io/instance`."""

    scheduler: tuple[str, ...]
    """gRPC target of a scheduler; give the flag again for each replica."""

    leader_lease: str | None = None
    """Name of the Kubernetes Lease by which one of several controllers acts. Default: the
    release's name and `-controller`."""

    kubeconfig: Path | None = None
    """File to reach Kubernetes with; its context's namespace is used. Default: the pod's service
    account and namespace."""

    force_delete_after_s: float | None = None
    """Remove pods that should have been gone for so long and whose node is not ready. Default:
    never."""

    metrics_port: int | None = None
    """Port of the Prometheus metrics over HTTP. Default: none."""

    health_port: int | None = None
    """Port of grpc.health.v1 on all addresses, without TLS, for probes. Default: none."""

    tls: Annotated[TlsFlags, Parameter(name="*")] = TlsFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    log_format: LogFormat = "text"
    """How log lines look: `text`, or `json` with one object a line."""

    parent_pid: int | None = None
    """End when this process, the parent, does."""

    def __post_init__(self) -> None:
        if not _LABEL_VALUE.fullmatch(self.release):
            raise ValueError(f"release must be a label's value, got {self.release!r}")
        if not self.scheduler:
            raise ValueError("scheduler must name at least one target")
        if self.leader_lease == "":
            raise ValueError("leader_lease must not be empty")
        if self.force_delete_after_s is not None and not self.force_delete_after_s >= 0:
            raise ValueError(f"force_delete_after_s must be >= 0, got {self.force_delete_after_s}")

    @property
    def lease_name(self) -> str:
        return self.leader_lease or f"{self.release}-controller"
