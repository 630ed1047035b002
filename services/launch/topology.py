"""Which processes make up a single-host system, how they find each other, how each is started."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from services.common.engine_flags import EngineFlags
from services.launch.config import ServeConfig

# Time that running requests get to finish after SIGTERM.
_DRAIN_S = 5.0
# Time that services get to finish after SIGTERM.
_WORKER_GRACE_S = 5.0
_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec:
    """One process to run and watch."""

    name: str
    argv: tuple[str, ...]
    # gRPC target whose health says that it is ready, or the https:// URL of one that does.
    health_target: str
    # Seconds it gets to finish what it has after SIGTERM.
    grace_s: float
    # What others must not see on its command line.
    environment: Mapping[str, str] = field(default_factory=dict)


def build_topology(config: ServeConfig, directory: Path, parent_pid: int) -> list[ServiceSpec]:
    """All services of `rhizome serve`, in the order they stop.

    They meet over Unix sockets in `directory`, which only this user may enter; only the gateway
    listens on the network. A node above 0 has nothing but its ranks, which one worker runs.
    """
    sockets = _Sockets(directory)

    def service(
        name: str, module: str, listen: str, arguments: tuple[str, ...], grace_s: float
    ) -> ServiceSpec:
        common = ("--log-level", config.log_level, "--parent-pid", str(parent_pid))
        argv = (sys.executable, "-m", f"services.{module}", *common, *arguments)
        return ServiceSpec(name=name, argv=argv, health_target=listen, grace_s=grace_s)

    if config.node_rank > 0:
        name = f"node-{config.node_rank}"
        listen = sockets.of(name)
        arguments = ("--listen", listen, *worker_arguments(config))
        return [service(name, "worker", listen, arguments, _WORKER_GRACE_S)]
    replicas = [
        service(
            f"worker-{replica}",
            "worker",
            sockets.of(f"worker-{replica}"),
            _replica_arguments(config, sockets, replica),
            _WORKER_GRACE_S,
        )
        for replica in range(config.dp)
    ]
    tokenizer = (
        *("--listen", sockets.tokenizer, *_model_arguments(config)),
        *_metrics_arguments(config, 2),
    )
    index = (
        *("--listen", sockets.index, "--scheduler", sockets.scheduler),
        *_metrics_arguments(config, 1),
    )
    scheduler = _scheduler_arguments(config, sockets)
    return [
        replace(
            service(
                "gateway",
                "gateway",
                _gateway_health(config),
                _gateway_arguments(config, sockets),
                _DRAIN_S + 3.0,
            ),
            environment=_gateway_secrets(config),
        ),
        *replicas,
        service("tokenizer", "tokenizer", sockets.tokenizer, tokenizer, _GRACE_S),
        service("index", "cache_index", sockets.index, index, _GRACE_S),
        service("scheduler", "scheduler", sockets.scheduler, scheduler, _GRACE_S),
    ]


class _Sockets:
    """Where the services of one host listen for each other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.tokenizer = self.of("tokenizer")
        self.scheduler = self.of("scheduler")
        self.index = self.of("index")

    def of(self, name: str) -> str:
        return f"unix:{self._directory}/{name}.sock"


def _public_grpc(config: ServeConfig) -> str:
    return f"{config.host}:{config.public_grpc_port}"


def _gateway_arguments(config: ServeConfig, sockets: _Sockets) -> tuple[str, ...]:
    return (
        *("--host", config.host, "--port", str(config.port)),
        *("--grpc-listen", _public_grpc(config)),
        *("--tokenizers", sockets.tokenizer, "--schedulers", sockets.scheduler),
        *("--shutdown-grace-s", str(_DRAIN_S)),
        *_given(
            {
                "--tenants": config.tenants,
                "--ssl-certfile": config.edge.ssl_certfile,
                "--ssl-keyfile": config.edge.ssl_keyfile,
                "--api-keys": config.edge.api_keys,
            }
        ),
    )


def _gateway_secrets(config: ServeConfig) -> dict[str, str]:
    keys = {"API_KEY": config.edge.api_key, "ADMIN_API_KEY": config.edge.admin_api_key}
    return {f"RHIZOME__GATEWAY__{name}": key for name, key in keys.items() if key is not None}


def _gateway_health(config: ServeConfig) -> str:
    if config.edge.ssl_files is None:
        return _public_grpc(config)
    # Its certificate is for the name that clients use, which gRPC would not accept from here.
    return f"https://{config.host}:{config.port}/health"


def _scheduler_arguments(config: ServeConfig, sockets: _Sockets) -> tuple[str, ...]:
    wishes = {
        "--policy": config.policy,
        "--tenants": config.tenants,
        "--max-queue-wait-s": config.max_queue_wait_s,
    }
    return (
        *("--listen", sockets.scheduler, "--cache-index", sockets.index),
        *_metrics_arguments(config, 0),
        *_given(wishes),
    )


def _replica_arguments(config: ServeConfig, sockets: _Sockets, replica: int) -> tuple[str, ...]:
    name = f"worker-{replica}"
    return (
        *("--listen", sockets.of(name), "--worker-id", name),
        *("--scheduler", sockets.scheduler),
        # The gateway has drained before: nothing is left to wait for.
        *("--drain-timeout-s", "1"),
        *_metrics_arguments(config, 3 + replica),
        *worker_arguments(config, replica=replica),
    )


def _metrics_arguments(config: ServeConfig, place: int) -> tuple[str, ...]:
    """Of the service at this place among `ServeConfig.metrics_ports`."""
    ports = config.metrics_ports
    return ("--metrics-port", str(ports[place])) if ports else ()


def _given(flags: Mapping[str, object]) -> tuple[str, ...]:
    """What says anything, as arguments; None and False are left to the service."""
    arguments: list[str] = []
    for flag, value in flags.items():
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            arguments += (flag, str(value))
    return tuple(arguments)


def _model_arguments(config: ServeConfig) -> tuple[str, ...]:
    return _given(
        {
            "--model-path": config.model_path,
            "--tokenizer-path": config.tokenizer_path,
            "--chat-template": config.chat_template,
        }
    )


def worker_arguments(config: ServeConfig, *, replica: int = 0) -> tuple[str, ...]:
    """What the worker of a replica is told of the model and of how to run it."""
    flags = {field.name: getattr(config, field.name) for field in fields(EngineFlags)}
    flags["served_model_name"] = config.served_model_name or config.model_path.resolve().name
    flags["base_gpu_id"] = config.base_gpu_id + replica * config.tp_size
    return _given({f"--{name.replace('_', '-')}": value for name, value in flags.items()})
