"""The scheduler over real gRPC: placement, queueing, idempotency, balance."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.errors import OverloadedError, error_from_rpc
from services.common.rpc import open_channel
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import RunningScheduler, running_scheduler
from tests.fakes.scheduler_peers import (
    PAGE_SIZE,
    FakeIndex,
    RegisteredWorker,
    make_description,
    registered_worker,
    running_index,
)


def _config(**changes: Any) -> SchedulerConfig:
    fields: dict[str, Any] = {"listen": "localhost:0", "max_queued_requests": 3}
    return SchedulerConfig(**{**fields, "worker_wait_s": 0.2, **changes})


@pytest.fixture
async def scheduler() -> AsyncIterator[RunningScheduler]:
    async with running_scheduler(_config(), grace_s=0.1) as running:
        yield running


@pytest.fixture
def address(scheduler: RunningScheduler) -> str:
    return f"localhost:{scheduler.server.port}"


@pytest.fixture
async def stub(address: str) -> AsyncIterator[Any]:
    async with open_channel(address) as channel:
        yield pb_grpc.SchedulerServiceStub(channel)


def _request(name: str = "r", **changes: Any) -> pb.ScheduleRequest:
    fields: dict[str, Any] = {"model": "model", "num_prompt_tokens": 100, "max_new_tokens": 10}
    return pb.ScheduleRequest(request_id=name, **{**fields, **changes})


async def _place(stub: Any, name: str = "r", **changes: Any) -> pb.Placement:
    """The placement, whatever was said before it."""
    async for response in stub.Schedule(_request(name, **changes)):
        if response.HasField("placed"):
            placed = response.placed
    return placed


async def _last_event(call: Any) -> pb.ScheduleResponse:
    """The last of a stream that has begun to be read; only it may place."""
    last = await call.read()
    while (response := await call.read()) is not aio.EOF:
        assert last.HasField("queued")
        last = response
    assert isinstance(last, pb.ScheduleResponse)
    return last


async def _fill(stub: Any, worker: RegisteredWorker) -> None:
    """Leave the only worker no room, and be sure that the scheduler knows."""
    await worker.report(num_running=64, num_free_pages=0)
    async for table in stub.WatchWorkers(pb.WatchWorkersRequest()):
        if any(entry.num_running == 64 for pool in table.pools for entry in pool.workers):
            return


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def _failure(stub: Any, name: str = "r", **changes: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await _place(stub, name, **changes)
    return caught.value


async def test_a_request_is_placed_on_the_worker_that_registered(stub: Any, address: str) -> None:
    async with registered_worker(address, make_description("w0", epoch=77)):
        placed = await _place(stub)
    assert (placed.worker_id, placed.address, placed.epoch) == ("w0", "localhost:w0", 77)
    assert placed.reservation_id != 0
    assert placed.policy == "prefix_load/cold"


async def test_a_waiting_request_hears_its_position_and_then_its_placement(
    stub: Any, address: str
) -> None:
    async with registered_worker(address, make_description()) as worker:
        await _fill(stub, worker)
        first = stub.Schedule(_request("first"))
        assert (await first.read()).queued.position == 0
        second = stub.Schedule(_request("second"))
        assert (await second.read()).queued.position == 1
        assert (await second.read()).queued.position == 1
        await worker.report(num_running=0, num_free_pages=10_000)
        for call in (first, second):
            placed = (await _last_event(call)).placed
            assert placed.worker_id == "w0"
            assert placed.queued_for.ToNanoseconds() > 0


async def test_the_same_attempt_gets_the_same_placement(stub: Any, address: str) -> None:
    async with registered_worker(address, make_description()):
        first = await _place(stub, "r")
        assert await _place(stub, "r") == first
        assert (await _place(stub, "r", attempt=1)).reservation_id != first.reservation_id


async def test_two_callers_of_a_waiting_attempt_get_one_placement(
    stub: Any, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description()) as worker:
        await _fill(stub, worker)
        calls = [stub.Schedule(_request("r")) for _ in range(2)]
        for call in calls:
            assert (await call.read()).queued.position == 0
        await worker.report(num_running=0, num_free_pages=10_000)
        placements = [(await _last_event(call)).placed for call in calls]
    assert placements[0] == placements[1]


async def test_cancelling_in_the_queue_gives_the_place_back(
    stub: Any, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description()) as worker:
        await _fill(stub, worker)
        first = stub.Schedule(_request("first"))
        await first.read()
        second = stub.Schedule(_request("second"))
        assert (await second.read()).queued.position == 1
        first.cancel()
        await _until(lambda: scheduler.metrics.value("queued_requests", priority="normal") == 1)
        await worker.report(num_running=0, num_free_pages=10_000)
        assert (await _last_event(second)).HasField("placed")
    await _until(lambda: scheduler.metrics.value("reservations") == 0)


async def test_cancelling_after_the_placement_leaves_the_reservation_alone(
    stub: Any, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description()):
        call = stub.Schedule(_request())
        placed = (await call.read()).placed
        call.cancel()
        assert (await _place(stub)).reservation_id == placed.reservation_id
        assert scheduler.metrics.value("reservations_charged") == 1


async def test_a_full_queue_refuses_with_a_retry_hint(stub: Any, address: str) -> None:
    async with registered_worker(address, make_description()) as worker:
        await _fill(stub, worker)
        calls = [stub.Schedule(_request(f"r{index}")) for index in range(3)]
        for call in calls:
            await call.read()
        error = error_from_rpc(await _failure(stub, "one_more"))
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s >= 1
        for call in calls:
            call.cancel()


async def test_remaining_time_ends_the_wait(stub: Any, address: str) -> None:
    async with registered_worker(address, make_description()) as worker:
        await _fill(stub, worker)
        error = await _failure(stub, remaining=Duration(nanos=100_000_000))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_unknown_models_and_bad_requests_say_so(stub: Any, address: str) -> None:
    assert (await _failure(stub)).code() is grpc.StatusCode.UNAVAILABLE
    async with registered_worker(address, make_description(context_length=100)):
        assert (await _failure(stub, model="other")).code() is grpc.StatusCode.NOT_FOUND
        for changes in ({"name": ""}, {"prefix_hashes": [1] * 101}, {"num_prompt_tokens": 100}):
            assert (await _failure(stub, **changes)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_without_a_worker_a_request_is_unavailable(stub: Any, address: str) -> None:
    async with registered_worker(address, make_description()):
        error = await _failure(stub, excluded_worker_ids=["w0"])
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (await _place(stub)).worker_id == "w0"


async def test_a_burst_with_one_new_prefix_stays_together(stub: Any, address: str) -> None:
    hashes = list(range(1, 65))
    async with (
        registered_worker(address, make_description("w0")),
        registered_worker(address, make_description("w1")),
    ):
        placements = await asyncio.gather(
            *(
                _place(stub, f"r{i}", prefix_hashes=hashes, num_prompt_tokens=64 * PAGE_SIZE + 1)
                for i in range(8)
            )
        )
    assert len({placed.worker_id for placed in placements}) == 1
    assert max(placed.predicted_cached_tokens for placed in placements) == 64 * PAGE_SIZE


async def test_admitted_and_ended_reservations_leave_the_balance_at_zero(
    stub: Any, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description()) as worker:
        ids = [(await _place(stub, f"r{index}")).reservation_id for index in range(5)]
        assert scheduler.metrics.value("reservations_charged") == 5
        await worker.report(admitted=ids, num_running=5)
        await _until(lambda: scheduler.metrics.value("reservations_charged") == 0)
        assert scheduler.metrics.value("reservations") == 5
        await worker.report(ended=ids[:3], num_running=2)
        await _until(lambda: scheduler.metrics.value("reservations") == 2)
        outcomes = [pb.RequestOutcome(reservation_id=reservation_id) for reservation_id in ids]
        await stub.ReportRequests(pb.ReportRequestsRequest(outcomes=outcomes))
        assert scheduler.metrics.value("reservations") == 0


async def test_reports_compare_predicted_with_actual_cached_tokens(
    stub: Any, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description()):
        hashes = [1, 2, 3, 4]
        await _place(stub, "first", prefix_hashes=hashes)
        placed = await _place(stub, "second", prefix_hashes=hashes)
    assert placed.predicted_cached_tokens == 4 * PAGE_SIZE
    outcome = pb.RequestOutcome(
        reservation_id=placed.reservation_id, num_prompt_tokens=100, cached_tokens=48
    )
    # Its worker left, and still the prediction is known.
    await stub.ReportRequests(pb.ReportRequestsRequest(outcomes=[outcome]))
    assert scheduler.metrics.value("predicted_cached_tokens_total") == 64
    assert scheduler.metrics.value("actual_cached_tokens_total") == 48


async def test_the_index_says_who_holds_a_prefix() -> None:
    index = FakeIndex()
    index.pages[1] = {"w1": 40, "w0": 3}
    async with (
        running_index(index) as index_address,
        running_scheduler(
            _config(cache_index=index_address), grace_s=0.1, match_deadline_s=5.0
        ) as scheduler,
        open_channel(f"localhost:{scheduler.server.port}") as channel,
        registered_worker(f"localhost:{scheduler.server.port}", make_description("w0")),
        registered_worker(f"localhost:{scheduler.server.port}", make_description("w1")),
    ):
        stub: Any = pb_grpc.SchedulerServiceStub(channel)
        placements = await asyncio.gather(
            *(
                _place(
                    stub, f"r{i}", prefix_hashes=list(range(1, 51)), num_prompt_tokens=50 * 16 + 1
                )
                for i in range(3)
            )
        )
    assert {placed.worker_id for placed in placements} == {"w1"}
    assert min(placed.predicted_cached_tokens for placed in placements) == 40 * PAGE_SIZE


@pytest.mark.parametrize("state", ["hung", "down"])
async def test_a_silent_index_never_keeps_a_request_from_its_worker(state: str) -> None:
    index = FakeIndex()
    index.hangs = True
    async with running_index(index) as index_address:
        target = index_address if state == "hung" else "localhost:1"
        async with (
            running_scheduler(_config(cache_index=target), grace_s=0.1) as scheduler,
            open_channel(f"localhost:{scheduler.server.port}") as channel,
            registered_worker(f"localhost:{scheduler.server.port}", make_description("w0")),
        ):
            stub: Any = pb_grpc.SchedulerServiceStub(channel)
            for i in range(10):
                placed = await _place(stub, f"r{i}", num_prompt_tokens=16, prefix_hashes=[i + 1])
                assert placed.worker_id == "w0"
            value = scheduler.metrics.value
            assert value("index_failures_total") == 3
            assert value("index_skipped_total") == 7


async def test_an_index_that_is_back_is_asked_again() -> None:
    index = FakeIndex()
    index.hangs = True
    async with (
        running_index(index) as index_address,
        running_scheduler(_config(cache_index=index_address), grace_s=0.1) as scheduler,
        open_channel(f"localhost:{scheduler.server.port}") as channel,
        registered_worker(f"localhost:{scheduler.server.port}", make_description("w0")),
    ):
        stub: Any = pb_grpc.SchedulerServiceStub(channel)
        for i in range(4):
            await _place(stub, f"r{i}", num_prompt_tokens=16, prefix_hashes=[i + 1])
        assert scheduler.metrics.value("index_skipped_total") == 1
        index.hangs = False
        asked, i = index.num_chains, 4
        async with asyncio.timeout(20):
            while index.num_chains == asked:
                await asyncio.sleep(0.1)
                await _place(stub, f"r{i}", num_prompt_tokens=16, prefix_hashes=[i + 1])
                i += 1
