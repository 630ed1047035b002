"""A pool with one worker: nobody waits for the index, and its answer still counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.rpc import open_channel
from services.gateway.schedule_session import ScheduleSession
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import RunningScheduler, running_scheduler
from tests.fakes.scheduler_peers import (
    PAGE_SIZE,
    FakeIndex,
    make_description,
    registered_worker,
    running_index,
)

NUM_PAGES = 10


@dataclass
class Fixture:
    index: FakeIndex
    scheduler: RunningScheduler
    stub: pb_grpc.SchedulerServiceAsyncStub
    session: ScheduleSession

    async def end(self, placed: pb.Placement) -> float:
        """Report the placement's end; returns all cached tokens that were predicted."""
        outcome = pb.RequestOutcome(reservation_id=placed.reservation_id)
        await self.stub.ReportRequests(pb.ReportRequestsRequest(outcomes=[outcome]))
        return self.scheduler.metrics.value("predicted_cached_tokens_total")


def _request(name: str) -> pb.ScheduleRequest:
    return pb.ScheduleRequest(
        request_id=name,
        model="model",
        prefix_hashes=list(range(1, NUM_PAGES + 1)),
        num_prompt_tokens=NUM_PAGES * PAGE_SIZE + 1,
    )


@contextlib.asynccontextmanager
async def system(num_workers: int) -> AsyncIterator[Fixture]:
    """Workers of whom the first holds the prompt's first four pages, as the index knows."""
    index = FakeIndex()
    index.pages[1] = {"w0": 4}
    async with contextlib.AsyncExitStack() as stack:
        index_address = await stack.enter_async_context(running_index(index))
        config = SchedulerConfig(listen="localhost:0", cache_index=index_address)
        scheduler = await stack.enter_async_context(
            running_scheduler(config, grace_s=0.1, match_deadline_s=5.0)
        )
        address = f"localhost:{scheduler.server.port}"
        for number in range(num_workers):
            await stack.enter_async_context(
                registered_worker(address, make_description(f"w{number}"))
            )
        channel = await stack.enter_async_context(open_channel(address))
        stub: pb_grpc.SchedulerServiceAsyncStub = pb_grpc.SchedulerServiceStub(channel)
        session = ScheduleSession(stub)
        stack.push_async_callback(session.aclose)
        yield Fixture(index, scheduler, stub, session)


async def test_the_only_worker_is_answered_before_the_index_answers() -> None:
    async with system(1) as s:
        s.index.hangs = True
        async with asyncio.timeout(4):
            assert (await s.session.place(_request("r"))).worker_id == "w0"


async def test_what_the_index_says_later_corrects_the_prediction() -> None:
    async with system(1) as s:
        # A call of its own ends when nothing is left to be learned.
        [response] = [response async for response in s.stub.Schedule(_request("r"))]
        assert response.placed.predicted_cached_tokens == 0
        assert await s.end(response.placed) == 4 * PAGE_SIZE


async def test_with_two_workers_the_index_is_asked_first() -> None:
    async with system(2) as s:
        placed = await s.session.place(_request("r"))
        assert (placed.worker_id, placed.predicted_cached_tokens) == ("w0", 4 * PAGE_SIZE)
