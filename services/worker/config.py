"""What the operator asks of a worker. Names and defaults are SGLang's where it has them."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.engine_flags import check_engine_flags
from services.common.model_files import builtin_model_path
from services.common.nodes import check_nodes, check_p2p
from services.worker.engine.options import EngineOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """Serve one replica of a model."""

    model_path: Annotated[Path, Parameter(name=["--model-path", "--model"])] = builtin_model_path()
    """Directory of the model (Hugging Face layout). Default: the built-in model."""

    tokenizer_path: Path | None = None
    """Directory of the tokenizer, where it is not the model's."""

    served_model_name: str | None = None
    """Name that clients use as `model`. Default: the model directory's name."""

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

    tp_size: Annotated[int, Parameter(name=["--tp-size", "--tp", "--tensor-parallel-size"])] = 1
    """Ranks that share the replica, a GPU each."""

    nnodes: int = 1
    """Hosts that share the replica, `tp-size / nnodes` ranks each."""

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
    """First GPU that this worker takes."""

    context_length: int | None = None
    """Longest sequence in tokens, prompt and output. Default: the model's own."""

    mem_fraction_static: float | None = None
    """Share of the device's free memory for weights and the key/value cache. Default: all that
    the largest step and the CUDA graphs, measured at start, leave; more than that is not taken.
    """

    max_total_tokens: int | None = None
    """Tokens the key/value cache holds. Default: what memory allows."""

    chunked_prefill_size: int | None = None
    """Most tokens computed in one step. Default, by the GPU's memory: 2048 below 35 GiB, 4096
    below 160, else 8192; on CPUs 2048.
    """

    schedule_policy: Literal["lpm", "fcfs"] = "lpm"
    """Which waiting request starts first: `lpm`, the one with the longest cached prefix (those
    that waited for 10 s before others), or `fcfs`, the one that came first.
    """

    max_running_requests: int | None = None
    """Most sequences that run at once. Default: 512 on GPUs of 60 GiB and more, else 256."""

    max_queued_requests: int = 4096
    """Most sequences that may wait; more are refused with RESOURCE_EXHAUSTED."""

    page_size: int = 16
    """Tokens a page of the key/value cache."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and activations; `auto` is float32 on CPUs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto` takes a GPU where there is one."""

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
    """Compile the elementwise work of float32 models on a GPU; 16-bit types have kernels of their
    own. Starts take longer, and results may differ in the last bits.
    """

    kernel_cache_dir: Path | None = None
    """Directory of compiled kernels, as `rhizome warm` fills it. Default: below the home
    directory.
    """

    chat_template: str | None = None
    """As the tokenizer service's flag: workers of a pool must agree on its digest."""

    drain_timeout_s: float = 30.0
    """Longest time that running sequences get to finish after SIGTERM."""

    profile_dir: Path | None = None
    """Directory for traces of `/start_profile`. Default: none, and profiling is refused."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least serious log line that is printed."""

    parent_pid: int | None = None
    """Process to die with; set by the launcher."""

    def __post_init__(self) -> None:
        if self.tp_size < 1:
            raise ValueError(f"tp_size must be >= 1, got {self.tp_size}")
        check_engine_flags(self)
        check_p2p(
            enabled=self.enable_p2p_check,
            tp=self.tp_size,
            device=self.device,
            nnodes=self.nnodes,
            disable_custom_all_reduce=self.disable_custom_all_reduce,
        )
        check_nodes(
            tp=self.tp_size,
            nnodes=self.nnodes,
            node_rank=self.node_rank,
            nccl_init_addr=self.nccl_init_addr,
        )
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
