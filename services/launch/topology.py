"""Which processes a host runs, how they find each other, how each is started."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from services.common.engine_flags import EngineFlags
from services.common.telemetry import telemetry_arguments
from services.common.tls import TlsFlags
from services.launch.config import ServeConfig
from services.launch.hosts import EVERYWHERE, host_and_port, own_address

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
    # Its gRPC port is the clients': it asks for no certificate of ours.
    is_public: bool = False
    # What others must not see on its command line.
    environment: Mapping[str, str] = field(default_factory=dict)


def build_topology(config: ServeConfig, directory: Path, parent_pid: int) -> list[ServiceSpec]:
    """All services that `rhizome serve` runs on this host, in the order they stop.

    They meet over Unix sockets in `directory`, which only this user may enter; only the gateway
    listens on the network, and with replicas on other hosts the scheduler, for their workers. A
    host above 0 has nothing but its workers, or its ranks of one, which a worker runs.

    Raises HostUnreachableError when it cannot be said how other hosts reach this one.
    """
    addresses = _Addresses(config, directory)

    def service(
        name: str, module: str, listen: str, arguments: tuple[str, ...], grace_s: float
    ) -> ServiceSpec:
        common = (
            *("--log-level", config.log_level, "--parent-pid", str(parent_pid)),
            *telemetry_arguments(config.telemetry),
            *_tls_arguments(config),
        )
        argv = (sys.executable, "-m", f"services.{module}", *common, *arguments)
        return ServiceSpec(name=name, argv=argv, health_target=listen, grace_s=grace_s)

    if config.node_rank > 0 and not config.spreads_replicas:
        name = f"node-{config.node_rank}"
        listen = addresses.socket(name)
        arguments = ("--listen", listen, *worker_arguments(config))
        return [service(name, "worker", listen, arguments, _WORKER_GRACE_S)]
    drain_s = _drain_s(config)
    replicas = [
        service(
            f"worker-{replica}",
            "worker",
            addresses.worker(index),
            _replica_arguments(config, addresses, index),
            drain_s + _WORKER_GRACE_S,
        )
        for index, replica in enumerate(config.replicas_here)
    ]
    if config.node_rank > 0:
        return replicas
    tokenizer = _tokenizer_arguments(config, addresses)
    index = _index_arguments(config, addresses)
    gateway = _gateway_arguments(config, addresses)
    gateway_grace_s = config.shutdown_grace_s + 3.0
    scheduler = _scheduler_arguments(config, addresses)
    return [
        replace(
            service("gateway", "gateway", _gateway_health(config), gateway, gateway_grace_s),
            is_public=True,
            environment=_gateway_secrets(config),
        ),
        *replicas,
        service("tokenizer", "tokenizer", addresses.tokenizer, tokenizer, _GRACE_S),
        service("index", "cache_index", addresses.index, index, _GRACE_S),
        service("scheduler", "scheduler", addresses.scheduler, scheduler, _GRACE_S),
    ]


def _tokenizer_arguments(config: ServeConfig, addresses: _Addresses) -> tuple[str, ...]:
    return (
        *("--listen", addresses.tokenizer, *_model_arguments(config)),
        *_metrics_arguments(config, 2),
    )


def _index_arguments(config: ServeConfig, addresses: _Addresses) -> tuple[str, ...]:
    return (
        *("--listen", addresses.index, "--scheduler", addresses.scheduler),
        *_metrics_arguments(config, 1),
    )


def scheduler_address(config: ServeConfig, directory: Path) -> str:
    """Where host 0's scheduler is reached from host 0."""
    return _Addresses(config, directory).scheduler


