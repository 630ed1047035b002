"""The controller's calls to schedulers, over real gRPC."""

from __future__ import annotations

import contextlib
from pathlib import Path

from services.common.peer_tls import peer_tls
from services.controller.metrics import ControllerMetrics
from services.controller.schedulers import Schedulers
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import running_scheduler
from tests.fakes.certificates import Authority, files_of
from tests.fakes.gateway_stack import until
from tests.fakes.scheduler_peers import make_description, registered_worker

NOBODY = "localhost:1"


async def test_every_scheduler_that_answers_is_asked_and_told() -> None:
    async with contextlib.AsyncExitStack() as stack:
        addresses, workers = [], []
        for num_running in (4, 8):
            running = await stack.enter_async_context(
                running_scheduler(SchedulerConfig(listen="localhost:0"), grace_s=0.0)
            )
            addresses.append(f"localhost:{running.server.port}")
            description = make_description("w0", max_running_sequences=16)
            worker = await stack.enter_async_context(registered_worker(addresses[-1], description))
            await worker.report(num_running=num_running)
            workers.append(worker)
            await until(lambda m=running.metrics: m.value("saturation", model="model"))
        metrics = ControllerMetrics()
        schedulers = Schedulers([*addresses, NOBODY], metrics)
        await stack.enter_async_context(schedulers.connected())

        loads = await schedulers.loads()
        assert loads is not None
        pool = loads.pool_of(["w0"])
        assert pool is not None
        assert pool.saturation == 0.5, "the busiest answer"
        assert pool.workers["w0"].num_requests == 8
        assert metrics.value("scheduler_failures_total") == 1

        done = await schedulers.drain("w0", "test", schedulers.addresses)
        assert done == set(addresses)
        for worker in workers:
            assert (await worker.read()).drain.reason == "test"
        loads = await schedulers.loads()
        assert loads is not None
        load = loads.worker("w0")
        assert load is not None
        assert (load.is_ready, load.is_draining) == (False, True)


async def test_a_worker_that_nobody_knows_needs_no_draining() -> None:
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(
            running_scheduler(SchedulerConfig(listen="localhost:0"), grace_s=0.0)
        )
        address = f"localhost:{running.server.port}"
        schedulers = Schedulers([address], ControllerMetrics())
        await stack.enter_async_context(schedulers.connected())
        assert await schedulers.drain("nobody", "test", [address]) == {address}


async def test_without_an_answer_nothing_is_known() -> None:
    metrics = ControllerMetrics()
    schedulers = Schedulers([NOBODY], metrics)
    async with schedulers.connected():
        assert await schedulers.loads() is None
        assert await schedulers.drain("w0", "test", [NOBODY]) == set()
        assert metrics.value("drains_total") == 0


async def test_a_scheduler_that_wants_certificates_is_shown_one(tmp_path: Path) -> None:
    authority = Authority()
    theirs = files_of(tmp_path / "scheduler", authority)
    ours = files_of(tmp_path / "controller", authority)
    config = SchedulerConfig(listen="localhost:0", tls=theirs.flags())
    async with running_scheduler(config, grace_s=0.0) as running, peer_tls(ours.flags()) as tls:
        address = f"localhost:{running.server.port}"
        async with Schedulers([address], ControllerMetrics(), tls).connected() as schedulers:
            assert await schedulers.loads() is not None
        async with Schedulers([address], ControllerMetrics()).connected() as schedulers:
            assert await schedulers.loads() is None
