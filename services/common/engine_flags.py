"""The flags of an engine, which the launcher passes on to each worker."""

# NOTE: annotations are not postponed here: a derived class's flags are read from its `__init__`,
# whose annotations would be looked up in the derived class's module.
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from services.common.model_files import builtin_model_path
from services.common.nodes import check_nodes, check_p2p


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFlags:
    """Which model a worker runs, on which devices, and how; None is the worker's own choice.

    Names and defaults are SGLang's where it has them.
    """

    model_path: Annotated[Path, Parameter(name=["--model-path", "--model"])] = builtin_model_path()
    """Directory of the model (Hugging Face layout). Default: the built-in model."""

    tokenizer_path: Path | None = None
    """Directory of the tokenizer, where it is not the model's."""

    served_model_name: str | None = None
    """Name that clients use as `model`. Default: the model directory's name."""

    chat_template: str | None = None
    """A Jinja file, a JSON file in SGLang's format, or the name of a built-in template. Tokenizer
    and workers of a pool must agree on its digest.
    """

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
    """First GPU to take; each replica of this host takes `tp-size` GPUs after the one before."""

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

    profile_dir: Path | None = None
    """Directory for traces of `/start_profile`. Default: none, and profiling is refused."""

    def check_engine(self, *, is_on_one_host: bool = False) -> None:
        """Raises ValueError for what no engine can work with.

        `is_on_one_host`: each replica is, whatever `nnodes` says of the hosts of all of them.
        """
        for name, value in (
            ("tp_size", self.tp_size),
            ("page_size", self.page_size),
            ("context_length", self.context_length),
            ("chunked_prefill_size", self.chunked_prefill_size),
            ("max_running_requests", self.max_running_requests),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.base_gpu_id < 0:
            raise ValueError(f"base_gpu_id must be >= 0, got {self.base_gpu_id}")
        if self.max_total_tokens is not None and self.max_total_tokens < self.page_size:
            raise ValueError(
                f"max_total_tokens must hold a page of {self.page_size}, "
                f"got {self.max_total_tokens}"
            )
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static <= 1:
            raise ValueError(
                f"mem_fraction_static must be within (0, 1], got {self.mem_fraction_static}"
            )
        check_p2p(
            enabled=self.enable_p2p_check,
            tp=self.tp_size,
            device=self.device,
            nnodes=1 if is_on_one_host else self.nnodes,
            disable_custom_all_reduce=self.disable_custom_all_reduce,
        )
        if not is_on_one_host:
            check_nodes(
                tp=self.tp_size,
                nnodes=self.nnodes,
                node_rank=self.node_rank,
                nccl_init_addr=self.nccl_init_addr,
            )
