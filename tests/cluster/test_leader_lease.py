"""Schedulers that lead by a Lease of a real API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from services.common.kubernetes_api import open_kubernetes
from services.common.kubernetes_lease import KubernetesLease
from services.common.lease import LeaseUnknownError
from services.scheduler.config import SchedulerConfig
from services.scheduler.leadership import Leadership
from services.scheduler.service import RunningScheduler, running_scheduler
from tests.cluster.control_plane import ControlPlane, running_control_plane
from tests.cluster.kubectl import Kubectl
from tests.cluster.worker_sets import account, holder, in_namespace, lease_rules
from tests.fakes.scheduler_peers import make_description, registered_worker

NAME = "scheduler-leader"


@pytest.fixture
def kubeconfig(control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path) -> Path:
    return account(control_plane, kubectl, tmp_path, "scheduler", lease_rules(NAME))


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


async def test_of_two_schedulers_one_leads_and_the_other_follows_it(
    kubectl: Kubectl, kubeconfig: Path
) -> None:
    config = SchedulerConfig(listen="localhost:0", leader_lease=NAME, kubeconfig=kubeconfig)
    async with contextlib.AsyncExitStack() as outer:
        stacks: list[contextlib.AsyncExitStack] = []
        schedulers: list[RunningScheduler] = []
        for _ in range(2):
            stack = await outer.enter_async_context(contextlib.AsyncExitStack())
            running = await stack.enter_async_context(running_scheduler(config, grace_s=0.0))
            address = f"localhost:{running.server.port}"
            await stack.enter_async_context(registered_worker(address, make_description()))
            stacks.append(stack)
            schedulers.append(running)

        def leaders() -> list[int]:
            return [i for i, each in enumerate(schedulers) if each.metrics.value("leads")]

        await until(lambda: len(leaders()) == 1)
        (first,) = leaders()
        held_by = await asyncio.to_thread(holder, kubectl, NAME)
        assert held_by
        # Who ends leaves it to the other, which need not wait for it to run out.
        await stacks[first].aclose()
        await until(lambda: leaders() == [1 - first], timeout_s=8.0)
        lease = await asyncio.to_thread(kubectl.get, "lease", NAME)
        assert lease["spec"]["holderIdentity"] != held_by
        assert lease["spec"]["leaseTransitions"] >= 1


async def test_terms_grow_also_over_a_lease_that_was_deleted(
    kubectl: Kubectl, kubeconfig: Path
) -> None:
    async with contextlib.aclosing(await open_kubernetes(kubeconfig)) as api:
        first, second = (KubernetesLease(api, NAME, duration_s=1.0) for _ in range(2))
        terms = [await first.claim()]
        assert await second.claim() == 0
        await first.release()
        terms.append(await second.claim())
        await asyncio.to_thread(kubectl, "delete", "lease", NAME)
        results = await asyncio.gather(first.claim(), second.claim())
        terms.append(max(results))
        assert min(results) == 0, "one of them has it"
        assert terms == sorted(set(terms))
        assert terms[0] > 0
        # Nobody renews it: whoever looks on takes it.
        loser = first if results[0] == 0 else second
        async with asyncio.timeout(20):
            while not (term := await loser.claim()):
                await asyncio.sleep(0.1)
        assert term > terms[-1]


async def test_without_a_role_nobody_knows_who_leads(
    control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path
) -> None:
    nothing = account(control_plane, kubectl, tmp_path, "nobody", [])
    async with contextlib.aclosing(await open_kubernetes(nothing)) as api:
        with pytest.raises(LeaseUnknownError, match="forbidden"):
            await KubernetesLease(api, NAME).claim()


async def test_while_the_api_server_is_down_the_leader_stays_the_leader(
    tmp_path: Path, control_plane: ControlPlane
) -> None:
    # One of the test's own, to be killed.
    with running_control_plane(tmp_path) as plane:
        config = in_namespace(plane.kubectl.config, "default")
        async with contextlib.aclosing(await open_kubernetes(config)) as api:
            lease = KubernetesLease(api, NAME, duration_s=1.0)
            told: list[int] = []
            leadership = Leadership(lease, lambda: True, told.append, settle_s=0.0)
            await leadership.stand()
            term = leadership.term
            assert term > 0
            server = plane.programs["kube-apiserver"].process
            server.kill()
            server.wait()
            for _ in range(3):
                await leadership.stand()
            assert (leadership.term, told) == (term, [term])
