"""The controller on a real API server: units start as one, old ones are replaced, dead ones go."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Kubectl
from tests.cluster.programs import Program
from tests.cluster.worker_sets import (
    CONTROLLER_RULES,
    LEASE,
    account,
    events,
    holder,
    running_controller,
    uids,
    worker_set,
)

# Nobody listens there.
NO_SCHEDULER = ("--scheduler", "localhost:1")


@pytest.fixture
def kubeconfig(control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path) -> Path:
    return account(control_plane, kubectl, tmp_path, "controller", CONTROLLER_RULES)


@pytest.fixture
def controller(kubectl: Kubectl, kubeconfig: Path, tmp_path: Path) -> Iterator[Program]:
    """One that leads."""
    with running_controller(tmp_path, kubeconfig, *NO_SCHEDULER) as program:
        kubectl.until(lambda: holder(kubectl))
        yield program


def make_units(kubectl: Kubectl, number: int = 2) -> list[str]:
    """Units of two pods each, all ready."""
    names = [f"u{index}" for index in range(number)]
    kubectl.apply(
        *(worker_set(name, "big", 2, unit=index, nodes=2) for index, name in enumerate(names))
    )
    for name in names:
        kubectl.until_ready(f"app={name}", 2)
    return names


def until_replaced(kubectl: Kubectl, name: str, before: dict[str, str]) -> None:
    """All pods are others, and ready."""
    kubectl.until(lambda: not set(before.values()) & set(uids(kubectl, name).values()))
    kubectl.until_ready(f"app={name}", 2)


def test_pain_28_m_when_one_rank_is_deleted_its_unit_starts_as_one_and_no_other(
    kubectl: Kubectl, controller: Program
) -> None:
    make_units(kubectl)
    first, second = uids(kubectl, "u0"), uids(kubectl, "u1")
    kubectl("delete", "pod", "u0-1", "--wait=false")
    until_replaced(kubectl, "u0", first)
    (message,) = events(kubectl, "u0", "RanksRestarted")
    assert "u0-1" in message
    assert "u0-0" in message
    assert uids(kubectl, "u1") == second
    assert not events(kubectl, "u1", "RanksRestarted")
    controller.check()
    assert "Traceback" not in controller.read_log()
    assert "event=kubernetes_refused" not in controller.read_log()


def test_a_container_that_starts_again_takes_its_unit_with_it(
    kubectl: Kubectl, controller: Program
) -> None:
    make_units(kubectl, 1)
    before = uids(kubectl, "u0")
    # A restart within the first seconds counts as an echo of the last one.
    time.sleep(12)
    status = kubectl.get("pod", "u0-0")["status"]
    status["containerStatuses"][0]["restartCount"] = 1
    patch = json.dumps({"status": {"containerStatuses": status["containerStatuses"]}})
    kubectl("patch", "pod", "u0-0", "--subresource=status", "--type=merge", "--patch", patch)
    until_replaced(kubectl, "u0", before)
    (message,) = events(kubectl, "u0", "RanksRestarted")
    assert "container of pod u0-0" in message


def test_turning_a_unit_off_is_no_loss(kubectl: Kubectl, controller: Program) -> None:
    make_units(kubectl)
    kubectl("scale", "statefulset", "u1", "--replicas=0")
    kubectl.until(lambda: not kubectl.get("pods", "--selector", "app=u1")["items"])
    kubectl("scale", "statefulset", "u1", "--replicas=2")
    kubectl.until_ready("app=u1", 2)
    assert not events(kubectl, "u1", "RanksRestarted")


def test_when_the_leading_controller_is_killed_the_other_goes_on(
    kubectl: Kubectl, controller: Program, kubeconfig: Path, tmp_path: Path
) -> None:
    make_units(kubectl, 1)
    leader = holder(kubectl)
    with running_controller(tmp_path, kubeconfig, *NO_SCHEDULER, name="second") as second:
        kubectl.until(lambda: "event=ready" in second.read_log())
        assert "event=leads" not in second.read_log()
        controller.process.kill()
        before = uids(kubectl, "u0")
        kubectl("delete", "pod", "u0-0", "--wait=false")
        # Nobody leads yet, but the second one has seen it.
        until_replaced(kubectl, "u0", before)
        assert holder(kubectl) not in ("", leader)
        assert len(events(kubectl, "u0", "RanksRestarted")) == 1
        transitions = kubectl.get("lease", LEASE)["spec"]["leaseTransitions"]
        assert transitions == 1
        # Who ends gives it back at once.
        second.close()
        assert holder(kubectl) == ""


def test_pods_of_a_dead_node_are_removed_only_where_that_is_asked_for(
    control_plane: ControlPlane, kubectl: Kubectl, kubeconfig: Path, tmp_path: Path
) -> None:
    lost = worker_set("lost", "g", 1, nodeName="no-such-node", terminationGracePeriodSeconds=1)
    with running_controller(tmp_path, kubeconfig, *NO_SCHEDULER):
        kubectl.until(lambda: holder(kubectl))
        kubectl.apply(lost)
        kubectl.until(lambda: uids(kubectl, "lost"))
        kubectl("delete", "pod", "lost-0", "--wait=false")
        # Well before Kubernetes' own collector, which removes pods without a node after 40 s.
        time.sleep(8)
        assert not uids(kubectl, "lost"), "it is still being deleted"
        assert kubectl.exists("pod", "lost-0")
    role = f"nodes-of-{kubectl.namespace}"
    kubectl("create", "clusterrole", role, "--verb=get", "--resource=nodes")
    subject = f"--serviceaccount={kubectl.namespace}:controller"
    kubectl("create", "clusterrolebinding", role, f"--clusterrole={role}", subject)
    force = ("--force-delete-after-s", "1")
    with running_controller(tmp_path, kubeconfig, *NO_SCHEDULER, *force, name="forcing") as forcing:
        # The StatefulSet makes another one at once.
        kubectl.until(lambda: uids(kubectl, "lost"))
        assert "event=pod_deleted_by_force pod=lost-0" in forcing.read_log()
    kubectl("delete", "clusterrole,clusterrolebinding", role)


def test_without_its_role_the_controller_says_what_it_lacks_and_goes_on(
    control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path
) -> None:
    nothing = account(control_plane, kubectl, tmp_path, "nobody", [])
    with running_controller(tmp_path, nothing, *NO_SCHEDULER) as program:
        kubectl.until(lambda: "pods is forbidden" in program.read_log())
        kubectl.until(lambda: "leases.coordination.k8s.io" in program.read_log())
        program.check()
