"""What the operator asks of `rhizome serve`. Names and defaults are SGLang's where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.edge_flags import EdgeFlags
from services.common.engine_flags import EngineFlags
from services.common.policies import PolicyName


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(EngineFlags):
    """Start every service on this host, watch over them, and serve one model."""

    host: str = "127.0.0.1"
    """Address the HTTP and gRPC APIs listen on."""

    port: int = 30000
    """Port of the HTTP API."""

    grpc_port: int | None = None
    """Port of the public gRPC API. Default: the HTTP port + 1."""

    tp_size: Annotated[int, Parameter(name=["--tp", "--tp-size", "--tensor-parallel-size"])] = 1
    """Ranks that share one replica of the model."""

    dp: Annotated[int, Parameter(name=["--dp", "--dp-size", "--data-parallel-size"])] = 1
    """Replicas of the model; the scheduler spreads requests over them."""

    policy: PolicyName | None = None
    """How the scheduler places requests. Default: its own."""

    tenants: Path | None = None
    """JSON file of tenants' weights, bounds and limits per minute. Default: all are alike."""

    max_queue_wait_s: float | None = None
    """Refuse requests at once that would probably wait for longer; `inf` for offline batches.
    Default: the scheduler's, 60.
    """

    metrics_port: int | None = None
    """First port of the Prometheus metrics behind the gateway's own, which are at its `/metrics`:
    the scheduler's, then the cache index's, the tokenizer's, and each replica's. Default: none.
    """

    edge: Annotated[EdgeFlags, Parameter(name="*")] = EdgeFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise ValueError(f"dp must be >= 1, got {self.dp}")
        self._check_ports()
        self.check_engine()
        if self.node_rank > 0 and self.metrics_port is not None:
            raise ValueError(f"metrics-port is for host 0, this is host {self.node_rank}")
        if self.dp > 1 and self.nnodes > 1:
            raise ValueError(
                f"dp must be 1 with nnodes > 1, got {self.dp}: start one system for each replica"
            )
        if self.dp > 1 and self.nccl_init_addr is not None:
            raise ValueError(f"nccl-init-addr is of one replica, but dp is {self.dp}")
        if not (self.model_path / "config.json").is_file():
            raise ValueError(f"model-path {self.model_path} is not a model: it has no config.json")
        if self.tokenizer_path is not None and not self.tokenizer_path.is_dir():
            raise ValueError(f"tokenizer-path {self.tokenizer_path} is not a directory")

    @property
    def public_grpc_port(self) -> int:
        """Where the public gRPC API listens."""
        return self.port + 1 if self.grpc_port is None else self.grpc_port

    @property
    def metrics_ports(self) -> range:
        """The scheduler's, index's, tokenizer's and replicas'; empty without `metrics_port`."""
        if self.metrics_port is None:
            return range(0)
        return range(self.metrics_port, self.metrics_port + 3 + self.dp)

    def _check_ports(self) -> None:
        for name, port in (("port", self.port), ("grpc-port", self.grpc_port)):
            if port is not None and not 1 <= port <= 65535:
                raise ValueError(f"{name} must be within 1..65535, got {port}")
        if self.public_grpc_port > 65535:
            raise ValueError(f"port {self.port} leaves none for gRPC above it: give --grpc-port")
        if self.public_grpc_port == self.port:
            raise ValueError(f"grpc-port must differ from port, both are {self.port}")
        metrics = self.metrics_ports
        if not metrics:
            return
        if metrics.start < 1 or metrics.stop > 65536:
            raise ValueError(
                f"metrics-port {metrics.start} takes {len(metrics)} ports, all within 1..65535"
            )
        for name, port in (("port", self.port), ("grpc-port", self.public_grpc_port)):
            if port in metrics:
                raise ValueError(
                    f"metrics-port {metrics.start} takes ports up to {metrics.stop - 1}; "
                    f"{name} is {port}"
                )
