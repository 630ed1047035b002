"""A worker's registration against a scripted scheduler, over real gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rhizome.scheduler.v1 import (
    scheduler_service_pb2 as pb,
    scheduler_service_pb2_grpc as pb_grpc,
)
from rhizome.worker.v1 import worker_service_pb2 as worker_pb
from services.common.rpc import running_server
from tests.fakes.session_client import make_submit
from tests.fakes.worker_bench import EPOCH, Bench, running_bench, until

PROMPT = [5, 6, 7]


class ScriptedScheduler(pb_grpc.SchedulerServiceServicer):
    """Answers every registration with `answers` and keeps what it is told, by stream."""

    def __init__(self) -> None:
        self.answers = [pb.RegisterWorkerResponse(accepted=pb.Accepted(protocol_revision=1))]
        self.descriptions: list[pb.WorkerDescription] = []
        self.reports: list[list[pb.LoadReport]] = []
        self.contexts: list[Any] = []

    async def RegisterWorker(self, request_iterator: Any, context: Any) -> None:
        self.descriptions.append((await context.read()).description)
        reports: list[pb.LoadReport] = []
        self.reports.append(reports)
        self.contexts.append(context)
        for answer in self.answers:
            await context.write(answer)
        if self.answers[-1].HasField("refused"):
            return
        while (request := await context.read()) is not aio.EOF:
            reports.append(request.load)

    def admitted(self, stream: int = -1) -> list[int]:
        return [i for report in self.reports[stream] for i in report.admitted_reservation_ids]

    def ended(self, stream: int = -1) -> list[int]:
        return [i for report in self.reports[stream] for i in report.ended_reservation_ids]


@contextlib.asynccontextmanager
async def serving(scheduler: ScriptedScheduler, address: str) -> AsyncIterator[int]:
    def add(server: aio.Server) -> None:
        pb_grpc.add_SchedulerServiceServicer_to_server(scheduler, server)

    service = pb.DESCRIPTOR.services_by_name["SchedulerService"]
    async with running_server(add, [service], address, grace_s=0.0) as server:
        yield server.port


@pytest.fixture
def scheduler() -> ScriptedScheduler:
    return ScriptedScheduler()


@pytest.fixture
async def bench(scheduler: ScriptedScheduler) -> AsyncIterator[Bench]:
    async with (
        serving(scheduler, "localhost:0") as port,
        running_bench(schedulers=(f"localhost:{port}",)) as running,
    ):
        await until(lambda: bool(scheduler.reports and scheduler.reports[-1]))
        yield running


async def is_serving(bench: Bench) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(bench.channel)
    response = await stub.Check(health_pb2.HealthCheckRequest())
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_worker_says_who_it_is(bench: Bench, scheduler: ScriptedScheduler) -> None:
    (description,) = scheduler.descriptions
    assert (description.worker_id, description.epoch) == ("worker", EPOCH)
    assert description.address == f"localhost:{bench.worker.port}"
    assert description.num_pages == 4096
    assert description.protocol.max_revision == 1
    assert await is_serving(bench)


async def test_load_is_reported_while_nothing_changes(
    bench: Bench, scheduler: ScriptedScheduler
) -> None:
    (reports,) = scheduler.reports
    seen = len(reports)
    await until(lambda: len(reports) >= seen + 2)
    assert [r.sequence_number for r in reports] == list(range(1, len(reports) + 1))
    assert reports[-1].num_free_pages == 4096


async def test_load_and_reservations_are_reported_on_change(
    bench: Bench, scheduler: ScriptedScheduler
) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    bad = make_submit(3, [5000], reservation_id=22)
    await client.submit(
        make_submit(1, PROMPT, max_new_tokens=50, reservation_id=11),
        make_submit(2, PROMPT, max_new_tokens=90, reservation_id=11),
        bad,
    )
    await client.ended()
    await until(lambda: 11 in scheduler.ended())
    assert scheduler.admitted() == [11]
    assert scheduler.ended() == [22, 11]
    running = [report for report in scheduler.reports[0] if report.num_running]
    assert running
    assert running[-1].engine_step_number > 0
    assert running[-1].predicted_step_ns > 0


async def test_what_waits_in_the_worker_is_reported_and_admitted_at_once(
    scheduler: ScriptedScheduler,
) -> None:
    """So a scheduler that charges until then counts it once, never twice."""
    async with (
        serving(scheduler, "localhost:0") as port,
        running_bench(schedulers=(f"localhost:{port}",), max_running=1) as bench,
    ):
        await until(lambda: bool(scheduler.reports and scheduler.reports[-1]))
        bench.engine.step_s = 0.01
        client = bench.client()
        await client.open()
        submits = [
            make_submit(handle, PROMPT, max_new_tokens=20, reservation_id=10 + handle)
            for handle in range(1, 4)
        ]
        await client.submit(*submits)
        await client.ended()
        await until(lambda: len(scheduler.ended()) == 3)
        open_ids: set[int] = set()
        seen_waiting = 0
        for report in scheduler.reports[-1]:
            open_ids |= set(report.admitted_reservation_ids)
            open_ids -= set(report.ended_reservation_ids)
            assert len(open_ids) == report.num_running + report.num_waiting
            seen_waiting = max(seen_waiting, report.num_waiting)
        assert seen_waiting == 2


async def test_a_submit_refused_by_its_lengths_gives_its_reservation_back(
    bench: Bench, scheduler: ScriptedScheduler
) -> None:
    client = bench.client()
    await client.open()
    submit = make_submit(1, PROMPT, reservation_id=22)
    submit.num_token_ids = 1
    await client.submit(submit)
    await client.ended()
    await until(lambda: scheduler.ended() == [22])
    assert scheduler.admitted() == []


async def test_a_new_registration_hears_of_live_reservations_again(
    bench: Bench, scheduler: ScriptedScheduler
) -> None:
    bench.engine.step_s = 0.002
    client = bench.client()
    await client.open()
    (received,) = await client.submit(
        make_submit(1, PROMPT, max_new_tokens=3000, reservation_id=11)
    )
    await until(lambda: 11 in scheduler.admitted())
    with contextlib.suppress(aio.AbortError):
        await scheduler.contexts[0].abort(14, "going away")
    await until(lambda: len(scheduler.reports) == 2 and 11 in scheduler.admitted())
    assert scheduler.admitted(0) == [11]
    assert scheduler.admitted(1) == [11]
    await client.send(cancels=[1])
    await client.ended()
    await until(lambda: 11 in scheduler.ended())
    assert received.finish is not None


async def test_the_cost_model_is_reported_once_it_is_fitted(
    bench: Bench, scheduler: ScriptedScheduler
) -> None:
    client = bench.client()
    await client.open()
    await client.submit(make_submit(1, PROMPT, max_new_tokens=500))
    await client.ended()
    await until(lambda: scheduler.reports[0][-1].HasField("cost_model"))
    assert scheduler.reports[0][-1].cost_model.decode_base_ns >= 0


async def test_a_drained_worker_finishes_and_takes_nothing_new(
    bench: Bench, scheduler: ScriptedScheduler
) -> None:
    drain = pb.RegisterWorkerResponse(drain=pb.Drain(reason="maintenance"))
    await scheduler.contexts[0].write(drain)
    await until(lambda: bench.worker.replica.draining)
    await until(lambda: scheduler.reports[0][-1].draining)
    while await is_serving(bench):
        await asyncio.sleep(0.01)


async def test_a_refused_worker_says_why_and_serves_nobody() -> None:
    scheduler = ScriptedScheduler()
    mismatch = pb.Mismatch(field="page_size", worker_value="16", pool_value="32")
    scheduler.answers = [pb.RegisterWorkerResponse(refused=pb.Refused(mismatches=[mismatch]))]
    async with (
        serving(scheduler, "localhost:0") as port,
        running_bench(schedulers=(f"localhost:{port}",)) as bench,
    ):
        await until(lambda: bool(bench.worker.replica.refusals))
        while await is_serving(bench):
            await asyncio.sleep(0.01)
        info = await bench.stub.GetWorkerInfo(worker_pb.GetWorkerInfoRequest())
        (refusal,) = info.refusals
        assert "page_size is 16, the pool has 32" in refusal


async def test_a_scheduler_that_comes_late_is_found(tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/scheduler.sock"
    scheduler = ScriptedScheduler()
    async with running_bench(schedulers=(address,)) as bench:
        await asyncio.sleep(0.1)
        assert await is_serving(bench)
        async with serving(scheduler, address):
            await until(lambda: bool(scheduler.reports and scheduler.reports[-1]))
