"""Many placements in one call, over real gRPC: the scheduler's side and the gateway's."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc import aio

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from services.common.rpc import open_channel, running_server
from services.gateway.schedule_session import ScheduleSession
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import RunningScheduler, running_scheduler
from tests.fakes.scheduler_peers import make_description, registered_worker

MAX_QUEUED = 3


@pytest.fixture
async def scheduler() -> AsyncIterator[RunningScheduler]:
    config = SchedulerConfig(
        listen="localhost:0", max_queued_requests=MAX_QUEUED, worker_wait_s=0.2
    )
    async with running_scheduler(config, grace_s=0.1) as running:
        yield running


@pytest.fixture
def address(scheduler: RunningScheduler) -> str:
    return f"localhost:{scheduler.server.port}"


@pytest.fixture
async def session(address: str) -> AsyncIterator[ScheduleSession]:
    async with session_to(address) as opened:
        yield opened


@contextlib.asynccontextmanager
async def session_to(address: str) -> AsyncIterator[ScheduleSession]:
    async with open_channel(address) as channel:
        opened = ScheduleSession(pb_grpc.SchedulerServiceStub(channel))
        yield opened
        await opened.aclose()


def _request(name: str, **changes: Any) -> pb.ScheduleRequest:
    fields: dict[str, Any] = {"model": "model", "num_prompt_tokens": 100, "max_new_tokens": 10}
    return pb.ScheduleRequest(request_id=name, **{**fields, **changes})


def _entry(handle: int, name: str) -> pb.ScheduleManyRequest:
    return pb.ScheduleManyRequest(entries=[pb.ScheduleEntry(handle=handle, request=_request(name))])


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def _queue(
    session: ScheduleSession, scheduler: RunningScheduler, number: int
) -> list[asyncio.Task[pb.Placement]]:
    """Requests that wait, in this order, because the only worker is full."""
    tasks = []
    for index in range(number):
        tasks.append(asyncio.create_task(session.place(_request(f"r{index}"))))
        await _until(
            lambda: scheduler.metrics.value("queued_requests", priority="normal") == len(tasks)
        )
    return tasks


async def test_each_request_of_a_call_gets_its_own_placement(
    session: ScheduleSession, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description("w0", epoch=77)):
        requests = [_request(f"r{index}") for index in range(50)]
        placements = await asyncio.gather(*map(session.place, requests))
        assert {(p.worker_id, p.epoch) for p in placements} == {("w0", 77)}
        assert len({p.reservation_id for p in placements}) == 50
        assert await session.place(requests[7]) == placements[7]


async def test_failures_are_those_of_schedule_and_concern_one_request(
    session: ScheduleSession, address: str, scheduler: RunningScheduler
) -> None:
    with pytest.raises(UnavailableError, match="no worker has registered"):
        await session.place(_request("early"))
    async with registered_worker(address, make_description()) as worker:
        good = asyncio.create_task(session.place(_request("good")))
        with pytest.raises(NotFoundError):
            await session.place(_request("r", model="other"))
        with pytest.raises(InvalidRequestError) as bad:
            await session.place(_request("r", prefix_hashes=[1] * 101))
        assert bad.value.param == "prefix_hashes"
        assert (await good).worker_id == "w0"
        await worker.report(num_running=64, num_free_pages=0)
        waiting = await _queue(session, scheduler, MAX_QUEUED)
        with pytest.raises(OverloadedError) as full:
            await session.place(_request("one_more"))
        assert full.value.retry_after_s >= 1
        assert not any(task.done() for task in waiting)


async def test_a_waiting_request_hears_its_position(address: str) -> None:
    async with registered_worker(address, make_description()) as worker:
        await worker.report(num_running=64, num_free_pages=0)
        async with open_channel(address) as channel:
            call = pb_grpc.SchedulerServiceStub(channel).ScheduleMany()
            await call.write(_entry(5, "r5"))
            [answer] = (await call.read()).answers
            assert (answer.handle, answer.WhichOneof("event")) == (5, "queued")
            await worker.report(num_running=0, num_free_pages=10_000)
            [answer] = (await call.read()).answers
            assert (answer.handle, answer.WhichOneof("event")) == (5, "placed")


async def test_cancelling_one_request_gives_its_place_to_the_next(
    session: ScheduleSession, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description()) as worker:
        await worker.report(num_running=64, num_free_pages=0)
        first, second = await _queue(session, scheduler, 2)
        first.cancel()
        await _until(lambda: scheduler.metrics.value("queued_requests", priority="normal") == 1)
        await worker.report(num_running=0, num_free_pages=10_000)
        assert (await second).worker_id == "w0"
        assert scheduler.metrics.value("reservations") == 1


async def test_the_end_of_a_call_gives_all_its_places_back(
    address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description()) as worker:
        await worker.report(num_running=64, num_free_pages=0)
        async with session_to(address) as session:
            waiting = await _queue(session, scheduler, 2)
        for task in waiting:
            with pytest.raises(UnavailableError):
                await task
        await _until(lambda: scheduler.metrics.value("queued_requests", priority="normal") == 0)


async def test_a_handle_cannot_be_used_twice(address: str) -> None:
    async with registered_worker(address, make_description()), open_channel(address) as channel:
        call = pb_grpc.SchedulerServiceStub(channel).ScheduleMany()
        await call.write(_entry(1, "first"))
        await call.read()
        await call.write(_entry(1, "again"))
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_next_request_reaches_a_scheduler_that_came_back() -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(contextlib.AsyncExitStack())
        config = SchedulerConfig(listen="localhost:0")
        running = await first.enter_async_context(running_scheduler(config, grace_s=0))
        address = f"localhost:{running.server.port}"
        session = await stack.enter_async_context(session_to(address))
        async with registered_worker(address, make_description(), silent=True):
            assert (await session.place(_request("before"))).worker_id == "w0"
            await first.aclose()
            with pytest.raises(UnavailableError):
                await session.place(_request("gone"))
        await stack.enter_async_context(
            running_scheduler(SchedulerConfig(listen=address), grace_s=0)
        )
        channel = await stack.enter_async_context(open_channel(address))
        await channel.channel_ready()
        await stack.enter_async_context(registered_worker(address, make_description("w1")))
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(UnavailableError):
                    assert (await session.place(_request("after"))).worker_id == "w1"
                    break
                await asyncio.sleep(0.05)


class DeafScheduler(pb_grpc.SchedulerServiceServicer):
    """Places requests named `placed...` again and again, and says nothing of any other."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def ScheduleMany(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        self.num_calls += 1
        async for message in request_iterator:
            for entry in message.entries:
                if entry.request.request_id.startswith("placed"):
                    answer = pb.ScheduleAnswer(handle=entry.handle, placed=pb.Placement())
                    await context.write(pb.ScheduleManyResponse(answers=[answer]))


