"""Workers and watchers of the scheduler over real gRPC: refusals, leases, drains, the table."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from rhizome.common.v1.pool_identity_pb2 import ProtocolRange
from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.rpc import open_channel
from services.gateway.control_plane import ControlPlane
from services.gateway.metrics import GatewayMetrics
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import RunningScheduler, running_scheduler
from tests.fakes.scheduler_peers import make_description, registered_worker


@pytest.fixture
async def scheduler() -> AsyncIterator[RunningScheduler]:
    config = SchedulerConfig(listen="localhost:0", lease_s=2.0)
    async with running_scheduler(config, grace_s=0.1) as running:
        yield running


@pytest.fixture
def address(scheduler: RunningScheduler) -> str:
    return f"localhost:{scheduler.server.port}"


@pytest.fixture
async def stub(address: str) -> AsyncIterator[Any]:
    async with open_channel(address) as channel:
        yield pb_grpc.SchedulerServiceStub(channel)


async def _first_answer(stub: Any, message: pb.RegisterWorkerRequest) -> Any:
    call = stub.RegisterWorker()
    await call.write(message)
    return await call.read()


async def _refused_fields(stub: Any, description: pb.WorkerDescription) -> set[str]:
    answer = await _first_answer(stub, pb.RegisterWorkerRequest(description=description))
    assert answer.HasField("refused")
    return {mismatch.field for mismatch in answer.refused.mismatches}


async def _next_table(watch: Any) -> pb.WatchWorkersResponse:
    async with asyncio.timeout(20):
        while (response := await watch.read()).unchanged:
            pass
    assert isinstance(response, pb.WatchWorkersResponse)
    return response


async def _table_with(watch: Any, expected: dict[str, Any]) -> pb.WatchWorkersResponse:
    """The first table whose workers are in these states."""
    while True:
        table = await _next_table(watch)
        states = {worker.worker_id: worker.state for pool in table.pools for worker in pool.workers}
        if states == expected:
            return table


READY, DRAINING, SUSPECT = (
    pb.WORKER_STATE_READY,
    pb.WORKER_STATE_DRAINING,
    pb.WORKER_STATE_SUSPECT,
)


async def test_pain_07_p_a_refusal_names_and_counts_every_differing_field(
    stub: Any, address: str, scheduler: RunningScheduler
) -> None:
    async with registered_worker(address, make_description("w0")):
        stranger = make_description(
            "w1",
            identity={
                "served_model_name": "other",
                "model_revision": "r2",
                "tokenizer_digest": "t2",
                "template_digest": "c2",
                "page_size": 32,
                "hash_version": 2,
            },
            protocol=ProtocolRange(min_revision=8, max_revision=9),
        )
        fields = {
            "served_model_name",
            "model_revision",
            "tokenizer_digest",
            "template_digest",
            "page_size",
            "hash_version",
            "protocol",
        }
        assert await _refused_fields(stub, stranger) == fields
        for field in fields:
            assert scheduler.metrics.value("registrations_refused_total", field=field) == 1


async def test_declared_pools_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "pools.json"
    path.write_text(
        json.dumps([{"served_model_name": "a", "page_size": 16}, {"served_model_name": "b"}])
    )
    config = SchedulerConfig(listen="localhost:0", pools=path)
    async with running_scheduler(config, grace_s=0.1) as scheduler:
        address = f"localhost:{scheduler.server.port}"
        async with (
            open_channel(address) as channel,
            registered_worker(address, make_description("b0", identity={"served_model_name": "b"})),
        ):
            stub: Any = pb_grpc.SchedulerServiceStub(channel)
            unknown = make_description("x", identity={"served_model_name": "c"})
            assert await _refused_fields(stub, unknown) == {"served_model_name"}
            bad_page = make_description("x", identity={"served_model_name": "a", "page_size": 8})
            assert await _refused_fields(stub, bad_page) == {"page_size"}
            table = await _next_table(stub.WatchWorkers(pb.WatchWorkersRequest()))
            assert [pool.identity.served_model_name for pool in table.pools] == ["b"]
            assert list(table.awaited_models) == ["a"]


async def test_a_restarted_scheduler_takes_no_model_from_a_gateway(tmp_path: Path) -> None:
    pools = tmp_path / "pools.json"
    pools.write_text(json.dumps([{"served_model_name": "a"}, {"served_model_name": "b"}]))
    address = f"unix:{tmp_path}/scheduler.sock"
    config = SchedulerConfig(listen=address, pools=pools)
    a, b = (
        make_description(f"{name}0", identity={"served_model_name": name}) for name in ("a", "b")
    )
    control = ControlPlane([address], GatewayMetrics())
    async with control.following(), asyncio.timeout(30):
        async with (
            running_scheduler(config, grace_s=0.1),
            registered_worker(address, a),
            registered_worker(address, b),
        ):
            while len(control.table.workers()) < 2:
                await asyncio.sleep(0.01)
        async with running_scheduler(config, grace_s=0.1), registered_worker(address, a) as a0:
            await a0.report(num_running=3)
            while [worker.num_running for worker in control.table.workers("a")] != [3]:
                await asyncio.sleep(0.01)
            assert control.table.model("b").name == "b"
            asked = pb.ScheduleRequest(request_id="r", model="b", num_choices=1)
            placing = asyncio.create_task(control.schedule(asked))
            async with registered_worker(address, b):
                assert (await placing).worker_id == "b0"


@pytest.mark.parametrize(
    "message",
    [
        pb.RegisterWorkerRequest(load=pb.LoadReport()),
        pb.RegisterWorkerRequest(description=make_description("")),
        pb.RegisterWorkerRequest(description=make_description(identity={"page_size": 0})),
    ],
)
async def test_a_registration_must_say_who_it_is(
    stub: Any, message: pb.RegisterWorkerRequest
) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await _first_answer(stub, message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_table_shows_workers_come_change_and_go(stub: Any, address: str) -> None:
    watch = stub.WatchWorkers(pb.WatchWorkersRequest())
    empty = await _next_table(watch)
    assert not empty.pools
    async with registered_worker(address, make_description("w0", context_length=500)):
        table = await _table_with(watch, {"w0": READY})
        assert table.table_version > empty.table_version
        assert (table.pools[0].context_length, table.pools[0].vocab_size) == (500, 1000)
        async with registered_worker(address, make_description("w1")) as other:
            await _table_with(watch, {"w0": READY, "w1": READY})
            await other.report(num_running=7, num_waiting=2)
            workers = (await _next_table(watch)).pools[0].workers
            assert (workers[1].num_running, workers[1].num_waiting) == (7, 2)
            await other.leave()
            await _table_with(watch, {"w0": READY})
    table = await _table_with(watch, {})
    assert table.pools[0].identity.served_model_name == "model"
    assert table.pools[0].context_length == 500


async def test_an_unchanged_table_is_marked_so(stub: Any, address: str) -> None:
    async with registered_worker(address, make_description("w0")):
        watch = stub.WatchWorkers(pb.WatchWorkersRequest())
        table = await _table_with(watch, {"w0": READY})
        marker = await watch.read()
    assert marker.unchanged
    assert not marker.pools
    assert marker.table_version == table.table_version


async def test_a_dropped_stream_removes_the_worker(stub: Any, address: str) -> None:
    watch = stub.WatchWorkers(pb.WatchWorkersRequest())
    async with registered_worker(address, make_description("w0")) as worker:
        await _table_with(watch, {"w0": READY})
        worker.vanish()
        await _table_with(watch, {})


async def test_a_silent_worker_is_suspect_then_gone(stub: Any, address: str) -> None:
    watch = stub.WatchWorkers(pb.WatchWorkersRequest())
    async with registered_worker(address, make_description("w0"), silent=True) as worker:
        await _table_with(watch, {"w0": READY})
        await _table_with(watch, {"w0": SUSPECT})
        await _table_with(watch, {})
        with pytest.raises(aio.AioRpcError) as caught:
            await worker.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_restarted_worker_replaces_its_old_registration(stub: Any, address: str) -> None:
    watch = stub.WatchWorkers(pb.WatchWorkersRequest())
    async with registered_worker(address, make_description("w0", epoch=1), silent=True) as old:
        async with registered_worker(address, make_description("w0", epoch=2)):
            with pytest.raises(aio.AioRpcError) as caught:
                await old.read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            table = await _table_with(watch, {"w0": READY})
            while [worker.epoch for worker in table.pools[0].workers] != [2]:
                table = await _next_table(watch)


async def test_a_draining_worker_is_asked_and_gets_nothing_new(stub: Any, address: str) -> None:
    watch = stub.WatchWorkers(pb.WatchWorkersRequest())
    async with (
        registered_worker(address, make_description("w0")) as worker,
        registered_worker(address, make_description("w1")),
    ):
        for _ in range(2):
            await stub.DrainWorker(pb.DrainWorkerRequest(worker_id="w0", reason="upgrade"))
        assert (await worker.read()).drain.reason == "upgrade"
        await _table_with(watch, {"w0": DRAINING, "w1": READY})
        for index in range(6):
            request = pb.ScheduleRequest(
                request_id=f"r{index}", model="model", num_prompt_tokens=10
            )
            async for response in stub.Schedule(request):
                assert response.placed.worker_id == "w1"


async def test_draining_a_stranger_is_not_found(stub: Any) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.DrainWorker(pb.DrainWorkerRequest(worker_id="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
