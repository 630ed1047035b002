"""`rhizome offline`: the whole system, one benchmark of it, a report, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from grpc import aio

from rhizome.scheduler.v1.scheduler_service_pb2 import (
    WORKER_STATE_READY,
    WatchWorkersRequest,
    WatchWorkersResponse,
)
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from services.common.peer_tls import PeerTls, peer_tls
from services.common.process import EXIT_INTERRUPTED, stop_event
from services.common.rpc import open_channel
from services.launch.config import OfflineConfig
from services.launch.perf_csv import Measured, append_row, result_columns, result_lines
from services.launch.serve import echo, lifetime
from services.launch.supervisor import Supervisor, private_directory
from services.launch.topology import build_topology, scheduler_address

logger = logging.getLogger(__name__)

_WORKERS_RETRY_S = 0.5
_BENCH_GRACE_S = 5.0
# What the benchmark is told by `rhizome offline` itself.
_OWN_FLAGS = ("--base-url", "--output-file")


class BenchFailedError(Exception):
    """There is no result; the message says why."""


def check_bench_flags(flags: Sequence[str]) -> None:
    """Raises ValueError for flags that are not the caller's to give."""
    for flag in flags:
        if flag.partition("=")[0] in _OWN_FLAGS:
            raise ValueError(f"{flag} is given to the benchmark by `rhizome offline` itself")


async def offline(config: OfflineConfig, bench_flags: Sequence[str]) -> None:
    """Measure, report, stop everything.

    Raises ServiceGaveUpError, HostUnreachableError, and BenchFailedError for a system that could
    not be measured, or where a request failed. Exits with EXIT_INTERRUPTED after a signal.
    """
    stop, ready = stop_event(), asyncio.Event()
    async with (
        peer_tls(config.tls) as tls,
        private_directory() as directory,
        lifetime(config, tls),
    ):
        specs = build_topology(config, directory, os.getpid())
        supervisor = Supervisor(specs, directory, echo, tls)
        logger.info("event=starting model=%s", config.model_path)
        system = asyncio.create_task(supervisor.run(ready.set, stop))
        measuring = asyncio.create_task(_measure(config, bench_flags, directory, ready, tls))
        await asyncio.wait([system, measuring], return_when=asyncio.FIRST_COMPLETED)
        was_stopped = stop.is_set()
        measuring.cancel()
        stop.set()
        outcomes = await asyncio.gather(measuring, system, return_exceptions=True)
    measured = outcomes[0]
    if was_stopped:
        sys.exit(EXIT_INTERRUPTED)
    result = measured if isinstance(measured, Measured) else None
    _report(config, bench_flags, result)
    # The system's own end says more than a benchmark that it interrupted.
    for outcome in reversed(outcomes):
        if isinstance(outcome, BaseException):
            raise outcome


async def _measure(
    config: OfflineConfig,
    bench_flags: Sequence[str],
    directory: Path,
    ready: asyncio.Event,
    tls: PeerTls | None,
) -> Measured:
    """Wait for every replica, then measure. Raises BenchFailedError."""
    counted = [0]
    try:
        async with asyncio.timeout(config.ready_timeout_s):
            await ready.wait()
            scheduler = scheduler_address(config, directory)
            await _until_ready(scheduler, config.dp, counted, tls)
    except TimeoutError:
        raise BenchFailedError(
            f"{counted[0]} of {config.dp} replicas were ready after {config.ready_timeout_s:g} s"
        ) from None
    logger.info("event=measuring replicas=%s", config.dp)
    report = directory / "serving.json"
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    arguments = ("--base-url", f"http://{host}:{config.port}", "--output-file", str(report))
    status = await _run(sys.executable, "-m", "services.bench", "serving", *bench_flags, *arguments)
    if status != 0:
        raise BenchFailedError(f"the benchmark ended with status {status}")
    return _read(report)


async def _until_ready(scheduler: str, count: int, counted: list[int], tls: PeerTls | None) -> None:
    """Return once `count` workers may get requests; `counted` has how many do so far."""
    async with open_channel(scheduler, tls) as channel:
        stub = SchedulerServiceStub(channel)
        while True:
            with contextlib.suppress(aio.AioRpcError):
                async for table in stub.WatchWorkers(WatchWorkersRequest()):
                    if not table.unchanged:
                        counted[0] = _num_ready(table)
                        logger.info("event=replicas ready=%s of=%s", counted[0], count)
                    if counted[0] >= count:
                        return
            await asyncio.sleep(_WORKERS_RETRY_S)


def _num_ready(table: WatchWorkersResponse) -> int:
    workers = [worker for pool in table.pools for worker in pool.workers]
    return sum(worker.state == WORKER_STATE_READY for worker in workers)


async def _run(*command: str) -> int:
    """The status of a child, which ends with this task."""
    child = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    try:
        return await child.wait()
    finally:
        if child.returncode is None:
            child.terminate()
            try:
                await asyncio.wait_for(child.wait(), _BENCH_GRACE_S)
            except TimeoutError:
                child.kill()
                await child.wait()


def _read(report: Path) -> Measured:
    """Raises BenchFailedError when a request failed: figures of the others would flatter."""
    found = json.loads(report.read_text())
    runs = found["runs"]
    num_failed = sum(run["num_failed"] for run in runs)
    if num_failed:
        errors = sorted({error for run in runs for error in run["errors"]})
        raise BenchFailedError(f"{num_failed} requests failed: {'; '.join(errors)[:500]}")
    headlines = found["headlines"]
    return Measured(
        requests_per_s=headlines["requests/s"]["median"],
        output_tokens_per_s=headlines["output tokens/s"]["median"],
        duration_s=sum(run["duration_s"] for run in runs),
    )


def _report(config: OfflineConfig, bench_flags: Sequence[str], measured: Measured | None) -> None:
    model = config.served_model_name or config.model_path.resolve().name
    num_ranks = config.dp * config.tp_size
    if measured is not None:
        lines = result_lines(
            measured,
            model=model,
            tp_size=config.tp_size,
            nnodes=config.nnodes,
            num_gpus=num_ranks,
        )
        print(f"\n{lines}", flush=True)
    if config.perf_csv is None:
        return
    about = {
        "model": model,
        "n_gpus": str(num_ranks),
        "nnodes": str(config.nnodes),
        "gpus_per_node": str(num_ranks // config.nnodes),
        "args": " ".join(bench_flags),
        "machine_name": platform.node(),
        "deployment_type": config.deployment_type,
        "launcher": "rhizome",
    }
    append_row(config.perf_csv, about | result_columns(measured))
