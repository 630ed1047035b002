"""Units of an old revision are replaced whole, drained first, one at a time."""

from __future__ import annotations

from dataclasses import replace

from services.controller.autoscaler import Drain
from services.controller.farewells import Farewell
from services.controller.loads import Loads, WorkerLoad
from services.controller.records import Pod, WorkerSet
from services.controller.rollouts import Replace, Rollouts
from tests.unit.controller.build import (
    DRAINED,
    DRAINING,
    NEW,
    READY,
    make_loads,
    make_set,
    make_snapshot,
    make_unit,
    pods_of,
)

TIMEOUT_S = 100.0


class Group:
    def __init__(self, sets: list[WorkerSet]) -> None:
        self.sets = sets
        self.pods = pods_of(*sets)
        self.rollouts = Rollouts()
        self.states: dict[str, WorkerLoad] = {each.worker_id(0): READY for each in sets}
        self.now = 0.0

    def decide(self, loads: Loads | None = None, seconds: float = 5.0) -> list[Replace | Drain]:
        self.now += seconds
        snapshot = make_snapshot(self.sets, self.pods)
        loads = loads or make_loads(self.states)
        return self.rollouts.decide("g", self.sets, snapshot, loads, TIMEOUT_S, self.now)

    def replaced(self, name: str) -> None:
        """Its pods come back, new ones."""
        self.pods = [pod for pod in self.pods if pod.set_name != name]
        (worker_set,) = (each for each in self.sets if each.name == name)
        self.pods += pods_of(worker_set, revision=NEW)


def outdated_group() -> Group:
    return Group([make_unit(index, update_revision=NEW) for index in range(3)])


def test_units_of_the_newest_revision_are_left_alone() -> None:
    group = outdated_group()
    for each in group.sets:
        group.replaced(each.name)
    assert not group.decide()


def test_each_unit_is_drained_then_replaced_and_the_next_waits_until_it_serves() -> None:
    group = outdated_group()
    for name in ("u2", "u1", "u0"):
        worker_id = f"{name}-0"
        assert group.decide() == [Drain(worker_id, "its pods are of an old revision")]
        group.states[worker_id] = DRAINING
        assert not group.decide()
        group.states[worker_id] = DRAINED
        (action,) = group.decide()
        assert isinstance(action, Replace)
        assert action.worker_set.name == name
        group.replaced(name)
        del group.states[worker_id]
        assert not group.decide(), "it is not back yet"
        group.states[worker_id] = READY
    assert not group.decide()


def test_a_unit_that_serves_nobody_goes_first_and_does_not_wait_for_others() -> None:
    group = outdated_group()
    del group.states["u0-0"]
    actions: list[Replace | Drain] = []
    for _ in range(4):
        actions += group.decide()
    (action,) = actions
    assert isinstance(action, Replace)
    assert action.worker_set.name == "u0"


def test_requests_that_never_end_hold_a_rollout_up_for_its_timeout() -> None:
    group = outdated_group()
    group.decide()
    group.states["u2-0"] = DRAINING
    assert not group.decide(seconds=TIMEOUT_S - 10)
    assert isinstance(group.decide(seconds=10)[0], Replace)


def test_nothing_is_replaced_while_no_scheduler_answers() -> None:
    group = outdated_group()
    snapshot = make_snapshot(group.sets, group.pods)
    for now in range(0, 1000, 100):
        assert not group.rollouts.decide("g", group.sets, snapshot, None, TIMEOUT_S, now)


def test_sets_that_replace_their_pods_themselves_are_left_alone() -> None:
    single = make_set("w", replicas=2, update_revision=NEW)
    rolling = replace(make_unit(0, update_revision=NEW), rolls_itself=True)
    pods: list[Pod] = pods_of(single, rolling)
    snapshot = make_snapshot([single, rolling], pods)
    loads = make_loads({"w-0": READY, "w-1": READY, "u0-0": READY})
    for sets in ([single], [rolling]):
        assert not Rollouts().decide("g", sets, snapshot, loads, TIMEOUT_S, 0.0)


def test_a_worker_that_a_scheduler_forgets_for_a_moment_is_not_gone() -> None:
    farewell = Farewell("w-0", 0.0, TIMEOUT_S)
    nobody, known = make_loads({}), make_loads({"w-0": DRAINING})
    for now in range(0, 90, 15):
        assert not farewell.is_over(nobody, now)
        assert not farewell.is_over(nobody, now + 9)
        assert not farewell.is_over(known, now + 11)
    assert not farewell.is_over(nobody, 85.0)
    assert farewell.is_over(nobody, 95.0)
