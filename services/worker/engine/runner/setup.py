"""What every rank does at start: read the model, load its shard, make its runner."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

import torch

from services.worker.engine.attention.backend import CapturableAttention
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.distributed.group import TpGroup
from services.worker.engine.kv.pool import PagePool, fitting_pages, page_bytes
from services.worker.engine.layers.compiled import CompiledKernels
from services.worker.engine.layers.parameters import Placement
from services.worker.engine.models.config import ModelConfig
from services.worker.engine.models.decoder import Decoder
from services.worker.engine.models.weights import load_dummy_weights, load_weights
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.graphs import decode_graph_sizes
from services.worker.engine.runner.memory import check_weights
from services.worker.engine.runner.model_runner import ModelRunner
from services.worker.engine.runner.pieces import piece_graph_sizes
from services.worker.engine.runner.precision import (
    check_fp8_device,
    decide_fp8,
    decide_kv_cache_dtype,
)

logger = logging.getLogger(__name__)

# The best comes first.
ATTENTION_BACKENDS = ("flashinfer", "triton", "torch")

# What FlashInfer has kernels for on every GPU it supports.
_FLASHINFER_DTYPES = ("bfloat16", "float16")
_FLASHINFER_HEAD_DIMS = (64, 128, 256)
# Tiles of larger heads would not fit a processor's shared memory.
_TRITON_MAX_HEAD_DIM = 256

# Below so many GiB of memory, so many tokens a step. Larger steps bring no more tokens a second on
# such GPUs, and prompts that came together wait longer for the first of them.
_STEP_TOKENS = ((35, 2048), (160, 4096))
_MOST_STEP_TOKENS = 8192

# Sequences at once: smaller GPUs and CPUs have no room for the logits and caches of more.
_MAX_RUNNING, _MAX_RUNNING_LARGE = 256, 512
_LARGE_DEVICE_BYTES = 60 * 1024**3

_LOAD_FORMATS = ("safetensors", "dummy")
_WEIGHT_BYTES_PER_THREAD = 64 * 1024**2


def decide_device(options: EngineOptions) -> torch.device:
    """Raises ValueError for a device that is not there."""
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but no GPU is available")
    return torch.device(name)


def decide_dtype(options: EngineOptions, config: ModelConfig, device: torch.device) -> str:
    """Raises ValueError for an unknown type."""
    name = options.dtype
    if name == "auto":
        return "float32" if device.type == "cpu" else config.dtype
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return name


def decide_context_length(options: EngineOptions, config: ModelConfig) -> int:
    """Raises ValueError when the operator wants more than the model can."""
    wanted = options.context_length or config.context_length
    if wanted > config.max_context_length:
        raise ValueError(
            f"context_length {wanted} exceeds the model's longest, {config.max_context_length}"
        )
    return wanted


def decide_step_tokens(options: EngineOptions, device_bytes: int) -> int:
    """Tokens of a step, by a GPU's whole memory as SGLang has it; `device_bytes` is 0 for CPUs."""
    if options.chunked_prefill_size is not None:
        return options.chunked_prefill_size
    for limit, num_tokens in _STEP_TOKENS:
        if device_bytes < limit * 1024**3:
            return num_tokens
    return _MOST_STEP_TOKENS


def decide_max_running(options: EngineOptions, device_bytes: int) -> int:
    """Sequences that run at once; `device_bytes` as in `decide_step_tokens`."""
    if options.max_running_sequences is not None:
        return options.max_running_sequences
    return _MAX_RUNNING if device_bytes < _LARGE_DEVICE_BYTES else _MAX_RUNNING_LARGE


def check_tp_size(tp_size: int, config: ModelConfig) -> None:
    """Raises ValueError when the model cannot be divided among so many ranks."""
    if tp_size < 1:
        raise ValueError(f"tp_size must be >= 1, got {tp_size}")
    for name, number in (
        ("attention heads", config.num_heads),
        ("intermediate features", config.intermediate_size),
    ):
        if number % tp_size:
            raise ValueError(f"tp_size {tp_size} does not divide the model's {number} {name}")
    # Where there are fewer heads than ranks, ranks hold copies.
    if config.num_kv_heads % tp_size and tp_size % config.num_kv_heads:
        raise ValueError(
            f"tp_size {tp_size} and the model's {config.num_kv_heads} kv heads do not divide"
        )


