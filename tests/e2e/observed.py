"""A whole system that a Prometheus watches, and traffic of several tenants on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from rhizome.inference.v1 import inference_service_pb2 as pb
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.rpc import open_channel
from tests.e2e.prometheus import Prometheus, running_prometheus
from tests.e2e.system import System, running_system
from tests.fakes.redis_process import running_redis

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "helm" / "rhizome" / "rules"
NUM_WORKERS = 2
_SERVICES = ("scheduler", "index", "tokenizer", *(f"worker-{i}" for i in range(NUM_WORKERS)))
_TENANTS = {
    "search": {"weight": 4, "max_priority": 10},
    "chat": {},
    "batch": {"weight": 0.5, "max_queued": 2},
    "trial": {"requests_per_minute": 20},
}
# A cache that is soon full, and few places, so that there are evictions and queues.
_SMALL = ("--max-total-tokens", "2048", "--max-running-requests", "4", "--context-length", "1024")
# Rates need some seconds of samples before the pictures begin.
_WARM_UP_S, _PICTURE_S = 20.0, 180.0
_PREFIX = "Answer shortly, politely and correctly, whatever you are asked by whomever. " * 3


@dataclass(frozen=True, slots=True)
class Observed:
    """What is running."""

    system: System
    prometheus: Prometheus
    # Where each instance serves its metrics.
    targets: dict[str, str]


@contextlib.contextmanager
def observed_system(directory: Path, concurrency: int = 12) -> Iterator[Observed]:
    """Everything started, with a Redis where there is one, and under load until the block ends."""
    tenants = directory / "tenants.json"
    tenants.write_text(json.dumps(_TENANTS))
    port = _free_ports(len(_SERVICES))
    with contextlib.ExitStack() as stack:
        environment = {}
        if shutil.which("redis-server") is not None:
            url = stack.enter_context(running_redis(directory)).url
            for service in ("GATEWAY", "SCHEDULER"):
                environment[f"RHIZOME__{service}__REDIS_URL"] = url
        system = stack.enter_context(
            running_system(
                *("--dp", str(NUM_WORKERS), "--metrics-port", str(port)),
                *("--tenants", str(tenants), "--log-level", "warning"),
                *_SMALL,
                environment=environment,
            )
        )
        targets = {"gateway": f"127.0.0.1:{system.port}"}
        targets |= {name: f"127.0.0.1:{port + i}" for i, name in enumerate(_SERVICES)}
        prometheus = stack.enter_context(running_prometheus(directory, targets, RULES))
        stack.enter_context(_load(system, concurrency))
        yield Observed(system, prometheus, targets)


@contextlib.contextmanager
def _load(system: System, concurrency: int) -> Iterator[None]:
    stopping = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_send_until(stopping, system, concurrency)), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(30)


async def _send_until(stopping: threading.Event, system: System, concurrency: int) -> None:
    limits = httpx.Limits(max_connections=concurrency)
    async with (
        httpx.AsyncClient(base_url=system.url, timeout=30, limits=limits) as http,
        open_channel(f"127.0.0.1:{system.port + 1}") as channel,
    ):
        stub = InferenceServiceStub(channel)

        async def client(number: int) -> None:
            rng = random.Random(number)
            while True:
                # What is refused or cut off is part of the traffic.
                with contextlib.suppress(httpx.HTTPError, TimeoutError, OSError):
                    await _one(http, stub, rng)
                await asyncio.sleep(rng.expovariate(4))

        clients = [asyncio.create_task(client(number)) for number in range(concurrency)]
        while not stopping.is_set():
            await asyncio.sleep(0.1)
            assert not any(each.done() for each in clients), "a client gave up"
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _one(http: httpx.AsyncClient, stub: InferenceServiceStub, rng: random.Random) -> None:
    """One request of some tenant: a chat, mostly."""
    tenant = rng.choice((*_TENANTS, "batch", "unlisted", ""))
    kind = rng.random()
    if kind < 0.1:
        request = pb.GenerateRequest(text=f"{_PREFIX}{rng.randrange(5)}")
        request.sampling.max_new_tokens = 8
        async for _ in stub.Generate(request):
            pass
        return
    question = f"Document {rng.randrange(12)}. " * 8 + "What is the capital of France?"
    body = {
        "model": "default",
        "messages": [
            {"role": "system", "content": _PREFIX},
            {"role": "user", "content": question},
        ],
        "stream": rng.random() < 0.8,
        "max_tokens": rng.randrange(4, 60),
        "ignore_eos": True,
        "priority": rng.choice((0, 0, 0, 5, -1)) if tenant == "search" else 0,
    }
    if kind < 0.15:
        body["temperature"] = -1
    timeout_s = 0.2 if kind > 0.95 else 30.0
    async with asyncio.timeout(timeout_s):
        headers = {"x-tenant-id": tenant} if tenant else {}
        await http.post("/v1/chat/completions", json=body, headers=headers)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                for offset in range(1, count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
                return port


def main() -> None:
    """Draw the dashboards of a few minutes under load into docs/images."""
    # Not at the top: tests do not need matplotlib.
    from deploy.grafana.pictures import draw_dashboards

    with tempfile.TemporaryDirectory() as directory, observed_system(Path(directory)) as observed:
        start_s = time.time() + _WARM_UP_S
        time.sleep(_WARM_UP_S + _PICTURE_S)
        draw_dashboards(observed.prometheus.url, ROOT / "docs" / "images", start_s, time.time())


if __name__ == "__main__":
    main()
