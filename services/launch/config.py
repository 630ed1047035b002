"""What the operator asks of `rhizome serve`. Names and defaults are SGLang's where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.engine_flags import check_engine_flags
from services.common.model_files import builtin_model_path
from services.common.nodes import check_nodes, check_p2p
from services.common.policies import PolicyName


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Start every service on this host, watch over them, and serve one model."""

    model_path: Annotated[Path, Parameter(name=["--model-path", "--model"])] = builtin_model_path()
    """Directory of the model (Hugging Face layout). Default: the built-in model."""

    tokenizer_path: Path | None = None
    """Directory of the tokenizer, where it is not the model's."""

    served_model_name: str | None = None
    """Name that clients use as `model`. Default: the model directory's name."""

    chat_template: str | None = None
    """A Jinja file, a JSON file in SGLang's format, or the name of a built-in template."""

    host: str = "127.0.0.1"
    """Address the HTTP and gRPC APIs listen on."""

    port: int = 30000
    """Port of the HTTP API."""

    grpc_port: int | None = None
    """Port of the public gRPC API. Default: the HTTP port + 1."""

    tp: Annotated[int, Parameter(name=["--tp", "--tp-size", "--tensor-parallel-size"])] = 1
    """Ranks that share one replica of the model."""

    dp: Annotated[int, Parameter(name=["--dp", "--dp-size", "--data-parallel-size"])] = 1
    """Replicas of the model; the scheduler spreads requests over them."""

    nnodes: int = 1
    """Hosts that share one replica, `tp / nnodes` ranks each."""

    node_rank: int = 0
    """Which of the hosts this is; host 0 serves, the others only compute."""

    nccl_init_addr: Annotated[
        str | None, Parameter(name=["--nccl-init-addr", "--nccl-init", "--dist-init-addr"])
    ] = None
    """`host:port` of host 0 where the ranks meet. Default: a free port of this host."""

    enable_p2p_check: bool = False
    """Verify at start that GPUs can write each other's memory. Default: trust the driver."""

    disable_custom_all_reduce: bool = False
    """Leave small messages between GPUs to NCCL, too."""

    base_gpu_id: int = 0
    """First GPU to take; each replica takes the `tp` GPUs after those of the one before."""

    context_length: int | None = None
    """Longest sequence in tokens, prompt and output. Default: the model's own."""

    mem_fraction_static: float | None = None
    """Share of the device's free memory for weights and the key/value cache. Default: all that
    the largest step and the CUDA graphs, measured at start, leave; more than that is not taken.
    """

    max_total_tokens: int | None = None
    """Tokens the key/value cache holds. Default: what memory allows."""

    chunked_prefill_size: int | None = None
    """Most prompt tokens computed in one step. Default: the worker's own."""

    max_running_requests: int | None = None
    """Most sequences that run at once. Default: the worker's own."""

    schedule_policy: Literal["lpm", "fcfs"] = "lpm"
    """Which waiting request a worker starts first: the one with the longest cached prefix (those
    that waited for 10 s before others), or the one that came first.
    """

    page_size: int = 16
    """Tokens a page of the key/value cache."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and activations."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""

    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """`dummy` gives random weights in the model's shapes, for benchmarks."""

    quantization: Literal["fp8"] | None = None
    """`fp8` keeps linear layers in FP8 (E4M3). Default: as the checkpoint has them."""

    kv_cache_dtype: Literal["auto", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """Number format of the key/value cache; `auto` is that of activations."""

    attention_backend: str | None = None
    """`flashinfer`, `triton` or `torch`. Default: the best that can run the model."""

    disable_flashinfer: bool = False
    """Choose among the other attention backends."""

    attention_reduce_in_fp32: bool = False
    """Multiply softmax probabilities with values in float32 (backends `triton` and `torch`)."""

    disable_cuda_graph: bool = False
    """Launch every kernel of a decode step by itself."""

    enable_torch_compile: bool = False
    """Compile the elementwise work of float32 models on a GPU."""

    kernel_cache_dir: Path | None = None
    """Directory of compiled kernels, as `rhizome warm` fills it. Default: below the home
    directory.
    """

    policy: PolicyName | None = None
    """How the scheduler places requests. Default: its own."""

    tenants: Path | None = None
    """JSON file of tenants' weights, bounds and limits per minute. Default: all are alike."""

    max_queue_wait_s: float | None = None
    """Refuse requests at once that would probably wait for longer. Default: requests' own
    deadlines only.
    """

    profile_dir: Path | None = None
    """Directory for traces of `/start_profile`. Default: none, and profiling is refused."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    def __post_init__(self) -> None:
        self._check_ports()
        for name in ("tp", "dp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        check_engine_flags(self)
        check_p2p(
            enabled=self.enable_p2p_check,
            tp=self.tp,
            device=self.device,
            nnodes=self.nnodes,
            disable_custom_all_reduce=self.disable_custom_all_reduce,
        )
        check_nodes(
            tp=self.tp,
            nnodes=self.nnodes,
            node_rank=self.node_rank,
            nccl_init_addr=self.nccl_init_addr,
        )
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

    def _check_ports(self) -> None:
        for name, port in (("port", self.port), ("grpc-port", self.grpc_port)):
            if port is not None and not 1 <= port <= 65535:
                raise ValueError(f"{name} must be within 1..65535, got {port}")
        if self.public_grpc_port > 65535:
            raise ValueError(f"port {self.port} leaves none for gRPC above it: give --grpc-port")
        if self.public_grpc_port == self.port:
            raise ValueError(f"grpc-port must differ from port, both are {self.port}")
