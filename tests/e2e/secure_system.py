"""All services as processes of their own, with TLS between them, as on several machines."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.system import ROOT
from tests.fakes.certificates import TlsFiles

SERVER_NAME = "rhizome.internal"
_START_S = 90.0


@dataclass
class SecureSystem:
    """Running services: their ports by service and purpose, and their logs."""

    directory: Path
    ports: dict[tuple[str, str], int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)

    def port(self, service: str, purpose: str = "listen") -> int:
        return self.ports[service, purpose]

    def log(self, service: str) -> str:
        return (self.directory / f"{service}.log").read_text()

    def start(self, service: str, files: TlsFiles, *flags: str, **environment: str) -> None:
        """Start `python -m services.SERVICE`, which listens where `ports` says."""
        command = [
            *(sys.executable, "-m", f"services.{service}"),
            *("--tls-cert-file", str(files.cert), "--tls-key-file", str(files.key)),
            *("--tls-ca-file", str(files.ca), "--tls-server-name", SERVER_NAME),
            *("--health-port", str(self.port(service, "health"))),
            *flags,
        ]
        self.commands[service] = command
        self._run(service, environment)

    def restart(self, service: str) -> None:
        """Stop it and start it again."""
        self.processes[service].terminate()
        self.processes[service].wait(20)
        self._run(service, {})
        self.wait_until_healthy(service)

    def _run(self, service: str, environment: dict[str, str]) -> None:
        with (self.directory / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                self.commands[service],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )

    def wait_until_healthy(self, service: str) -> None:
        """As Kubernetes' gRPC probe sees it: in plain text, from the address of the machine."""
        give_up = time.monotonic() + _START_S
        with grpc.insecure_channel(f"127.0.0.1:{self.port(service, 'health')}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                assert self.processes[service].poll() is None, self.log(service)
                with contextlib.suppress(grpc.RpcError):
                    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                assert time.monotonic() < give_up, self.log(service)
                time.sleep(0.1)

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def secure_system(
    directory: Path, files: dict[str, TlsFiles], *gateway_flags: str, **environment: str
) -> Iterator[SecureSystem]:
    """Start everything with the built-in model, and wait until the gateway says it is ready.

    `files` are those of each service; flags and environment are the gateway's.
    """
    system = SecureSystem(directory, _free_ports())
    scheduler = f"localhost:{system.port('scheduler')}"
    index = f"localhost:{system.port('cache_index')}"
    worker = f"localhost:{system.port('worker')}"
    tokenizer = f"localhost:{system.port('tokenizer')}"
    arguments = {
        "scheduler": ("--listen", scheduler, "--cache-index", index),
        "cache_index": ("--listen", index, "--scheduler", scheduler),
        "tokenizer": ("--listen", tokenizer),
        "worker": ("--listen", worker, "--scheduler", scheduler, "--max-total-tokens", "16384"),
    }
    try:
        for service, flags in arguments.items():
            metrics = ("--metrics-port", str(system.port(service, "metrics")))
            system.start(service, files[service], *flags, *metrics)
        system.start(
            "gateway",
            files["gateway"],
            *("--port", str(system.port("gateway"))),
            *("--grpc-listen", f"localhost:{system.port('gateway', 'grpc')}"),
            *("--schedulers", scheduler, "--tokenizers", tokenizer),
            *("--shutdown-grace-s", "1"),
            *gateway_flags,
            **environment,
        )
        for service in (*arguments, "gateway"):
            system.wait_until_healthy(service)
        yield system
    finally:
        system.stop()


def _free_ports() -> dict[tuple[str, str], int]:
    names = [
        (service, purpose)
        for service in ("scheduler", "cache_index", "tokenizer", "worker", "gateway")
        for purpose in ("listen", "health", "metrics", "grpc")
    ]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return {name: int(free.getsockname()[1]) for name, free in zip(names, sockets, strict=True)}
