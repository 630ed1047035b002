"""What the operator asks of a worker. Names and defaults are SGLang's where it has them."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.engine_flags import EngineFlags
from services.common.telemetry import TelemetryFlags
from services.common.tls import TlsFlags
from services.worker.engine.options import EngineOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig(EngineFlags):
    """Serve one replica of a model."""

    listen: str = "localhost:30040"
    """gRPC target to bind: `host:port` (port 0 picks one) or `unix:/path`."""

    advertise_address: str | None = None
    """gRPC target others reach this worker by. Default: what it listens on."""

    scheduler: tuple[str, ...] = ()
    """gRPC target of a scheduler to register with; give it once for each replica."""

    worker_id: str | None = None
    """Stable name, unique in the pool. Default: host name and listening address."""

    role: Literal["mixed", "prefill", "decode"] = "mixed"
    """Which part of a request this worker serves."""

    label: tuple[str, ...] = ()
    """Placement hint `key=value`, such as zone or rack; may be given repeatedly."""

    max_queued_requests: int = 4096
    """Most sequences that may wait; more are refused with RESOURCE_EXHAUSTED."""

    drain_timeout_s: float = 30.0
    """Longest time that running sequences get to finish after SIGTERM."""

    metrics_port: int | None = None
    """Port that serves Prometheus metrics at /metrics; on hosts above 0 those of the process.
    Default: none."""

    health_port: int | None = None
    """Port of health checks (grpc.health.v1) in plain text, on all addresses, for probes that speak
    no TLS. Default: none."""

    tls: Annotated[TlsFlags, Parameter(name="*")] = TlsFlags()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    telemetry: Annotated[TelemetryFlags, Parameter(name="*")] = TelemetryFlags()
    """Traces and the form of logs."""

    parent_pid: int | None = None
    """Process to die with; set by the launcher."""

    def __post_init__(self) -> None:
        self.check_engine()
        if self.max_queued_requests < 0:
            raise ValueError(f"max_queued_requests must be >= 0, got {self.max_queued_requests}")
        if not self.drain_timeout_s >= 0:
            raise ValueError(f"drain_timeout_s must be >= 0, got {self.drain_timeout_s}")
        if self.scheduler and self.advertise_address is None and self._listens_everywhere:
            raise ValueError(
                "advertise_address must say how others reach a worker that listens on "
                f"{self.listen}"
            )
        for label in self.label:
            if not label.partition("=")[1]:
                raise ValueError(f"label must be key=value, got {label!r}")

    @property
    def _listens_everywhere(self) -> bool:
        host = self.listen.rpartition(":")[0]
        return host in ("", "0.0.0.0", "[::]", "*") and self.node_rank == 0

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or self.model_path.resolve().name

    @property
    def name(self) -> str:
        """This worker's stable name."""
        return self.worker_id or f"{socket.gethostname()}/{self.listen}"

    @property
    def labels(self) -> dict[str, str]:
        """The placement hints by key."""
        pairs = (label.partition("=") for label in self.label)
        return {key: value for key, _, value in pairs}

    def engine_options(self) -> EngineOptions:
        """What the engine needs of all this."""
        pages = self.max_total_tokens
        return EngineOptions(
            model_path=self.model_path,
            tokenizer_path=self.tokenizer_path or self.model_path,
            device=self.device,
            dtype=self.dtype,
            attention_backend=self.attention_backend,
            disable_flashinfer=self.disable_flashinfer,
            attention_reduce_in_fp32=self.attention_reduce_in_fp32,
            disable_cuda_graph=self.disable_cuda_graph,
            load_format=self.load_format,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            page_size=self.page_size,
            log_format=self.telemetry.log_format,
            profile_dir=self.profile_dir,
            context_length=self.context_length,
            max_running_sequences=self.max_running_requests,
            chunked_prefill_size=self.chunked_prefill_size,
            schedule_policy=self.schedule_policy,
            enable_torch_compile=self.enable_torch_compile,
            mem_fraction_static=self.mem_fraction_static,
            num_pages=None if pages is None else pages // self.page_size,
            tp_size=self.tp_size,
            nnodes=self.nnodes,
            node_rank=self.node_rank,
            nccl_init_addr=self.nccl_init_addr,
            enable_p2p_check=self.enable_p2p_check,
            disable_custom_all_reduce=self.disable_custom_all_reduce,
            base_gpu_id=self.base_gpu_id,
        )
