"""Units are restarted whole, once for each loss, and not too often."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from services.controller.gangs import GangKeeper, Restart
from services.controller.records import Pod, WorkerSet
from tests.unit.controller.build import make_pod, make_set, make_snapshot, make_unit, pods_of


class Unit:
    """One unit of several pods, with a StatefulSet that brings back what is gone."""

    def __init__(self, nodes: int = 3) -> None:
        self.worker_set = make_unit(nodes=nodes)
        self.pods = {pod.name: pod for pod in pods_of(self.worker_set)}
        self.keeper = GangKeeper()
        self.now = 1000.0
        self.restarts: list[Restart] = []
        self.times: list[float] = []
        self._number = 1

    def look(self, seconds: float = 0.0) -> list[Restart]:
        """Let time pass, then decide; pods that are deleted are on their way out from then on."""
        self.now += seconds
        snapshot = make_snapshot([self.worker_set], list(self.pods.values()))
        restarts = self.keeper.decide(snapshot, self.now)
        for restart in restarts:
            for pod in restart.pods:
                self.change(pod.name, due=self.now + 30)
        self.restarts += restarts
        return restarts

    def change(self, name: str, **changes: Any) -> None:
        self.pods[name] = replace(self.pods[name], **changes)

    def come_back(self, *names: str, **changes: Any) -> None:
        """New pods in place of these, or of all that are leaving or gone."""
        self._number += 1
        missing = set(self.names) - self.pods.keys()
        leaving = {pod.name for pod in self.pods.values() if pod.is_leaving}
        for name in names or missing | leaving:
            fields: dict[str, Any] = {"uid": f"{name}-{self._number}", "is_ready": False, **changes}
            self.pods[name] = make_pod(self.worker_set.name, int(name[-1]), **fields)

    def all_ready(self) -> None:
        for name in self.pods:
            self.change(name, is_ready=True)

    @property
    def names(self) -> list[str]:
        return [f"{self.worker_set.name}-{rank}" for rank in range(self.worker_set.nodes)]

    def break_and_come_back(self) -> None:
        """Lose a container, until the others are deleted for it and all are new."""
        self.change("u0-1", num_restarts=self.pods["u0-1"].num_restarts + 1)
        for _ in range(1000):
            if self.look(0.5):
                break
        self.times.append(self.now)
        self.come_back()
        assert not self.look()
        # Beyond the time in which restarts may be echoes.
        self.look(11.0)


@pytest.fixture
def unit() -> Unit:
    unit = Unit()
    assert not unit.look()
    assert not unit.look(60.0)
    return unit


def names(restart: Restart) -> set[str]:
    return {pod.name for pod in restart.pods}


def lose_by_deletion(unit: Unit) -> None:
    unit.change("u0-1", due=unit.now + 30)


def lose_by_disappearing(unit: Unit) -> None:
    del unit.pods["u0-1"]


def lose_by_replacement(unit: Unit) -> None:
    unit.come_back("u0-1")


def lose_by_failure(unit: Unit) -> None:
    unit.change("u0-1", has_failed=True, is_ready=False)


def lose_by_a_containers_restart(unit: Unit) -> None:
    unit.change("u0-1", num_restarts=1)


LOSSES = [
    lose_by_deletion,
    lose_by_disappearing,
    lose_by_replacement,
    lose_by_failure,
    lose_by_a_containers_restart,
]


@pytest.mark.parametrize("lose", LOSSES)
def test_when_a_pod_is_lost_all_pods_of_its_unit_are_deleted_once(unit: Unit, lose: Any) -> None:
    lose(unit)
    (restart,) = unit.look()
    assert names(restart) >= {"u0-0", "u0-2"}
    assert "u0-1" in restart.reason
    assert not any(pod.is_leaving for pod in restart.pods)
    for _ in range(10):
        assert not unit.look(10.0)
    unit.come_back()
    for _ in range(10):
        assert not unit.look(10.0)


def test_pods_that_come_back_one_by_one_are_part_of_the_same_restart(unit: Unit) -> None:
    lose_by_deletion(unit)
    assert len(unit.look()) == 1
    # The others still go while this one is back, and its container fails to find them.
    unit.come_back("u0-1")
    assert not unit.look(1.0)
    unit.change("u0-1", num_restarts=2)
    assert not unit.look(5.0)
    unit.come_back()
    assert not unit.look(1.0)
    unit.change("u0-1", num_restarts=3)
    assert not unit.look(5.0)
    # From here on it would be a loss of its own.
    unit.look(10.0)
    unit.change("u0-1", num_restarts=4)
    assert len(unit.look()) == 1


def test_a_unit_that_starts_is_not_restarted() -> None:
    unit = Unit()
    unit.pods.clear()
    for rank in range(3):
        assert not unit.look(100.0)
        unit.come_back(f"u0-{rank}")
    assert not unit.look(1.0)
    unit.all_ready()
    assert not unit.look(100.0)


def test_who_has_just_begun_notices_a_pod_on_its_way_out() -> None:
    unit = Unit()
    lose_by_deletion(unit)
    (restart,) = unit.look()
    assert names(restart) == {"u0-0", "u0-2"}


def test_deleting_all_pods_is_a_restart_already(unit: Unit) -> None:
    for name in unit.names:
        unit.change(name, due=unit.now + 30)
    assert not unit.look()
    unit.come_back()
    assert not unit.look(1.0)
    # It delays none after it.
    unit.look(20.0)
    lose_by_a_containers_restart(unit)
    assert len(unit.look()) == 1


def test_a_deletion_that_failed_is_tried_again(unit: Unit) -> None:
    lose_by_deletion(unit)
    assert len(unit.look()) == 1
    unit.change("u0-2", due=None)
    assert not unit.look(1.0)
    (again,) = unit.look(5.0)
    assert (names(again), again.is_new) == ({"u0-2"}, False)


def test_restarts_come_at_growing_distances_up_to_five_minutes(unit: Unit) -> None:
    for _ in range(9):
        unit.break_and_come_back()
    delays = [10, 20, 40, 80, 160, 300, 300, 300]
    assert [each.next_delay_s for each in unit.restarts[:-1]] == delays
    distances = [after - before for before, after in zip(unit.times, unit.times[1:], strict=False)]
    for distance, delay in zip(distances, delays, strict=True):
        assert delay <= distance <= delay + 12


@pytest.mark.parametrize(("ready_s", "delay_s"), [(599.0, 160.0), (601.0, 10.0)])
def test_ten_minutes_of_readiness_end_the_delays(
    unit: Unit, ready_s: float, delay_s: float
) -> None:
    for _ in range(4):
        unit.break_and_come_back()
    unit.all_ready()
    unit.look()
    unit.look(ready_s)
    lose_by_a_containers_restart(unit)
    (restart,) = unit.look()
    assert restart.next_delay_s == delay_s


def test_a_unit_that_mends_itself_before_its_restart_is_left_alone(unit: Unit) -> None:
    for _ in range(5):
        unit.break_and_come_back()
    num_before = len(unit.restarts)
    lose_by_a_containers_restart(unit)
    assert not unit.look()
    unit.all_ready()
    # The others may not have noticed yet that one is lost.
    assert not unit.look(1.0)
    for _ in range(40):
        unit.look(10.0)
    assert len(unit.restarts) == num_before


def test_units_are_apart_from_each_other() -> None:
    sets = [make_unit(0), make_unit(1)]
    keeper = GangKeeper()
    pods = pods_of(*sets)
    assert not keeper.decide(make_snapshot(sets, pods), 0.0)
    pods[0] = replace(pods[0], has_failed=True)
    (restart,) = keeper.decide(make_snapshot(sets, pods), 1.0)
    assert names(restart) == {"u0-0", "u0-1"}


def test_workers_of_one_pod_and_units_that_are_off_are_left_alone() -> None:
    keeper = GangKeeper()
    single, off = make_set("w", replicas=3), make_unit(0, is_on=False)
    pods = pods_of(single)
    assert not keeper.decide(make_snapshot([single, off], pods), 0.0)
    leaving = [make_pod("w", 0, due=5.0, has_failed=True), make_pod("u0", 0, due=5.0)]
    assert not keeper.decide(make_snapshot([single, off], leaving), 1.0)


def test_a_unit_that_is_turned_off_and_on_starts_anew() -> None:
    keeper = GangKeeper()
    on, off = make_unit(0), make_unit(0, is_on=False)
    assert not keeper.decide(make_snapshot([on], pods_of(on)), 0.0)
    assert not keeper.decide(make_snapshot([off], pods_of(on, due=9.0)), 1.0)
    assert not keeper.decide(make_snapshot([on], []), 2.0)
    fresh = [make_pod("u0", rank, uid=f"fresh-{rank}") for rank in range(2)]
    assert not keeper.decide(make_snapshot([on], fresh), 3.0)


def test_a_replacement_that_was_asked_for_is_no_failure(unit: Unit) -> None:
    restart = unit.keeper.replace(unit.worker_set, unit.pods.values(), unit.now)
    assert (names(restart), restart.next_delay_s) == (set(unit.names), 0.0)
    for name in unit.names:
        unit.change(name, due=unit.now + 30)
        assert not unit.look(1.0)
    unit.come_back()
    assert not unit.look(1.0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["delete", "vanish", "crash", "fail", "back", "ready", "nothing"]),
        st.integers(0, 2),
        st.floats(0.0, 60.0),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(STEPS)
def test_whatever_happens_restarts_keep_their_distance_and_end(
    steps: list[tuple[str, int, float]],
) -> None:
    unit = Unit()
    times: list[float] = []
    for action, rank, seconds in steps:
        name = f"u0-{rank}"
        pod: Pod | None = unit.pods.get(name)
        if action == "back":
            unit.come_back()
        elif pod is not None and action == "vanish":
            del unit.pods[name]
        elif pod is not None and action != "nothing":
            changes: dict[str, dict[str, Any]] = {
                "delete": {"due": unit.now},
                "crash": {"num_restarts": pod.num_restarts + 1, "is_ready": False},
                "fail": {"has_failed": True, "is_ready": False},
                "ready": {"is_ready": True},
            }
            unit.change(name, **changes[action])
        for restart in unit.look(seconds):
            assert restart.pods, "somebody is deleted"
            assert not any(each.is_leaving for each in restart.pods)
            if restart.is_new:
                assert not times or unit.now - times[-1] >= 10.0
                times.append(unit.now)
    # Once nothing more happens it comes to rest, with pods that started together.
    for _ in range(400):
        unit.look(5.0)
        unit.come_back()
    unit.all_ready()
    before = len(unit.restarts)
    for _ in range(100):
        unit.look(20.0)
    assert len(unit.restarts) == before


def test_a_set_is_one_worker_a_unit_or_one_a_replica() -> None:
    sets: list[WorkerSet] = [make_set("w", replicas=3), make_unit(0, nodes=4)]
    assert [each.num_workers for each in sets] == [3, 1]
    assert [each.worker_ids for each in sets] == [["w-0", "w-1", "w-2"], ["u0-0"]]
    assert sets[1].worker_id(3) == "u0-0"


def place(unit: Unit, *names: str) -> None:
    for name in names:
        unit.change(name, node_name="n")


def test_pain_28_m_a_unit_whose_pods_find_no_nodes_together_starts_anew_after_a_while() -> None:
    unit = Unit()
    for name in unit.names:
        unit.change(name, is_ready=False)
    assert not unit.look()
    place(unit, "u0-0")
    assert not unit.look()
    for _ in range(10):
        assert not unit.look(59.0)
    (restart,) = unit.look(11.0)
    assert names(restart) == set(unit.names)
    assert "no node was found for u0-1, u0-2" in restart.reason
    # The new pods have as much time again.
    unit.come_back()
    assert not unit.look()
    place(unit, "u0-2")
    assert not unit.look(1.0)
    assert not unit.look(590.0)
    assert unit.look(10.0)


def test_a_unit_that_finds_its_last_node_late_is_left_alone() -> None:
    unit = Unit()
    for name in unit.names:
        unit.change(name, is_ready=False)
    place(unit, "u0-0", "u0-1")
    assert not unit.look()
    assert not unit.look(590.0)
    place(unit, "u0-2")
    assert not unit.look(20.0)
    assert not unit.look(3600.0)
