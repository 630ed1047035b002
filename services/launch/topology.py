"""Which processes make up a single-host system, how they find each other, how each is started."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from services.launch.config import ServeConfig

# Time that running requests get to finish after SIGTERM.
_DRAIN_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec:
    """One process to run and watch."""

    name: str
    argv: tuple[str, ...]
    # gRPC target whose health says that it is ready.
    health_target: str
    # Seconds it gets to finish what it has after SIGTERM.
    grace_s: float


def build_topology(config: ServeConfig, directory: Path, parent_pid: int) -> list[ServiceSpec]:
    """All services of `rhizome serve`, in the order they stop.

    They meet over Unix sockets in `directory`, which only this user may enter; only the gateway
    listens on the network. A node above 0 has nothing but its ranks, which one worker runs.
    """
    sockets = {
        name: f"unix:{directory}/{name}.sock" for name in ("tokenizer", "scheduler", "index")
    }
    if config.node_rank > 0:
        return [_node(config, directory, parent_pid)]
    gateway_grpc = f"{config.host}:{config.public_grpc_port}"

    def spec(name: str, module: str, listen: str, *arguments: str, grace_s: float) -> ServiceSpec:
        return _service(config, parent_pid, name, module, listen, *arguments, grace_s=grace_s)

    specs = [
        spec(
            "gateway",
            "gateway",
            gateway_grpc,
            *("--host", config.host, "--port", str(config.port), "--grpc-listen", gateway_grpc),
            *("--tokenizers", sockets["tokenizer"], "--schedulers", sockets["scheduler"]),
            *("--shutdown-grace-s", str(_DRAIN_S)),
            *(() if config.tenants is None else ("--tenants", str(config.tenants))),
            grace_s=_DRAIN_S + 3.0,
        )
    ]
    for index in range(config.dp):
        listen = f"unix:{directory}/worker-{index}.sock"
        specs.append(
            spec(
                f"worker-{index}",
                "worker",
                listen,
                *("--listen", listen, "--worker-id", f"worker-{index}"),
                *("--scheduler", sockets["scheduler"]),
                # The gateway has drained before: nothing is left to wait for.
                *("--drain-timeout-s", "1"),
                *worker_arguments(config, replica=index),
                grace_s=5.0,
            )
        )
    tokenizer = ("--listen", sockets["tokenizer"], *_model_arguments(config))
    index_arguments = ("--listen", sockets["index"], "--scheduler", sockets["scheduler"])
    scheduler: tuple[str, ...] = (
        "--listen",
        sockets["scheduler"],
        "--cache-index",
        sockets["index"],
    )
    for flag, value in (
        ("--policy", config.policy),
        ("--tenants", config.tenants),
        ("--max-queue-wait-s", config.max_queue_wait_s),
    ):
        if value is not None:
            scheduler += (flag, str(value))
    specs += [
        spec("tokenizer", "tokenizer", sockets["tokenizer"], *tokenizer, grace_s=2.0),
        spec("index", "cache_index", sockets["index"], *index_arguments, grace_s=2.0),
        spec("scheduler", "scheduler", sockets["scheduler"], *scheduler, grace_s=2.0),
    ]
    return specs


def _node(config: ServeConfig, directory: Path, parent_pid: int) -> ServiceSpec:
    name = f"node-{config.node_rank}"
    listen = f"unix:{directory}/{name}.sock"
    return _service(
        config,
        parent_pid,
        name,
        "worker",
        listen,
        *("--listen", listen, *worker_arguments(config)),
        grace_s=5.0,
    )


def _service(
    config: ServeConfig,
    parent_pid: int,
    name: str,
    module: str,
    listen: str,
    *arguments: str,
    grace_s: float,
) -> ServiceSpec:
    common = ("--log-level", config.log_level, "--parent-pid", str(parent_pid))
    return ServiceSpec(
        name=name,
        argv=(sys.executable, "-m", f"services.{module}", *common, *arguments),
        health_target=listen,
        grace_s=grace_s,
    )


def _model_arguments(config: ServeConfig) -> tuple[str, ...]:
    arguments = ["--model-path", str(config.model_path)]
    if config.tokenizer_path is not None:
        arguments += ["--tokenizer-path", str(config.tokenizer_path)]
    if config.chat_template is not None:
        arguments += ["--chat-template", config.chat_template]
    return tuple(arguments)


def worker_arguments(config: ServeConfig, *, replica: int = 0) -> tuple[str, ...]:
    """What the worker of a replica is told of the model and of how to run it."""
    arguments = {
        "--served-model-name": config.served_model_name or config.model_path.resolve().name,
        "--tp-size": config.tp,
        "--nnodes": config.nnodes,
        "--node-rank": config.node_rank,
        "--nccl-init-addr": config.nccl_init_addr,
        "--base-gpu-id": config.base_gpu_id + replica * config.tp,
        "--page-size": config.page_size,
        "--mem-fraction-static": config.mem_fraction_static,
        "--dtype": config.dtype,
        "--device": config.device,
        "--load-format": config.load_format,
        "--quantization": config.quantization,
        "--kv-cache-dtype": config.kv_cache_dtype,
        "--attention-backend": config.attention_backend,
        "--context-length": config.context_length,
        "--max-total-tokens": config.max_total_tokens,
        "--chunked-prefill-size": config.chunked_prefill_size,
        "--profile-dir": config.profile_dir,
        "--max-running-requests": config.max_running_requests,
        "--schedule-policy": config.schedule_policy,
        "--kernel-cache-dir": config.kernel_cache_dir,
    }
    given = [
        part for flag, value in arguments.items() if value is not None for part in (flag, value)
    ]
    wishes = {
        "--disable-flashinfer": config.disable_flashinfer,
        "--attention-reduce-in-fp32": config.attention_reduce_in_fp32,
        "--disable-cuda-graph": config.disable_cuda_graph,
        "--enable-p2p-check": config.enable_p2p_check,
        "--disable-custom-all-reduce": config.disable_custom_all_reduce,
        "--enable-torch-compile": config.enable_torch_compile,
    }
    switches = (flag for flag, wished in wishes.items() if wished)
    return (*_model_arguments(config), *(str(part) for part in given), *switches)
