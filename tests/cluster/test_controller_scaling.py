"""The controller between a real API server and real schedulers: draining, scaling, rollouts."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from services.scheduler.config import SchedulerConfig
from services.scheduler.service import running_scheduler
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Kubectl
from tests.cluster.worker_sets import (
    CONTROLLER_RULES,
    account,
    events,
    holder,
    running_controller,
    uids,
    worker_set,
)
from tests.fakes.scheduler_peers import RegisteredWorker, make_description, registered_worker

FULL = {"num_running": 64}
IDLE = {"num_running": 0}


class Workers:
    """Registers a worker, at every scheduler, for each pod that is there; it leaves with the pod.

    `load` is what all of them say of themselves; `drained` are those that were told to finish.
    """

    def __init__(self, kubectl: Kubectl, addresses: list[str]) -> None:
        self.load: dict[str, Any] = IDLE
        self.drained: dict[str, str] = {}
        self.num_told = 0
        self._kubectl = kubectl
        self._addresses = addresses
        self._lives: dict[str, asyncio.Task[None]] = {}

    async def follow(self) -> None:
        """For ever: a unit's worker is there once both its pods are."""
        try:
            while True:
                pods = (await asyncio.to_thread(self._kubectl.get, "pods"))["items"]
                found = {
                    pod["metadata"]["uid"]: pod["metadata"]["name"]
                    for pod in pods
                    if pod["metadata"]["name"].endswith("-0") or "app" not in _unit_labels(pod)
                }
                for uid in self._lives.keys() - found.keys():
                    self._lives.pop(uid).cancel()
                for uid, name in found.items():
                    if uid not in self._lives:
                        self._lives[uid] = asyncio.create_task(self._live(name))
                await asyncio.sleep(0.3)
        finally:
            for life in self._lives.values():
                life.cancel()
            await asyncio.gather(*self._lives.values(), return_exceptions=True)

    async def _live(self, name: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            workers: list[RegisteredWorker] = []
            for address in self._addresses:
                description = make_description(name, max_running_sequences=64)
                workers.append(
                    await stack.enter_async_context(registered_worker(address, description))
                )
            readers = [asyncio.create_task(self._read(name, worker)) for worker in workers]
            try:
                while True:
                    is_drained = name in self.drained
                    load = IDLE if is_drained else self.load
                    for worker in workers:
                        worker.load.update({**load, "draining": is_drained})
                    await asyncio.sleep(0.1)
            finally:
                # The next worker of this name is another one.
                self.drained.pop(name, None)
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)

    async def _read(self, name: str, worker: RegisteredWorker) -> None:
        while (response := await worker.read()) is not aio.EOF:
            if response.HasField("drain"):
                self.num_told += 1
                self.drained[name] = response.drain.reason


def _unit_labels(pod: dict[str, Any]) -> dict[str, str]:
    labels: dict[str, str] = pod["metadata"]["labels"]
    return labels if "rhizome.ai/unit" in labels else {}


@contextlib.asynccontextmanager
async def release(
    kubectl: Kubectl, kubeconfig: Path, directory: Path
) -> AsyncIterator[tuple[Workers, list[str]]]:
    """Two schedulers, workers for the pods, and a controller that leads; its log's lines last."""
    async with contextlib.AsyncExitStack() as stack:
        addresses = []
        for _ in range(2):
            config = SchedulerConfig(listen="localhost:0")
            running = await stack.enter_async_context(running_scheduler(config, grace_s=0.0))
            addresses.append(f"localhost:{running.server.port}")
        workers = Workers(kubectl, addresses)
        following = asyncio.create_task(workers.follow())
        flags = [part for address in addresses for part in ("--scheduler", address)]
        program = stack.enter_context(running_controller(directory, kubeconfig, *flags))
        try:
            await until(lambda: holder(kubectl))
            yield workers, addresses
            assert "Traceback" not in program.read_log()
            assert "forbidden" not in program.read_log()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """As the rig's, while this process's servers go on."""
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.2)


def replicas(kubectl: Kubectl, *names: str) -> list[int]:
    return [int(kubectl.get("statefulset", name)["spec"]["replicas"]) for name in names]


def rules(**changes: Any) -> str:
    fields = {"minReplicas": 1, "maxReplicas": 3}
    windows = {"scaleUpWindowSeconds": 0, "scaleDownWindowSeconds": 0}
    return json.dumps({**fields, **windows, **changes})


@pytest.fixture
def kubeconfig(control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path) -> Path:
    return account(control_plane, kubectl, tmp_path, "controller", CONTROLLER_RULES)


