"""Cache index: time of a match, pages applied a second, memory a page. Prints JSON.

    python -m bench.cache_index [--pages 1000000] [--workers 64]

In process, times are CPU time of this process. Through gRPC, the index is a process of its own
and this one plays workers and scheduler; times are the index process's CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import psutil
from grpc import aio

from rhizome.cache_index.v1 import cache_index_service_pb2 as index_pb
from rhizome.cache_index.v1.cache_index_service_pb2_grpc import CacheIndexServiceStub
from rhizome.scheduler.v1 import scheduler_service_pb2 as scheduler_pb
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import (
    SchedulerServiceServicer,
    add_SchedulerServiceServicer_to_server,
)
from rhizome.worker.v1 import worker_service_pb2 as worker_pb
from rhizome.worker.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)
from services.cache_index.holders import GPU
from services.cache_index.index import PrefixIndex
from services.common.process import run
from services.common.rpc import open_channel, running_server

_CHAIN_PAGES = 256
_REPEATS = 400
_CHUNK_PAGES = 8192
_EVENTS_A_BATCH = 16


def random_chains(pages: int, rng: random.Random) -> list[list[int]]:
    """Chains of 256 pages with hashes like the real ones, `pages` in all."""
    return [
        [rng.getrandbits(64) or 1 for _ in range(_CHAIN_PAGES)]
        for _ in range(pages // _CHAIN_PAGES)
    ]


def microseconds(work: Callable[[Sequence[int]], object], chains: Sequence[list[int]]) -> float:
    """Median CPU time of `work` on a chain, each chain timed alone."""
    times = []
    for chain in chains:
        start = time.process_time_ns()
        work(chain)
        times.append(time.process_time_ns() - start)
    return round(statistics.median(times) / 1000, 2)


def bytes_a_page(pages: int) -> int:
    """Growth of this process with pages that one worker holds, their hashes included."""
    rng = random.Random(0)
    index = PrefixIndex(pages + _CHAIN_PAGES)
    holder = index.add_holder("worker-0", 1)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(pages // _CHAIN_PAGES):
        index.store(holder, GPU, 0, random_chains(_CHAIN_PAGES, rng)[0])
    return round((psutil.Process().memory_info().rss - before) / index.num_prefixes)


def in_process(pages: int, workers: int) -> dict[str, Any]:
    """The index alone."""
    memory = bytes_a_page(pages)
    rng = random.Random(1)
    index = PrefixIndex(2 * pages)
    holders = [index.add_holder(f"worker-{number}", number) for number in range(workers)]
    owned = list(zip(random_chains(pages, rng), itertools.cycle(holders), strict=False))
    start = time.process_time()
    for chain, holder in owned:
        index.store(holder, GPU, 0, chain)
    stored_s = time.process_time() - start
    rng.shuffle(owned)
    chains = [chain for chain, _ in owned]
    alone, shared = chains[:_REPEATS], chains[_REPEATS : 2 * _REPEATS]
    staggered = chains[2 * _REPEATS : 2 * _REPEATS + _REPEATS // 4]
    for chain, holder in itertools.product(shared, holders):
        index.store(holder, GPU, 0, chain)
    for chain in staggered:
        for number, holder in enumerate(holders, 1):
            index.store(holder, GPU, 0, chain[: number * _CHAIN_PAGES // workers])
    match = {
        "one_worker_whole_chain": microseconds(index.match, alone),
        "one_worker_100_of_256": microseconds(
            index.match, [a[:100] + b[100:] for a, b in zip(alone, shared, strict=True)]
        ),
        "all_workers_whole_chain": microseconds(index.match, shared),
        "all_workers_each_its_own_length": microseconds(index.match, staggered),
        "nobody": microseconds(index.match, random_chains(_CHAIN_PAGES * _REPEATS, rng)),
        "all_workers_whole_chain_by_walking": microseconds(walker(index), shared),
    }
    removed = owned[2 * _REPEATS + len(staggered) :]
    start = time.process_time()
    for chain, holder in removed:
        index.remove(holder, GPU, chain[::-1])
    removed_s = time.process_time() - start
    return {
        "match_us": match,
        "pages_stored_per_s": round(len(owned) * _CHAIN_PAGES / stored_s),
        "pages_removed_per_s": round(len(removed) * _CHAIN_PAGES / removed_s),
        "bytes_per_page": memory,
    }


def walker(index: PrefixIndex) -> Callable[[Sequence[int]], int]:
    """The longest match by looking up every page, for comparison with bisection."""
    shards = index._values

    def walk(chain: Sequence[int]) -> int:
        holders = -1 << 30
        for depth, page in enumerate(chain):
            holders &= shards[page & 255].get(page, 0)
            if not holders:
                return depth
        return len(chain)

    return walk


class Fleet(WorkerServiceServicer, SchedulerServiceServicer):
    """Workers that tell of pages as fast as they are read, and the scheduler that knows them.

    Each worker first sends a snapshot, then, once `go_on` is set, events.
    """

    def __init__(self, workers: int, pages: int) -> None:
        rng = random.Random(2)
        share = pages // workers
        self.snapshots = [random_chains(share, rng) for _ in range(workers)]
        self.events = [random_chains(share, rng) for _ in range(workers)]
        self.num_pages = sum(len(c) for chains in self.snapshots for c in chains)
        self.go_on = asyncio.Event()
        self.addresses: list[str] = []
        self._next_worker = itertools.count()

    async def WatchWorkers(self, request: scheduler_pb.WatchWorkersRequest, context: Any) -> None:
        entries = [
            scheduler_pb.WorkerEntry(worker_id=f"worker-{number}", address=address)
            for number, address in enumerate(self.addresses)
        ]
        table = scheduler_pb.WatchWorkersResponse(pools=[scheduler_pb.Pool(workers=entries)])
        while True:
            await context.write(table)
            await asyncio.sleep(0.5)

    async def WatchCacheEvents(
        self, request: worker_pb.WatchCacheEventsRequest, context: Any
    ) -> None:
        number = next(self._next_worker)
        pages = [
            (page, parent)
            for chain in self.snapshots[number]
            for page, parent in zip(chain, [0, *chain], strict=False)
        ]
        for start in range(0, len(pages), _CHUNK_PAGES):
            part = pages[start : start + _CHUNK_PAGES]
            chunk = worker_pb.CacheSnapshotChunk(
                prefix_hashes=[page for page, _ in part],
                parent_hashes=[parent for _, parent in part],
                tiers=[1] * len(part),
                last=start + _CHUNK_PAGES >= len(pages),
            )
            await context.write(worker_pb.WatchCacheEventsResponse(epoch=1, snapshot_chunk=chunk))
        await self.go_on.wait()
        chains = self.events[number]
        for start in range(0, len(chains), _EVENTS_A_BATCH):
            events = [
                worker_pb.CacheEvent(stored=worker_pb.PagesStored(prefix_hashes=chain, tier=1))
                for chain in chains[start : start + _EVENTS_A_BATCH]
            ]
            batch = worker_pb.CacheEventBatch(
                first_sequence_number=start + 1, events=events, unix_ns=time.time_ns()
            )
            await context.write(worker_pb.WatchCacheEventsResponse(epoch=1, events=batch))
        await asyncio.Event().wait()


async def through_grpc(pages: int, workers: int) -> dict[str, Any]:
    """The index as a process: pages applied for its CPU time, and what a match takes meanwhile."""
    fleet = Fleet(workers, pages)
    with tempfile.TemporaryDirectory() as directory:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(workers + 1):
                address = f"unix:{directory}/{number}.sock"
                if number:
                    fleet.addresses.append(address)
                await stack.enter_async_context(serve(fleet, address))
            listen = f"unix:{directory}/index.sock"
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.cache_index", "--listen", listen),
                *("--scheduler", f"unix:{directory}/0.sock", "--log-level", "warning"),
            )
            try:
                channel = await stack.enter_async_context(open_channel(listen))
                await channel.channel_ready()
                return await _measure(fleet, CacheIndexServiceStub(channel), process.pid)
            finally:
                process.terminate()
                await process.wait()


async def _measure(fleet: Fleet, stub: Any, pid: int) -> dict[str, Any]:
    chain = fleet.snapshots[0][0]
    results: dict[str, Any] = {}
    index = psutil.Process(pid)
    for name, total in (("snapshot", fleet.num_pages), ("events", 2 * fleet.num_pages)):
        held = (await stub.GetIndexStatus(index_pb.GetIndexStatusRequest())).num_prefixes
        cpu, wall = _cpu_s(index), time.monotonic()
        if name == "events":
            fleet.go_on.set()
        latencies = await _match_until(stub, chain, total)
        results[f"{name}_pages_per_cpu_s"] = round((total - held) / (_cpu_s(index) - cpu))
        results[f"{name}_pages_per_s"] = round((total - held) / (time.monotonic() - wall))
        results[f"match_ms_during_{name}"] = _quantiles(latencies)
    idle = [await _match_ms(stub, chain) for _ in range(_REPEATS)]
    return {**results, "match_ms_idle": _quantiles(idle)}


async def _match_until(stub: Any, chain: list[int], pages: int) -> list[float]:
    """Match now and then until the index holds `pages`; returns the milliseconds taken."""
    latencies = []
    while (await stub.GetIndexStatus(index_pb.GetIndexStatusRequest())).num_prefixes < pages:
        latencies.append(await _match_ms(stub, chain))
        await asyncio.sleep(0.01)
    return latencies


async def _match_ms(stub: Any, chain: list[int]) -> float:
    request = index_pb.MatchPrefixRequest(chains=[index_pb.HashChain(prefix_hashes=chain)])
    start = time.perf_counter()
    await stub.MatchPrefix(request)
    return (time.perf_counter() - start) * 1000


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        name: round(ordered[int(share * (len(ordered) - 1))], 2)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.asynccontextmanager
async def serve(fleet: Fleet, address: str) -> AsyncIterator[None]:
    def add(server: aio.Server) -> None:
        add_WorkerServiceServicer_to_server(fleet, server)
        add_SchedulerServiceServicer_to_server(fleet, server)

    services = [
        worker_pb.DESCRIPTOR.services_by_name["WorkerService"],
        scheduler_pb.DESCRIPTOR.services_by_name["SchedulerService"],
    ]
    async with running_server(add, services, address, grace_s=0):
        yield


async def _main(pages: int, workers: int) -> None:
    result = {
        "pages": pages,
        "workers": workers,
        "python": platform.python_version(),
        "in_process": in_process(pages, workers),
        "through_grpc": await through_grpc(pages, workers),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    arguments = parser.parse_args()
    run(_main(arguments.pages, arguments.workers))