def decide_num_threads(weight_bytes: int, num_threads: int, ranks_per_node: int) -> int:
    """Threads of one rank on a CPU, of the `num_threads` that torch has for all of this host.

    A step reads all weights once; below some share a thread, handing work out costs more than it
    saves, most of all when other processes want the cores.
    """
    return max(1, min(num_threads // ranks_per_node, weight_bytes // _WEIGHT_BYTES_PER_THREAD))


def decide_attention_backend(
    options: EngineOptions, config: ModelConfig, device: torch.device, *, has_flashinfer: bool
) -> str:
    """The first of ATTENTION_BACKENDS that can run the model, or the one the operator wished.

    Raises ValueError for a backend that is unknown or cannot run the model.
    """
    wanted = options.attention_backend
    if wanted is not None and wanted not in ATTENTION_BACKENDS:
        raise ValueError(
            f"attention_backend {wanted!r} is unknown; known: {', '.join(ATTENTION_BACKENDS)}"
        )
    obstacles = {
        "flashinfer": _flashinfer_obstacle(options, config, device, has_flashinfer),
        "triton": _triton_obstacle(config, device),
        "torch": None,
    }
    if wanted is None:
        return next(name for name in ATTENTION_BACKENDS if obstacles[name] is None)
    if obstacles[wanted] is not None:
        raise ValueError(f"attention_backend {wanted} cannot be used: {obstacles[wanted]}")
    return wanted


def _flashinfer_obstacle(
    options: EngineOptions, config: ModelConfig, device: torch.device, has_flashinfer: bool
) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if options.disable_flashinfer:
        return "disable_flashinfer is set"
    if options.attention_reduce_in_fp32:
        return "attention_reduce_in_fp32 is set, and its kernels round probabilities"
    if not has_flashinfer:
        return "flashinfer is not installed"
    if decide_dtype(options, config, device) not in _FLASHINFER_DTYPES:
        return f"the dtype is not one of {', '.join(_FLASHINFER_DTYPES)}"
    if config.head_dim not in _FLASHINFER_HEAD_DIMS:
        return f"head size {config.head_dim} is not one of {_FLASHINFER_HEAD_DIMS}"
    return None


def _triton_obstacle(config: ModelConfig, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if config.head_dim > _TRITON_MAX_HEAD_DIM:
        return f"head size {config.head_dim} is above {_TRITON_MAX_HEAD_DIM}"
    return None


def decide_graph_sizes(
    options: EngineOptions, backend: str, max_running_sequences: int
) -> tuple[int, ...]:
    """Graphs hold decode steps; the torch backend's depend on the rows' lengths."""
    if backend == "torch" or options.disable_cuda_graph:
        return ()
    return decode_graph_sizes(max_running_sequences)


def decide_plan(
    options: EngineOptions,
    config: ModelConfig,
    *,
    device: torch.device,
    eos_token_ids: tuple[int, ...],
    pool_budget_bytes: int,
    device_bytes: int = 0,
) -> EnginePlan:
    """The engine's decisions, from the operator's wishes and the memory left for pages.

    `device_bytes` is a GPU's whole memory, 0 for CPUs.

    Pure. Raises ValueError when a wish cannot be met.
    """
    backend = decide_attention_backend(
        options,
        config,
        device,
        has_flashinfer=importlib.util.find_spec("flashinfer") is not None,
    )
    dtype = decide_dtype(options, config, device)
    kv_cache_dtype = decide_kv_cache_dtype(options, dtype)
    is_fp8 = decide_fp8(options, config, device=device, dtype=dtype) is not None
    max_step_tokens = decide_step_tokens(options, device_bytes)
    max_running_sequences = decide_max_running(options, device_bytes)
    num_pages = options.num_pages or fitting_pages(
        free_bytes=pool_budget_bytes, bytes_per_page=rank_page_bytes(options, config, device)
    )
    return EnginePlan(
        device=device.type,
        dtype=dtype,
        attention_backend=backend,
        kv_cache_dtype=kv_cache_dtype,
        page_size=options.page_size,
        num_pages=num_pages,
        # A sequence that cannot fit the whole pool could never run.
        context_length=min(decide_context_length(options, config), num_pages * options.page_size),
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids,
        max_running_sequences=max_running_sequences,
        max_step_tokens=max_step_tokens,
        pair_work=config.pair_work,
        schedule_policy=options.schedule_policy,
        tp_size=options.tp_size,
        quantization="fp8" if is_fp8 else None,
        attention_reduce_in_fp32=options.attention_reduce_in_fp32,
        graph_sizes=decide_graph_sizes(options, backend, max_running_sequences),
        piece_graph_sizes=(
            piece_graph_sizes(max_step_tokens)
            if backend != "torch" and not options.disable_cuda_graph
            else ()
        ),
    )


def rank_page_bytes(options: EngineOptions, config: ModelConfig, device: torch.device) -> int:
    """Bytes of one page on one rank."""
    return page_bytes(
        num_layers=config.num_layers,
        page_size=options.page_size,
        num_kv_heads=max(1, config.num_kv_heads // options.tp_size),
        head_dim=config.head_dim,
        dtype=getattr(torch, decide_kv_cache_dtype(options, decide_dtype(options, config, device))),
    )


def load_model(
    options: EngineOptions,
    config: ModelConfig,
    *,
    device: torch.device,
    group: TpGroup,
    on_progress: Callable[[float], None],
) -> Decoder:
    """This rank's shard with its weights.

    Raises ValueError when the checkpoint is not the model's, ModelTooLargeError before it is read
    when the device cannot hold it.
    """
    if options.load_format not in _LOAD_FORMATS:
        raise ValueError(
            f"load_format must be one of {', '.join(_LOAD_FORMATS)}, got {options.load_format!r}"
        )
    dtype = decide_dtype(options, config, device)
    fp8 = decide_fp8(options, config, device=device, dtype=dtype)
    check_fp8_device(
        device, weights=fp8 is not None, kv_cache_dtype=decide_kv_cache_dtype(options, dtype)
    )
    placement = Placement(device, getattr(torch, dtype), group, fp8)
    placement.compiled = compiled_kernels(options, device, placement.dtype)
    context_length = decide_context_length(options, config)
    # Without making them: a model of that device is shapes alone.
    outline = Placement(torch.device("meta"), placement.dtype, group, fp8)
    Decoder(config, context_length, outline)
    num_ranks = options.ranks_per_node if device.type == "cpu" else 1
    check_weights(options, outline.num_bytes * num_ranks, device)
    model = Decoder(config, context_length, placement)
    if device.type == "cpu":
        threads = decide_num_threads(
            placement.num_bytes, torch.get_num_threads(), options.ranks_per_node
        )
        torch.set_num_threads(threads)
    if options.load_format == "dummy":
        load_dummy_weights(model, device, on_progress)
    else:
        load_weights(model, options.model_path, device, on_progress)
    return model


def compiled_kernels(
    options: EngineOptions, device: torch.device, dtype: torch.dtype
) -> CompiledKernels | None:
    """What `enable_torch_compile` gives. Raises ValueError on CPUs, where it only costs."""
    if not options.enable_torch_compile:
        return None
    if device.type == "cpu":
        raise ValueError("enable_torch_compile needs a GPU: on CPUs compiled steps are slower")
    if dtype != torch.float32:
        logger.warning("event=torch_compile_unused reason='%s has kernels of its own'", dtype)
        return None
    return CompiledKernels()


def make_runner(
    model: Decoder, plan: EnginePlan, group: TpGroup, *, reports: bool = True
) -> ModelRunner:
    """The rank's page pool, attention backend and runner around a loaded model.

    All ranks call it together. Without `reports` the runner has no results to read.
    """
    config = model.config
    device = torch.device(plan.device)
    pool = PagePool(
        num_layers=config.num_layers,
        # The last page is the padding's of captured steps.
        num_pages=plan.num_pages + 1,
        page_size=plan.page_size,
        num_kv_heads=max(1, config.num_kv_heads // group.size),
        head_dim=config.head_dim,
        dtype=getattr(torch, plan.kv_cache_dtype),
        device=device,
    )
    capturable: CapturableAttention | None = None
    if plan.attention_backend != "torch":
        capturable = _make_capturable(pool, config, plan, num_heads=config.num_heads // group.size)
    runner = ModelRunner(
        model=model,
        backend=capturable
        or TorchAttention(
            pool, getattr(torch, plan.dtype), reduce_in_fp32=plan.attention_reduce_in_fp32
        ),
        pool=pool,
        plan=plan,
        device=device,
        reports=reports,
    )
    runner.warm_up()
    if capturable is None:
        return runner
    if plan.graph_sizes:
        runner.capture_decodes(capturable, plan.graph_sizes)
    if plan.piece_graph_sizes:
        runner.capture_pieces(plan.piece_graph_sizes)
    # What captures warmed up with lies on their streams, where steps cannot use it.
    torch.cuda.empty_cache()
    return runner


def _make_capturable(
    pool: PagePool, config: ModelConfig, plan: EnginePlan, *, num_heads: int
) -> CapturableAttention:
    # Imported where they were chosen: machines without a GPU may lack both libraries.
    from services.worker.engine.attention.triton_backend import TritonAttention

    triton = TritonAttention(
        pool,
        num_heads=num_heads,
        max_rows=max(plan.max_running_sequences, *plan.graph_sizes, 1),
        dtype=getattr(torch, plan.dtype),
        reduce_in_fp32=plan.attention_reduce_in_fp32,
    )
    if plan.attention_backend == "triton":
        return triton
    from services.worker.engine.attention.flashinfer_backend import FlashInferAttention

    return FlashInferAttention(
        pool,
        num_heads=num_heads,
        others=triton,
        dtype=getattr(torch, plan.dtype),
        has_other_layers=any(window is not None for window in config.sliding_windows),
    )
