"""What the operator asks of `rhizome serve`. Names and defaults are SGLang's where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.edge_flags import EdgeFlags
from services.common.engine_flags import EngineFlags
from services.common.nodes import HostPort, parse_host_port
from services.common.policies import PolicyName
from services.common.telemetry import TelemetryFlags
from services.common.tls import TlsFlags
from services.launch.perf_csv import check_perf_csv


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
    """Replicas of the model; the scheduler spreads requests over them. With several hosts
    (`--nnodes`), `dp / nnodes` on each.
    """

    node_addr: str | None = None
    """This host's address for the other hosts, where replicas are on several. Default: listen on
    all, and name the one from which host 0 is reached.
    """

    end_with_node_0: bool = False
    """Give it to every host: those above 0 end when `rhizome serve` of host 0 has ended. Takes the
    port after that of `--nccl-init-addr`.
    """

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

    shutdown_grace_s: float = 5.0
    """Longest time that running requests get to finish after SIGTERM."""

    edge: Annotated[EdgeFlags, Parameter(name="*")] = EdgeFlags()

    tls: Annotated[TlsFlags, Parameter(name="*")] = TlsFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    telemetry: Annotated[TelemetryFlags, Parameter(name="*")] = TelemetryFlags()
    """Traces and the form of logs."""

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise ValueError(f"dp must be >= 1, got {self.dp}")
        if not self.shutdown_grace_s >= 0:
            raise ValueError(f"shutdown_grace_s must be >= 0, got {self.shutdown_grace_s}")
        self.check_engine(is_on_one_host=self.spreads_replicas)
        self._check_hosts()
        self._check_ports()
        if not (self.model_path / "config.json").is_file():
            raise ValueError(f"model-path {self.model_path} is not a model: it has no config.json")
        if self.tokenizer_path is not None and not self.tokenizer_path.is_dir():
            raise ValueError(f"tokenizer-path {self.tokenizer_path} is not a directory")

    @property
    def spreads_replicas(self) -> bool:
        """Whether hosts have whole replicas, and not parts of one."""
        return self.dp > 1 and self.nnodes > 1

    @property
    def replicas_here(self) -> range:
        """Numbers of this host's replicas among all."""
        if not self.spreads_replicas:
            return range(self.dp)
        on_each = self.dp // self.nnodes
        return range(self.node_rank * on_each, (self.node_rank + 1) * on_each)

    @property
    def meeting_point(self) -> HostPort:
        """Where several hosts meet: host 0's address, and the first of the ports they use."""
        assert self.nccl_init_addr is not None, "several hosts have it"
        return parse_host_port(self.nccl_init_addr)

    @property
    def host_ports(self) -> range:
        """What hosts use among themselves: the scheduler's or rank 0's, host 0's lifetime, and one
        for each replica of a host above 0. Empty where no host needs another.
        """
        if self.nccl_init_addr is None:
            return range(0)
        first = self.meeting_point.port
        replicas = len(self.replicas_here) if self.spreads_replicas else 0
        lifetime = 1 if replicas or self.end_with_node_0 else 0
        return range(first, first + 1 + lifetime + replicas)

    @property
    def public_grpc_port(self) -> int:
        """Where the public gRPC API listens."""
        return self.port + 1 if self.grpc_port is None else self.grpc_port

    @property
    def metrics_ports(self) -> range:
        """The scheduler's, index's, tokenizer's and replicas'; empty without `metrics_port`."""
        if self.metrics_port is None:
            return range(0)
        return range(self.metrics_port, self.metrics_port + 3 + len(self.replicas_here))

    def _check_hosts(self) -> None:
        if self.spreads_replicas:
            if not 0 <= self.node_rank < self.nnodes:
                raise ValueError(
                    f"node-rank must be within 0..{self.nnodes - 1}, got {self.node_rank}"
                )
            if self.dp % self.nnodes:
                raise ValueError(f"nnodes {self.nnodes} does not divide the {self.dp} of --dp")
            if self.nccl_init_addr is None:
                raise ValueError("nnodes > 1 needs --nccl-init-addr, the host:port of node 0")
            parse_host_port(self.nccl_init_addr)
        else:
            if self.dp > 1 and self.nccl_init_addr is not None:
                raise ValueError(f"nccl-init-addr is where hosts meet, but nnodes is {self.nnodes}")
            if self.node_rank > 0 and self.metrics_port is not None:
                raise ValueError(f"metrics-port is for host 0, this is host {self.node_rank}")
            if self.node_addr is not None:
                raise ValueError("node-addr is for replicas on several hosts: --dp and --nnodes")
        if self.end_with_node_0 and self.nnodes == 1:
            raise ValueError("end-with-node-0 is for several hosts, but nnodes is 1")

    def _check_ports(self) -> None:
        for name, port in (("port", self.port), ("grpc-port", self.grpc_port)):
            if port is not None and not 1 <= port <= 65535:
                raise ValueError(f"{name} must be within 1..65535, got {port}")
        if self.public_grpc_port > 65535:
            raise ValueError(f"port {self.port} leaves none for gRPC above it: give --grpc-port")
        if self.public_grpc_port == self.port:
            raise ValueError(f"grpc-port must differ from port, both are {self.port}")
        self._check_host_ports()
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

    def _check_host_ports(self) -> None:
        between = self.host_ports
        if between.stop > 65536:
            raise ValueError(
                f"nccl-init-addr {self.nccl_init_addr} takes {len(between)} ports, all within "
                "1..65535"
            )
        for name, ports in (
            ("port", range(self.port, self.port + 1)),
            ("grpc-port", range(self.public_grpc_port, self.public_grpc_port + 1)),
            ("metrics-port", self.metrics_ports),
        ):
            if set(ports) & set(between):
                raise ValueError(
                    f"nccl-init-addr {self.nccl_init_addr} takes ports up to {between.stop - 1}; "
                    f"{name} is {ports.start}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineConfig(ServeConfig):
    """Start every service, measure them with `rhizome bench serving`, report, and end.

    What follows `--` is for the benchmark. Of several hosts, those above 0 only serve.
    """

    perf_csv: Path | None = None
    """Append the result here, in the columns of madengine's perf.csv."""

    ready_timeout_s: float = 3600.0
    """Longest wait for all replicas to be ready."""

    deployment_type: str = "local"
    """What starts this, for the file's column."""

    def __post_init__(self) -> None:
        ServeConfig.__post_init__(self)
        if self.edge != EdgeFlags():
            raise ValueError("offline is its own client: it takes no certificate and no API keys")
        if not self.ready_timeout_s > 0:
            raise ValueError(f"ready_timeout_s must be > 0, got {self.ready_timeout_s}")
        if self.perf_csv is not None and self.node_rank == 0:
            check_perf_csv(self.perf_csv)
