"""What the operator asked of an engine, and what the engine decided from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.common.logs import LogFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """The operator's wishes for one engine; never changed. None means: the engine decides."""

    model_path: Path
    tokenizer_path: Path
    device: str = "auto"
    """"cpu" or "cuda"; "auto" takes a GPU where there is one."""
    dtype: str = "auto"
    """"float32", "bfloat16" or "float16"; "auto" is the checkpoint's on GPUs, float32 on CPUs."""
    attention_backend: str | None = None
    """"flashinfer", "triton" or "torch"; None takes, on GPUs, the first that can run the model."""
    disable_flashinfer: bool = False
    """Choose among the other attention backends."""
    attention_reduce_in_fp32: bool = False
    """Multiply softmax probabilities with values as float32 numbers, not rounded to the type."""
    disable_cuda_graph: bool = False
    """Launch every kernel of a decode step by itself."""
    load_format: str = "safetensors"
    """"safetensors", or "dummy" for random weights in the configuration's shapes."""
    quantization: str | None = None
    """"fp8" keeps linear layers in FP8; None as the checkpoint has them."""
    kv_cache_dtype: str = "auto"
    """"fp8_e4m3" or "fp8_e5m2" halve what a token of the pool takes; "auto" is the dtype."""
    page_size: int = 16
    log_format: LogFormat = "text"
    profile_dir: Path | None = None
    """Where traces go; None refuses to record."""
    context_length: int | None = None
    max_running_sequences: int | None = None
    """None goes by the device's memory."""
    chunked_prefill_size: int | None = None
    """Most tokens a step computes; None goes by the device's memory."""
    schedule_policy: Literal["lpm", "fcfs"] = "lpm"
    """Order of admission: longest cached prefix first, or first come first served."""
    enable_torch_compile: bool = False
    """Compile the elementwise work of float32 models on a GPU."""
    mem_fraction_static: float | None = None
    """Share of the free memory for weights and keys/values together; None: what is left over."""
    num_pages: int | None = None
    """Pages of the pool; None sizes it from free memory."""
    tp_size: int = 1
    """Ranks that share the replica, `tp_size / nnodes` on each node."""
    nnodes: int = 1
    node_rank: int = 0
    """Which node this is; node 0 has rank 0."""
    nccl_init_addr: str | None = None
    """"host:port" where rank 0 is met; None picks a port of this host."""
    enable_p2p_check: bool = False
    """Verify direct writes between GPUs at start, rather than trust the driver."""
    disable_custom_all_reduce: bool = False
    """Leave small messages to NCCL, too."""
    base_gpu_id: int = 0
    """GPU of this node's first rank; the others take the next ones."""

    @property
    def ranks_per_node(self) -> int:
        return self.tp_size // self.nnodes


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """What an engine decided at start, by one pure function; logged once."""

    device: str
    dtype: str
    attention_backend: str
    kv_cache_dtype: str
    """The pool's; torch's name of it."""
    page_size: int
    num_pages: int
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_running_sequences: int
    max_step_tokens: int
    pair_work: float
    """ModelConfig's."""
    tp_size: int
    quantization: str | None = None
    """"fp8" where linear layers are kept so."""
    schedule_policy: Literal["lpm", "fcfs"] = "lpm"
    attention_reduce_in_fp32: bool = False
    graph_sizes: tuple[int, ...] = ()
    """Numbers of rows for which decode steps are captured in CUDA graphs."""
    piece_graph_sizes: tuple[int, ...] = ()
    """Numbers of tokens for which what lies between attention layers is captured."""
