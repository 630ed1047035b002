"""Schedule calls per second through gRPC, and the latency they add.

    python -m bench.schedule [--callers 32] [--workers 64] [--prompt-tokens 4096] [--seconds 5]
                             [--report-ms 20] [--no-index] [--policy prefix_load] [--unary]
                             [--rate 3000]

Four processes joined by Unix sockets: `python -m services.scheduler`, `python -m
services.cache_index` following the workers' cache events, fake workers (each with its own server,
pages and load reports), and this one with the callers. Half of each prompt is a prefix that a few
workers hold; the other half is new. Workers predict tiny prefills, so that no request waits for
room. All callers share one ScheduleMany call, as the requests of a gateway do; with --unary each
request is a Schedule call. Prints one JSON object; latencies are of a closed loop of all callers,
of one alone, and of requests that arrive --rate times a second (Poisson), counted from the moment
they were due. CPU times are of the scheduler's, the index's and the callers' processes (user and
system), load reports included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import platform
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rhizome.common.v1.cache_tier_pb2 import CACHE_TIER_GPU
from rhizome.common.v1.pool_identity_pb2 import PoolIdentity, ProtocolRange
from rhizome.common.v1.worker_role_pb2 import WORKER_ROLE_MIXED
from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from rhizome.worker.v1 import (
    worker_service_pb2 as worker_pb,
    worker_service_pb2_grpc as worker_pb_grpc,
)
from services.common.errors import RhizomeError, error_from_rpc
from services.common.rpc import open_channel, running_server
from services.gateway.schedule_session import ScheduleSession

_ROOT = Path(__file__).resolve().parents[1]
_PAGE_SIZE = 16
_NUM_PREFIXES = 256
_HOLDERS = 4
_NUM_MESSAGES = 2048
_REPORT_OUTCOMES_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--report-ms", type=float, default=20.0, help="between load reports")
    parser.add_argument("--no-index", action="store_true")
    parser.add_argument("--policy", default="prefix_load")
    parser.add_argument("--unary", action="store_true", help="a Schedule call a request")
    parser.add_argument("--rate", type=float, default=3000.0, help="arrivals a second, open loop")
    uvloop.run(run(parser.parse_args()))


async def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        scheduler_address = f"unix:{directory}/scheduler.sock"
        index_address = f"unix:{directory}/index.sock"
        flags = [] if args.no_index else ["--cache-index", index_address]
        async with (
            running_service(
                "scheduler", scheduler_address, "--policy", args.policy, *flags
            ) as scheduler,
            contextlib.AsyncExitStack() as stack,
            open_channel(scheduler_address) as channel,
        ):
            stub = pb_grpc.SchedulerServiceStub(channel)
            stack.enter_context(running_workers(args, directory, scheduler_address))
            await until_registered(stub, args.workers)
            index = None
            if not args.no_index:
                index = await stack.enter_async_context(
                    running_service("cache_index", index_address, "--scheduler", scheduler_address)
                )
                await asyncio.sleep(3.0)
            load = Load(stub, make_messages(args.prompt_tokens), args.unary)
            await load.closed_loop(args.callers, 1.0)
            meters = Meters(scheduler, index)
            result = {
                "python": platform.python_version(),
                "cpus": psutil.cpu_count(),
                "arguments": vars(args),
                "all_callers": await meters.of(load.closed_loop(args.callers, args.seconds)),
                "one_caller": await meters.of(load.closed_loop(1, args.seconds)),
                "open_loop": await meters.of(load.open_loop(args.rate, args.seconds)),
                "idle": await idle(args.seconds, scheduler),
            }
            await load.close()
    print(json.dumps(result, indent=2))


class Taken(NamedTuple):
    """What a load saw: seconds of each placement, how many expected a match, how many failed."""

    latencies: list[float]
    num_matched: int
    num_failed: int


class Meters:
    """What a load took: latencies, and CPU time by process."""

    def __init__(self, scheduler: psutil.Process, index: psutil.Process | None) -> None:
        self._processes = {"scheduler": scheduler, "index": index, "callers": psutil.Process()}

    async def of(self, load: Awaitable[Taken]) -> dict[str, Any]:
        before = {name: cpu_s(process) for name, process in self._processes.items()}
        start = time.perf_counter()
        taken = await load
        elapsed = time.perf_counter() - start
        latencies = sorted(taken.latencies)
        count = len(latencies)
        return {
            "calls_per_s": round(count / elapsed),
            "p50_ms": round(latencies[count // 2] * 1e3, 3),
            "p99_ms": round(latencies[count * 99 // 100] * 1e3, 3),
            "failed": taken.num_failed,
            "share_with_a_match": round(taken.num_matched / count, 3),
            **{
                f"{name}_cpu_us_per_call": round((cpu_s(process) - before[name]) / count * 1e6)
                for name, process in self._processes.items()
            },
        }


async def idle(seconds: float, scheduler: psutil.Process) -> dict[str, float]:
    """What load reports alone cost."""
    before = cpu_s(scheduler)
    await asyncio.sleep(seconds)
    return {"scheduler_cpu_share": round((cpu_s(scheduler) - before) / seconds, 3)}


class Load:
    """Callers of one gateway, which reports outcomes as a gateway does."""

    def __init__(self, stub: Any, messages: list[pb.ScheduleRequest], unary: bool) -> None:
        self._stub = stub
        self._session = ScheduleSession(stub)
        self._place = self._place_alone if unary else self._session.place
        self._messages = messages
        self._position = 0
        self._placements: list[pb.Placement] = []
        self._latencies: list[float] = []
        self._num_matched = 0
        self._num_failed = 0
        self._run_id = f"{time.monotonic_ns()}"

    async def closed_loop(self, num_callers: int, seconds: float) -> Taken:
        """Callers that ask again as soon as they are answered."""
        end = time.perf_counter() + seconds

        async def caller() -> None:
            while (start := time.perf_counter()) < end:
                await self._ask(start)

        async with self._reporting():
            await asyncio.gather(*(caller() for _ in range(num_callers)))
        return self._taken()

    async def open_loop(self, rate: float, seconds: float) -> Taken:
        """Requests that come when they are due, whatever became of those before."""
        rng = random.Random(3)
        due = start = time.perf_counter()
        async with self._reporting(), asyncio.TaskGroup() as tasks:
            while due < start + seconds:
                while time.perf_counter() >= due:
                    tasks.create_task(self._ask(due))
                    due += rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return self._taken()

    async def close(self) -> None:
        await self._session.aclose()

    async def _ask(self, start: float) -> None:
        message = self._messages[self._position % len(self._messages)]
        message.request_id = f"{self._run_id}-{self._position}"
        self._position += 1
        try:
            placed = await self._place(message)
        except RhizomeError:
            self._num_failed += 1
            return
        self._latencies.append(time.perf_counter() - start)
        self._placements.append(placed)
        self._num_matched += placed.predicted_cached_tokens > 0

    async def _place_alone(self, message: pb.ScheduleRequest) -> pb.Placement:
        call = self._stub.Schedule(message)
        try:
            while not (response := await call.read()).HasField("placed"):
                pass
        except aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        # The end of the stream is not worth waiting for.
        call.cancel()
        placed: pb.Placement = response.placed
        return placed

    def _taken(self) -> Taken:
        taken = Taken(self._latencies, self._num_matched, self._num_failed)
        self._latencies, self._num_matched, self._num_failed = [], 0, 0
        return taken

    @contextlib.asynccontextmanager
    async def _reporting(self) -> AsyncIterator[None]:
        """Say what ended, now and then; at the end, nothing is left reserved."""
        reporting = asyncio.create_task(self._report_for_ever())
        yield
        await asyncio.sleep(2 * _REPORT_OUTCOMES_S)
        reporting.cancel()

    async def _report_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_OUTCOMES_S)
            ended, self._placements = self._placements, []
            outcomes = [pb.RequestOutcome(reservation_id=p.reservation_id) for p in ended]
            await self._stub.ReportRequests(pb.ReportRequestsRequest(outcomes=outcomes))


def make_messages(num_tokens: int) -> list[pb.ScheduleRequest]:
    """Prompts whose first half is one of the known prefixes and whose second half is new."""
    rng = random.Random(2)
    num_pages = num_tokens // _PAGE_SIZE
    shared = num_pages // 2
    return [
        pb.ScheduleRequest(
            model="bench",
            prefix_hashes=[
                *prefix_hashes(rng.randrange(_NUM_PREFIXES), shared),
                *(rng.getrandbits(64) for _ in range(num_pages - shared)),
            ],
            num_prompt_tokens=num_tokens,
            max_new_tokens=128,
            num_choices=1,
        )
        for _ in range(_NUM_MESSAGES)
    ]


def prefix_hashes(prefix: int, num_pages: int) -> list[int]:
    rng = random.Random(prefix)
    return [rng.getrandbits(64) for _ in range(num_pages)]


class FakeWorker(worker_pb_grpc.WorkerServiceServicer):
    """Registers, reports a load that always changes, and holds some of the prefixes."""

    def __init__(self, number: int, directory: str, num_pages: int) -> None:
        self.address = f"unix:{directory}/worker{number}.sock"
        self.description = pb.WorkerDescription(
            worker_id=f"worker-{number}",
            address=self.address,
            epoch=number + 1,
            identity=PoolIdentity(served_model_name="bench", page_size=_PAGE_SIZE, hash_version=1),
            protocol=ProtocolRange(min_revision=1, max_revision=1),
            role=WORKER_ROLE_MIXED,
            num_pages=1_000_000,
            max_running_sequences=4096,
            context_length=1_000_000,
            vocab_size=128_000,
        )
        held = random.Random(number).sample(range(_NUM_PREFIXES), _held_prefixes(_HOLDERS))
        self._chains = [prefix_hashes(prefix, num_pages // 2) for prefix in held]

    async def WatchCacheEvents(  # type: ignore[override]
        self, request: worker_pb.WatchCacheEventsRequest, context: Any
    ) -> None:
        chunk = worker_pb.CacheSnapshotChunk(sequence_number=1, last=True)
        for chain in self._chains:
            chunk.prefix_hashes.extend(chain)
            chunk.parent_hashes.extend([0, *chain[:-1]])
            chunk.tiers.extend([CACHE_TIER_GPU] * len(chain))
        await context.write(
            worker_pb.WatchCacheEventsResponse(epoch=self.description.epoch, snapshot_chunk=chunk)
        )
        await asyncio.Event().wait()

    async def stay_registered(self, stub: Any, interval_s: float) -> None:
        call = stub.RegisterWorker()
        await call.write(pb.RegisterWorkerRequest(description=self.description))
        costs = pb.CostModel(
            prefill_base_ns=1e3, prefill_token_ns=10, decode_base_ns=1e4, decode_sequence_ns=10
        )
        number = 0
        while True:
            number += 1
            load = pb.LoadReport(
                sequence_number=number,
                num_running=8 + number % 2,
                num_free_pages=1_000_000,
                cost_model=costs,
            )
            await call.write(pb.RegisterWorkerRequest(load=load))
            await asyncio.sleep(interval_s)


def _held_prefixes(num_holders: int) -> int:
    """So that each prefix has about that many holders among 64 workers."""
    return _NUM_PREFIXES * num_holders // 64


async def serve_workers(args: argparse.Namespace, directory: str, scheduler: str) -> None:
    service = worker_pb.DESCRIPTOR.services_by_name["WorkerService"]
    num_pages = args.prompt_tokens // _PAGE_SIZE
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(scheduler))
        stub = pb_grpc.SchedulerServiceStub(channel)
        workers = [FakeWorker(number, directory, num_pages) for number in range(args.workers)]
        for worker in workers:

            def add(server: aio.Server, worker: FakeWorker = worker) -> None:
                worker_pb_grpc.add_WorkerServiceServicer_to_server(worker, server)

            await stack.enter_async_context(running_server(add, [service], worker.address))
        await asyncio.gather(
            *(worker.stay_registered(stub, args.report_ms / 1e3) for worker in workers)
        )


def _workers_process(args: argparse.Namespace, directory: str, scheduler: str) -> None:
    uvloop.run(serve_workers(args, directory, scheduler))


@contextlib.contextmanager
def running_workers(args: argparse.Namespace, directory: str, scheduler: str) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(
        target=_workers_process, args=(args, directory, scheduler), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


@contextlib.asynccontextmanager
async def running_service(name: str, address: str, *flags: str) -> AsyncIterator[psutil.Process]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{name}", "--listen", address),
        *("--log-level", "warning", *flags),
        cwd=_ROOT,
    )
    try:
        async with open_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            yield psutil.Process(child.pid)
    finally:
        child.terminate()
        await child.wait()


async def until_registered(stub: Any, num_workers: int) -> None:
    async for table in stub.WatchWorkers(pb.WatchWorkersRequest()):
        if sum(len(pool.workers) for pool in table.pools) == num_workers:
            return


def cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