class _Addresses:
    """Where this host's services listen, and where they are found."""

    def __init__(self, config: ServeConfig, directory: Path) -> None:
        self._directory = directory
        self._config = config
        self.tokenizer = self.socket("tokenizer")
        self.index = self.socket("index")
        self.scheduler_listen = self.scheduler = self.socket("scheduler")
        if config.spreads_replicas:
            meeting = config.meeting_point
            self.scheduler_listen = self._everywhere(meeting.port)
            if config.node_rank > 0:
                self.scheduler = host_and_port(meeting.host, meeting.port)
            else:
                self.scheduler = host_and_port(config.node_addr or "127.0.0.1", meeting.port)

    def socket(self, name: str) -> str:
        return f"unix:{self._directory}/{name}.sock"

    def worker(self, index: int) -> str:
        """Where the `index`-th replica of this host listens; gateway and index are on host 0."""
        if self._config.node_rank == 0:
            return self.socket(f"worker-{index}")
        return self._everywhere(self._config.host_ports[2 + index])

    def advertised_worker(self, index: int) -> str:
        """Where others reach it."""
        if self._config.node_rank == 0:
            return self.worker(index)
        address = self._config.node_addr or own_address(self._config.meeting_point)
        return host_and_port(address, self._config.host_ports[2 + index])

    def _everywhere(self, port: int) -> str:
        return host_and_port(self._config.node_addr or EVERYWHERE, port)


def _drain_s(config: ServeConfig) -> float:
    """What a worker's requests get to finish: on host 0 the gateway has drained before it."""
    return 1.0 if config.node_rank == 0 else config.shutdown_grace_s


def _public_grpc(config: ServeConfig) -> str:
    return f"{config.host}:{config.public_grpc_port}"


def _gateway_arguments(config: ServeConfig, addresses: _Addresses) -> tuple[str, ...]:
    return (
        *("--host", config.host, "--port", str(config.port)),
        *("--grpc-listen", _public_grpc(config)),
        *("--tokenizers", addresses.tokenizer, "--schedulers", addresses.scheduler),
        *("--shutdown-grace-s", str(config.shutdown_grace_s)),
        *_given(
            {
                "--tenants": config.tenants,
                "--ssl-certfile": config.edge.ssl_certfile,
                "--ssl-keyfile": config.edge.ssl_keyfile,
                "--api-keys": config.edge.api_keys,
            }
        ),
    )


def _tls_arguments(config: ServeConfig) -> tuple[str, ...]:
    names = (field.name for field in fields(TlsFlags))
    return _given({f"--{name.replace('_', '-')}": getattr(config.tls, name) for name in names})


def _gateway_secrets(config: ServeConfig) -> dict[str, str]:
    keys = {"API_KEY": config.edge.api_key, "ADMIN_API_KEY": config.edge.admin_api_key}
    return {f"RHIZOME__GATEWAY__{name}": key for name, key in keys.items() if key is not None}


def _gateway_health(config: ServeConfig) -> str:
    if config.edge.ssl_files is None:
        return _public_grpc(config)
    # Its certificate is for the name that clients use, which gRPC would not accept from here.
    return f"https://{config.host}:{config.port}/health"


def _scheduler_arguments(config: ServeConfig, addresses: _Addresses) -> tuple[str, ...]:
    wishes = {
        "--policy": config.policy,
        "--tenants": config.tenants,
        "--max-queue-wait-s": config.max_queue_wait_s,
    }
    return (
        *("--listen", addresses.scheduler_listen, "--cache-index", addresses.index),
        *_metrics_arguments(config, 0),
        *_given(wishes),
    )


def _replica_arguments(config: ServeConfig, addresses: _Addresses, index: int) -> tuple[str, ...]:
    """Of the `index`-th replica of this host."""
    return (
        *("--listen", addresses.worker(index)),
        *("--worker-id", f"worker-{config.replicas_here[index]}"),
        *("--advertise-address", addresses.advertised_worker(index)),
        *("--scheduler", addresses.scheduler),
        *("--drain-timeout-s", str(_drain_s(config))),
        *_metrics_arguments(config, 3 + index),
        *worker_arguments(config, index=index),
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


def worker_arguments(config: ServeConfig, *, index: int = 0) -> tuple[str, ...]:
    """What the worker of this host's `index`-th replica is told of the model and how to run it."""
    flags = {field.name: getattr(config, field.name) for field in fields(EngineFlags)}
    flags["served_model_name"] = config.served_model_name or config.model_path.resolve().name
    flags["base_gpu_id"] = config.base_gpu_id + index * config.tp_size
    if config.spreads_replicas:
        # Hosts are the scheduler's matter then: each replica is on one.
        flags |= {"nnodes": 1, "node_rank": 0, "nccl_init_addr": None}
    return _given({f"--{name.replace('_', '-')}": value for name, value in flags.items()})