async def test_a_group_grows_under_load_and_shrinks_after_it_with_its_last_worker_drained(
    kubectl: Kubectl, kubeconfig: Path, tmp_path: Path
) -> None:
    kubectl.apply(worker_set("w", "small", 1, scaling=rules(maxReplicas=2)))
    async with release(kubectl, kubeconfig, tmp_path) as (workers, _):
        workers.load = FULL
        await until(lambda: len(kubectl.pods()) == 2)
        assert not workers.drained
        workers.load = IDLE
        await until(lambda: replicas(kubectl, "w") == [1])
        assert workers.num_told >= 1, "its worker was told before"
        await until(lambda: list(uids(kubectl, "w")) == ["w-0"])
        messages = events(kubectl, "w", "Scaled")
        assert len(messages) == 2
        assert any("from 1 to 2" in message for message in messages)


async def test_units_are_turned_on_from_the_lowest_and_off_from_the_highest(
    kubectl: Kubectl, kubeconfig: Path, tmp_path: Path
) -> None:
    names = ["u0", "u1", "u2"]
    for unit, name in enumerate(names):
        on = 2 if unit == 0 else 0
        kubectl.apply(worker_set(name, "big", on, unit=unit, nodes=2, scaling=rules()))
    async with release(kubectl, kubeconfig, tmp_path) as (workers, _):
        workers.load = FULL
        await until(lambda: replicas(kubectl, *names) == [2, 2, 0])
        await until(lambda: replicas(kubectl, *names) == [2, 2, 2])
        workers.load = IDLE
        await until(lambda: replicas(kubectl, *names) == [2, 2, 0])
        await until(lambda: replicas(kubectl, *names) == [2, 0, 0])
        for name in names:
            assert not events(kubectl, name, "RanksRestarted")


async def test_a_worker_whose_pod_is_deleted_is_drained_at_every_scheduler(
    kubectl: Kubectl, kubeconfig: Path, tmp_path: Path
) -> None:
    kubectl.apply(
        # Nobody is there to end it, so it stays on its way out.
        worker_set("w", "small", 1, nodeName="no-such-node", terminationGracePeriodSeconds=300)
    )
    async with release(kubectl, kubeconfig, tmp_path) as (workers, addresses):
        await until(lambda: len(kubectl.pods()) == 1)
        await asyncio.sleep(1)
        assert not workers.drained
        await asyncio.to_thread(kubectl, "delete", "pod", "w-0", "--wait=false")
        await until(lambda: workers.num_told == len(addresses))
        assert workers.drained == {"w-0": "pod w-0 is being deleted"}
        await asyncio.sleep(3)
        assert workers.num_told == len(addresses), "once each"


async def test_units_of_an_old_revision_are_drained_and_replaced_one_after_the_other(
    kubectl: Kubectl, kubeconfig: Path, tmp_path: Path
) -> None:
    names = ["u0", "u1"]
    for unit, name in enumerate(names):
        kubectl.apply(worker_set(name, "big", 2, unit=unit, nodes=2))
    for name in names:
        kubectl.until_ready(f"app={name}", 2)
    before = {name: set(uids(kubectl, name).values()) for name in names}
    async with release(kubectl, kubeconfig, tmp_path) as (workers, _):
        patch = json.dumps(
            {"spec": {"template": {"metadata": {"annotations": {"checksum/config": "2"}}}}}
        )
        for name in names:
            await asyncio.to_thread(
                kubectl, "patch", "statefulset", name, "--type=merge", "--patch", patch
            )

        def num_new(name: str) -> int:
            return len(set(uids(kubectl, name).values()) - before[name])

        await until(lambda: num_new("u1") == 2)
        assert num_new("u0") == 0, "the other one serves meanwhile"
        await until(lambda: num_new("u0") == 2)
        assert workers.num_told >= 2
        for name in names:
            (message,) = await asyncio.to_thread(events, kubectl, name, "RanksRestarted")
            assert "old revision" in message


async def test_an_annotation_that_is_wrong_is_told_of_and_the_group_keeps_its_size(
    kubectl: Kubectl, kubeconfig: Path, tmp_path: Path
) -> None:
    kubectl.apply(worker_set("w", "small", 2, scaling=rules(maxReplicas=0)))
    async with release(kubectl, kubeconfig, tmp_path) as (workers, _):
        workers.load = FULL
        await until(lambda: events(kubectl, "w", "AutoscalingRefused"))
        await asyncio.sleep(7)
        (message,) = await asyncio.to_thread(events, kubectl, "w", "AutoscalingRefused")
        assert "maxReplicas" in message
        assert replicas(kubectl, "w") == [2]