@pytest.fixture
async def deaf() -> AsyncIterator[tuple[DeafScheduler, ScheduleSession]]:
    servicer = DeafScheduler()

    def add(server: aio.Server) -> None:
        pb_grpc.add_SchedulerServiceServicer_to_server(servicer, server)

    service = pb.DESCRIPTOR.services_by_name["SchedulerService"]
    async with running_server(add, [service], "localhost:0", grace_s=0) as server:
        async with session_to(f"localhost:{server.port}") as session:
            yield servicer, session


async def test_a_silent_scheduler_is_given_up_and_called_anew(
    deaf: tuple[DeafScheduler, ScheduleSession],
) -> None:
    servicer, session = deaf
    silent = [asyncio.create_task(session.place(_request(f"r{i}"))) for i in range(3)]
    for task in silent:
        with pytest.raises(UnavailableError, match="says nothing"):
            await task
    assert servicer.num_calls == 1
    await session.place(_request("placed"))
    assert servicer.num_calls == 2


async def test_silence_about_one_request_leaves_the_others_their_call(
    deaf: tuple[DeafScheduler, ScheduleSession],
) -> None:
    servicer, session = deaf
    silent = asyncio.create_task(session.place(_request("r")))
    while not silent.done():
        await session.place(_request("placed"))
        await asyncio.sleep(0.05)
    with pytest.raises(UnavailableError, match="nothing of it"):
        await silent
    assert servicer.num_calls == 1
