"""The cache index against workers: real gRPC, mock workers, and one that breaks the rules."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rhizome.cache_index.v1 import cache_index_service_pb2 as pb
from rhizome.cache_index.v1.cache_index_service_pb2_grpc import CacheIndexServiceStub
from rhizome.worker.v1 import worker_service_pb2 as worker_pb
from rhizome.worker.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)
from services.cache_index.config import CacheIndexConfig
from services.cache_index.discovery import Discovery
from services.cache_index.follower import Follower
from services.cache_index.index import PrefixIndex
from services.cache_index.service import RunningCacheIndex, running_cache_index
from services.common.errors import UnavailableError
from services.common.prefix_hash import ROOT_HASH
from services.common.rpc import open_channel, running_server
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import running_scheduler
from tests.fakes.mock_worker import MockWorker, MockWorkerConfig, running_mock_worker

CHAIN = [1001, 1002, 1003, 1004, 1005]
EPOCH = 77


@dataclasses.dataclass
class System:
    """A running index, and a caller of it."""

    service: RunningCacheIndex
    stub: Any

    def follow(self, worker_id: str, address: str) -> Follower:
        """Follow a worker as if a scheduler had told of it."""
        self.service.discovery.set_table(worker_id, [(worker_id, address)])
        return self.service.discovery.followers[worker_id, address]

    async def match(self, chain: list[int]) -> dict[str, tuple[int, int, int]]:
        request = pb.MatchPrefixRequest(chains=[pb.HashChain(prefix_hashes=chain)])
        [match] = (await self.stub.MatchPrefix(request)).matches
        assert len(match.worker_ids) == len(set(match.worker_ids)) == len(match.epochs)
        pages = zip(match.gpu_pages, match.host_pages, match.remote_pages, strict=True)
        return dict(zip(match.worker_ids, pages, strict=True))

    async def matches(self, chain: list[int], expected: dict[str, int]) -> None:
        """Wait until exactly these workers hold that many leading pages in GPU memory."""
        async with asyncio.timeout(20):
            while {k: v[0] for k, v in (await self.match(chain)).items()} != expected:
                await asyncio.sleep(0.01)
        self.service.index.check()


@contextlib.asynccontextmanager
async def system(**changes: Any) -> AsyncIterator[System]:
    config = CacheIndexConfig(**{"listen": "localhost:0", **changes})
    async with running_cache_index(config) as service:
        async with open_channel(f"localhost:{service.port}") as channel:
            yield System(service, CacheIndexServiceStub(channel))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def mock_worker(**changes: Any) -> contextlib.AbstractAsyncContextManager[MockWorker]:
    return running_mock_worker(MockWorkerConfig(**changes))


async def test_workers_known_to_a_scheduler_are_followed_and_matched() -> None:
    async with running_scheduler(SchedulerConfig(listen="localhost:0"), grace_s=0) as scheduler:
        address = f"localhost:{scheduler.server.port}"
        async with (
            system(scheduler=(address,)) as s,
            mock_worker(worker_id="a", scheduler=(address,)) as a,
            mock_worker(worker_id="b", scheduler=(address,)) as b,
        ):
            a.cache.use(CHAIN)
            b.cache.use(CHAIN[:2])
            await s.matches(CHAIN, {"a": 5, "b": 2})
            await s.matches([CHAIN[0], 9, 9, 9], {"a": 1, "b": 1})


async def test_a_batch_of_chains_is_answered_in_order() -> None:
    async with system() as s, mock_worker() as a:
        a.cache.use(CHAIN)
        s.follow("a", a.address)
        await s.matches(CHAIN, {"a": 5})
        chains = [CHAIN[:2], [5], [], CHAIN]
        response = await s.stub.MatchPrefix(
            pb.MatchPrefixRequest(chains=[pb.HashChain(prefix_hashes=chain) for chain in chains])
        )
        assert [list(match.gpu_pages) for match in response.matches] == [[2], [], [], [5]]
        assert response.matches[0].epochs == [a.epoch]
        call = s.stub.MatchMany()
        for number in (7, 8):
            asked = [pb.HashChain(prefix_hashes=chain) for chain in chains[number - 7 :]]
            await call.write(pb.MatchManyRequest(number=number, chains=asked))
        for number in (7, 8):
            answer = await call.read()
            assert answer.number == number
            assert list(answer.matches) == list(response.matches)[number - 7 :]


async def test_evictions_and_flushes_reach_the_index() -> None:
    async with system() as s, mock_worker() as a:
        s.follow("a", a.address)
        a.cache.use(CHAIN)
        await s.matches(CHAIN, {"a": 5})
        a.cache.evict(2)
        await s.matches(CHAIN, {"a": 3})
        a.cache.clear()
        await s.matches(CHAIN, {})
        a.cache.use(CHAIN[:4])
        await s.matches(CHAIN, {"a": 4})


async def test_a_broken_stream_is_resumed_without_a_snapshot() -> None:
    async with system() as s, mock_worker() as a:
        follower = s.follow("a", a.address)
        a.cache.use(CHAIN[:2])
        await s.matches(CHAIN, {"a": 2})
        a.cache.break_watches(UnavailableError("network"))
        a.cache.use(CHAIN)
        await s.matches(CHAIN, {"a": 5})
        assert follower.num_resyncs == 0
        assert follower.sequence_number == 2


async def test_pain_10_k_events_lost_from_the_ring_cost_one_snapshot() -> None:
    async with system() as s, mock_worker() as a:
        follower = s.follow("a", a.address)
        a.cache.use(CHAIN)
        await s.matches(CHAIN, {"a": 5})
        a.cache.break_watches(UnavailableError("network"))
        for number in range(2000, 7000):
            a.cache.use([number])
        a.cache.clear()
        a.cache.use(CHAIN[:3])
        await s.matches(CHAIN, {"a": 3})
        assert follower.num_resyncs == 1
        assert (await s.match([2000])) == {}


async def test_a_restarted_worker_is_followed_from_its_new_epoch() -> None:
    async with system() as s:
        async with mock_worker() as first:
            address = first.address
            follower = s.follow("a", address)
            first.cache.use(CHAIN)
            await s.matches(CHAIN, {"a": 5})
            assert follower.epoch == first.epoch
        async with mock_worker(listen=address) as second:
            second.cache.use(CHAIN[:1])
            await s.matches(CHAIN, {"a": 1})
            assert follower.epoch == second.epoch


async def test_the_status_tells_what_each_follower_holds() -> None:
    async with system(max_pages=500) as s, mock_worker() as a:
        s.follow("a", a.address)
        s.follow("gone", "localhost:1")
        a.cache.use(CHAIN)
        await s.matches(CHAIN, {"a": 5})
        status = await s.stub.GetIndexStatus(pb.GetIndexStatusRequest())
        assert (status.num_prefixes, status.max_prefixes) == (5, 500)
        live, gone = status.followers
        assert (live.worker_id, live.epoch, live.state) == ("a", a.epoch, pb.FOLLOWER_STATE_LIVE)
        assert [count.num_pages for count in live.pages] == [5, 0, 0]
        assert (gone.worker_id, gone.epoch, gone.num_resyncs) == ("gone", 0, 0)
        assert gone.state != pb.FOLLOWER_STATE_LIVE


async def test_a_worker_in_no_table_any_more_is_scrubbed_after_the_linger() -> None:
    index = PrefixIndex(1000)
    discovery = Discovery(index, (), linger_s=0.05)
    running = asyncio.create_task(discovery.run())
    async with mock_worker() as a, mock_worker() as b:
        a.cache.use(CHAIN)
        b.cache.use(CHAIN[:2])
        both = [("a", a.address), ("b", b.address)]
        discovery.set_table("scheduler-0", both)
        discovery.set_table("scheduler-1", both)
        await until(lambda: len(index.match(CHAIN).worker_ids) == 2)
        discovery.set_table("scheduler-0", [])
        await asyncio.sleep(0.15)
        assert len(discovery.followers) == 2
        discovery.set_table("scheduler-1", both[1:])
        await until(lambda: index.match(CHAIN).worker_ids == ["b"])
        await until(lambda: index.num_prefixes == 2)
        discovery.set_table("scheduler-1", [])
        discovery.set_table("scheduler-1", both[1:])
        await asyncio.sleep(0.15)
        assert index.match(CHAIN).worker_ids == ["b"]
        running.cancel()
        await asyncio.wait([running])
        assert index.match(CHAIN).worker_ids == []


async def test_pain_10_k_a_scheduler_that_restarts_costs_no_pages() -> None:
    index = PrefixIndex(1000)
    discovery = Discovery(index, (), linger_s=60)
    running = asyncio.create_task(discovery.run())
    async with mock_worker() as a:
        a.cache.use(CHAIN)
        discovery.set_table("scheduler", [("a", a.address)])
        await until(lambda: index.match(CHAIN).worker_ids)
        follower = discovery.followers["a", a.address]
        discovery.set_table("scheduler", [])
        await asyncio.sleep(0.05)
        discovery.set_table("scheduler", [("a", a.address)])
        assert discovery.followers["a", a.address] is follower
        assert list(index.match(CHAIN).gpu_pages) == [5]
        running.cancel()
        await asyncio.wait([running])


@dataclasses.dataclass
class ScriptedWorker(WorkerServiceServicer):
    """Answers the nth watch with the nth script, then waits or ends."""

    scripts: list[list[worker_pb.WatchCacheEventsResponse]]
    hold: bool = True
    requests: list[worker_pb.WatchCacheEventsRequest] = dataclasses.field(default_factory=list)

    async def WatchCacheEvents(
        self, request: worker_pb.WatchCacheEventsRequest, context: Any
    ) -> None:
        self.requests.append(request)
        last = len(self.requests) >= len(self.scripts)
        for response in self.scripts[min(len(self.requests), len(self.scripts)) - 1]:
            await context.write(response)
        if last or self.hold:
            await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def scripted(worker: ScriptedWorker) -> AsyncIterator[str]:
    async with running_server(
        lambda server: add_WorkerServiceServicer_to_server(worker, server),
        [worker_pb.DESCRIPTOR.services_by_name["WorkerService"]],
        "localhost:0",
        grace_s=0,
    ) as server:
        yield f"localhost:{server.port}"


def snapshot(
    pages: dict[int, int], sequence_number: int, *, tier: int = 1, last: bool = True
) -> worker_pb.WatchCacheEventsResponse:
    return worker_pb.WatchCacheEventsResponse(
        epoch=EPOCH,
        snapshot_chunk=worker_pb.CacheSnapshotChunk(
            sequence_number=sequence_number,
            prefix_hashes=pages.keys(),
            parent_hashes=pages.values(),
            tiers=[tier] * len(pages),
            last=last,
        ),
    )


def chain_pages(chain: list[int]) -> dict[int, int]:
    return dict(zip(chain, [ROOT_HASH, *chain], strict=False))


def stored(first: int, *runs: tuple[int, list[int]]) -> worker_pb.WatchCacheEventsResponse:
    events = [
        worker_pb.CacheEvent(
            stored=worker_pb.PagesStored(parent_hash=parent, prefix_hashes=run, tier=1)
        )
        for parent, run in runs
    ]
    batch = worker_pb.CacheEventBatch(first_sequence_number=first, events=events)
    return worker_pb.WatchCacheEventsResponse(epoch=EPOCH, events=batch)


async def test_pain_10_k_a_gap_in_the_numbers_is_noticed_and_healed_by_a_snapshot() -> None:
    worker = ScriptedWorker(
        [
            [snapshot(chain_pages(CHAIN[:1]), 4), stored(6, (CHAIN[0], [CHAIN[1]]))],
            [snapshot(chain_pages(CHAIN), 9)],
        ]
    )
    async with system() as s, scripted(worker) as address:
        follower = s.follow("a", address)
        await s.matches(CHAIN, {"a": 5})
        assert (follower.num_resyncs, follower.sequence_number) == (1, 9)
        assert [request.WhichOneof("start") for request in worker.requests] == ["snapshot"] * 2


async def test_events_told_twice_are_applied_once() -> None:
    worker = ScriptedWorker(
        [
            [
                snapshot(chain_pages(CHAIN[:1]), 4),
                stored(4, (777, [778]), (CHAIN[0], [CHAIN[1]])),
                stored(5, (CHAIN[0], [CHAIN[1]]), (CHAIN[1], [CHAIN[2]])),
            ]
        ]
    )
    async with system() as s, scripted(worker) as address:
        follower = s.follow("a", address)
        await s.matches(CHAIN, {"a": 3})
        assert (follower.num_resyncs, follower.sequence_number) == (0, 6)
        assert s.service.index.num_orphans == 0


async def test_a_snapshot_that_breaks_off_is_taken_again() -> None:
    worker = ScriptedWorker(
        [[snapshot(chain_pages(CHAIN), 4, last=False)], [snapshot(chain_pages(CHAIN[:2]), 5)]],
        hold=False,
    )
    async with system() as s, scripted(worker) as address:
        follower = s.follow("a", address)
        await s.matches(CHAIN, {"a": 2})
        await until(lambda: follower.state == pb.FOLLOWER_STATE_LIVE)
        assert worker.requests[1].WhichOneof("start") == "snapshot"
        await until(lambda: s.service.index.num_prefixes == 2)


async def test_pages_known_before_answer_until_a_new_snapshot_is_complete() -> None:
    worker = ScriptedWorker(
        [
            [snapshot(chain_pages(CHAIN), 4), stored(9, (CHAIN[0], [6]))],
            [snapshot(chain_pages(CHAIN[:2]), 10, last=False)],
        ]
    )
    async with system() as s, scripted(worker) as address:
        s.follow("a", address)
        await until(lambda: len(worker.requests) == 2)
        await until(lambda: s.service.discovery.followers["a", address].num_resyncs == 1)
        await s.matches(CHAIN, {"a": 5})


async def test_tiers_of_a_snapshot_are_told_apart() -> None:
    pages = chain_pages(CHAIN)
    gpu, host = dict(list(pages.items())[:2]), dict(list(pages.items())[2:])
    worker = ScriptedWorker([[snapshot(gpu, 1, last=False), snapshot(host, 1, tier=2)]])
    async with system() as s, scripted(worker) as address:
        s.follow("a", address)
        async with asyncio.timeout(20):
            while await s.match(CHAIN) != {"a": (2, 5, 5)}:
                await asyncio.sleep(0.01)


async def test_pain_10_k_matches_are_answered_while_a_large_snapshot_loads() -> None:
    rng = random.Random(1)
    chains = [[rng.getrandbits(64) | 1 for _ in range(256)] for _ in range(1000)]
    chunks = [
        {
            page: parent
            for chain in chains[start : start + 50]
            for page, parent in chain_pages(chain).items()
        }
        for start in range(0, 1000, 50)
    ]
    worker = ScriptedWorker([[snapshot(chunk, 1, last=chunk is chunks[-1]) for chunk in chunks]])
    async with system() as s, scripted(worker) as address:
        follower = s.follow("a", address)
        answered_before = 0
        async with asyncio.timeout(60):
            while follower.state != pb.FOLLOWER_STATE_LIVE:
                await s.match(chains[0])
                answered_before += follower.state == pb.FOLLOWER_STATE_SNAPSHOT
        assert answered_before >= 10
        assert s.service.index.num_prefixes == 256_000
        assert await s.match(chains[-1]) == {"a": (256, 256, 256)}


async def test_the_process_starts_without_its_peers_and_stops_on_sigterm(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/index.sock"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cache_index", "--listen", address),
        *("--scheduler", f"unix:{tmp_path}/nobody.sock", "--max-pages", "1000"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with open_channel(address) as channel:
            async with asyncio.timeout(30):
                await channel.channel_ready()
            stub = CacheIndexServiceStub(channel)
            status = await stub.GetIndexStatus(pb.GetIndexStatusRequest())
            assert status.max_prefixes == 1000
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            _, log = await process.communicate()
        assert process.returncode == 0
        assert b"event=ready" in log
        assert b"Traceback" not in log
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("argument", ["--max-pages=0", "--no-such-flag=1"])
async def test_a_bad_flag_is_one_line_and_status_2(argument: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cache_index", argument),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 2
    assert argument.split("=")[0].strip("-").replace("-", "_") in (out + err).decode().replace(
        "-", "_"
    )
