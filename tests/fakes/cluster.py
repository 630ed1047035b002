"""Services as processes of their own, as many of each as a test wants, over Unix sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai import OpenAI

from bench.other_engine import engine_program
from bench.reality.slowed import Slowing
from services.common.config import child_environment
from tests.e2e.system import ROOT, free_port

_READY_S = 90.0


@dataclass(slots=True)
class Cluster:
    """Workers with one model, tokenizers, an index, schedulers and gateways."""

    directory: Path
    # By name, such as `scheduler-0`.
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    # One a gateway.
    clients: list[OpenAI] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    _commands: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(self.processes[name].pid)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def start(self, name: str, *arguments: str, program: Sequence[str] = ()) -> None:
        """Start a service; without arguments, again as it was. `name` is its module and number,
        unless `program` is the module to run, with its first arguments."""
        program = program or (f"services.{name.rpartition('-')[0]}",)
        command = self._commands.setdefault(name, (*program, *arguments))
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", *command),
                    *("--parent-pid", str(os.getpid())),
                ],
                cwd=ROOT,
                env=child_environment({"OMP_NUM_THREADS": "1"}),
                stdout=log,
                stderr=log,
            )

    def metric(self, gateway: int, name: str, **labels: str) -> float:
        """A sample of a gateway's; 0 where there is none."""
        return _sample(f"{self.urls[gateway]}/metrics", name, labels)

    def service_metric(self, service: str, name: str, **labels: str) -> float:
        """The same of a scheduler or worker."""
        (port,) = re.findall(r"event=metrics_served port=(\d+)", self.log(service))[-1:]
        return _sample(f"http://127.0.0.1:{port}/metrics", name, labels)

    def steps(self, worker: int, since: float, until: float) -> list[float]:
        """Seconds of each step that a worker with a floor made between these monotonic times."""
        logs = self._step_logs(worker).glob("steps-*.txt")
        lines = (line.split() for log in logs for line in log.read_text().splitlines())
        times = [(int(began) / 1e9, int(ended) / 1e9) for began, _, ended, *_ in lines]
        return [ended - began for began, ended in times if since <= began and ended <= until]

    def slowed_worker(self, worker: int, floor_ms: float) -> tuple[str, ...]:
        """The program of a worker whose steps take at least so long, and are logged."""
        logs = self._step_logs(worker)
        logs.mkdir()
        slowing = Slowing(floor_ms=floor_ms, token_ms=0.0, log=logs)
        return engine_program("bench.reality.slowed", *slowing.arguments())

    def wait_for(self, name: str, text: str, times: int = 1) -> None:
        """Until a service has logged this, so often in all."""
        deadline = time.monotonic() + _READY_S
        while self.log(name).count(text) < times:
            assert time.monotonic() < deadline, f"{name} never said {text!r}:\n{self.log(name)}"
            time.sleep(0.02)

    def _step_logs(self, worker: int) -> Path:
        return self.directory / f"steps-{worker}"

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait()


def direct(client: str, address: str) -> str:
    """Nothing between a client and the service at an address."""
    return address


@contextlib.contextmanager
def running_cluster(
    *,
    num_schedulers: int,
    num_gateways: int,
    num_workers: int = 2,
    num_tokenizers: int = 1,
    redis_url: str | None = None,
    tenants: object = None,
    model_arguments: Sequence[str] = (),
    worker_arguments: Sequence[str] = (),
    scheduler_arguments: Sequence[str] = (),
    step_floor_ms: float | None = None,
    route: Callable[[str, str], str] = direct,
) -> Iterator[Cluster]:
    """All ready: every scheduler knows all workers, every gateway can serve.

    `route` turns a service's address into the one that a client (`gateway-0`; `*` for whoever asks
    a scheduler where a worker is) reaches it by.
    With `step_floor_ms` no engine's step is shorter.
    """
    with tempfile.TemporaryDirectory(prefix="rz-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        cluster = Cluster(directory)
        stack.callback(cluster.stop)
        store = () if redis_url is None else ("--redis-url", redis_url)
        targets = _addresses(directory, "scheduler", num_schedulers)
        tokenizers = _addresses(directory, "tokenizer", num_tokenizers)
        index = f"unix:{directory}/cache_index-0.sock"

        def flags(flag: str, client: str, addresses: Sequence[str]) -> list[str]:
            return [part for address in addresses for part in (flag, route(client, address))]

        for number, listen in enumerate(_addresses(directory, "worker", num_workers)):
            cluster.start(
                f"worker-{number}",
                *("--listen", listen, "--advertise-address", route("*", listen)),
                *("--worker-id", f"w{number}", *model_arguments, *worker_arguments),
                *flags("--scheduler", f"worker-{number}", targets),
                *("--metrics-port", "0"),
                program=()
                if step_floor_ms is None
                else cluster.slowed_worker(number, step_floor_ms),
            )
        for number, listen in enumerate(tokenizers):
            cluster.start(f"tokenizer-{number}", "--listen", listen, *model_arguments)
        cluster.start(
            "cache_index-0", "--listen", index, *flags("--scheduler", "cache_index-0", targets)
        )
        for number, target in enumerate(targets):
            name = f"scheduler-{number}"
            cluster.start(
                name,
                *("--listen", target, *flags("--cache-index", name, [index]), *store),
                *("--metrics-port", "0", *scheduler_arguments),
            )
        if tenants is not None:
            (directory / "tenants.json").write_text(json.dumps(tenants))
            store += ("--tenants", str(directory / "tenants.json"))
        for number in range(num_gateways):
            name = f"gateway-{number}"
            peers = flags("--tokenizers", name, tokenizers) + flags("--schedulers", name, targets)
            _start_gateway(cluster, number, (*peers, *store), stack)
        for number in range(num_schedulers):
            cluster.wait_for(f"scheduler-{number}", "event=worker_registered", times=num_workers)
        for number in range(num_gateways):
            _wait_until_serving(cluster, f"gateway-{number}")
        yield cluster


def _sample(url: str, name: str, labels: Mapping[str, str]) -> float:
    text = httpx.get(url).text
    shown = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    start = f"{name}{{{shown}}} " if labels else f"{name} "
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(start)]
    return float(values[0]) if values else 0.0


def _addresses(directory: Path, module: str, number: int) -> list[str]:
    return [f"unix:{directory}/{module}-{i}.sock" for i in range(number)]


def _start_gateway(
    cluster: Cluster, number: int, arguments: Sequence[str], stack: contextlib.ExitStack
) -> None:
    port = free_port()
    cluster.start(
        f"gateway-{number}",
        *("--port", str(port), *arguments),
        *("--grpc-listen", f"unix:{cluster.directory}/gateway-{number}.sock"),
    )
    url = f"http://127.0.0.1:{port}"
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    cluster.urls.append(url)
    cluster.clients.append(stack.enter_context(client))


def _wait_until_serving(cluster: Cluster, name: str) -> None:
    deadline = time.monotonic() + _READY_S
    with grpc.insecure_channel(f"unix:{cluster.directory}/{name}.sock") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            assert cluster.processes[name].poll() is None, cluster.log(name)
            with contextlib.suppress(grpc.RpcError):
                response = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.05)
    raise AssertionError(f"{name} does not serve:\n{cluster.log(name)}")
