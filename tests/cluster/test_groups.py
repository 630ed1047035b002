"""Groups of ranks under the controller, which runs as a process with its ServiceAccount's token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Kubectl, ready
from tests.cluster.live import Running, running_release
from tests.cluster.network import missing_rights
from tests.cluster.programs import until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing_rights()), reason=missing_rights()),
]

GROUP = {"tp": 2, "nodes": 2, "replicas": 2, "config": {"max_total_tokens": 8192}}
VALUES = {"scheduler": {"replicas": 1}, "worker": {"groups": {"main": GROUP}}}
# Of two units the first one's ranks run, on the host networks of two machines; who serves clients
# does not.
REAL = "app.kubernetes.io/component notin (gateway,tokenizer),rhizome.ai/unit notin (1)"


@pytest.fixture(scope="module")
def running(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("groups")
    with running_release(control_plane, directory, VALUES, REAL) as live:
        until(lambda: "event=leads" in controller(live), 30, lambda: controller(live))
        yield live


def controller(running: Running) -> str:
    (pod,) = running.pods("controller")
    return pod.log()


def pods(running: Running) -> dict[str, str]:
    """The uid of each worker's pod."""
    found = running.release.pods("worker")
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in found}


def until_whole(running: Running) -> dict[str, str]:
    kubectl: Kubectl = running.release.kubectl
    kubectl.until(
        lambda: len(found := running.release.pods("worker")) == 4 and all(map(ready, found))
    )
    return pods(running)


def test_ranks_meet_by_the_names_and_ports_that_the_chart_gives_them(running: Running) -> None:
    """They have passed their probes, so a scheduler has taken them and all ranks made a step."""
    ranks = [running.kubelet.pod(f"rhizome-worker-main-0-{rank}") for rank in range(2)]
    assert ranks[0].machine is not ranks[1].machine
    assert "event=registered" in ranks[0].log()
    assert "event=node_started" in ranks[1].log()


# After a restart the controller leaves a unit alone for a little, so each has one.
@pytest.mark.parametrize(("unit", "rank"), [(0, 1), (1, 0)])
def test_deleting_a_rank_restarts_its_group_and_no_other(
    running: Running, unit: int, rank: int
) -> None:
    kubectl = running.release.kubectl
    before = until_whole(running)
    lost = f"rhizome-worker-main-{unit}"
    kubectl("delete", "pod", f"{lost}-{rank}")
    others = {name for name in before if not name.startswith(lost)}

    def all_are_new() -> bool:
        now = pods(running)
        return len(now) == 4 and all(now[name] != before[name] for name in set(before) - others)

    kubectl.until(all_are_new)
    after = until_whole(running)
    assert {after[name] for name in others} == {before[name] for name in others}
    (event,) = (
        event
        for event in kubectl.get("events")["items"]
        if event["reason"] == "RanksRestarted" and event["involvedObject"]["name"] == lost
    )
    assert f"{lost}-{rank}" in event["message"]
    assert "orbidden" not in controller(running)


def test_a_group_that_was_restarted_serves_again(running: Running) -> None:
    running.kubelet.sync(REAL)
    running.kubelet.until_ready()
