"""How many workers a group gets, by what is known of the load, and in which order they go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from services.controller.autoscaler import Autoscaler, Drain, Scale, Verdict
from services.controller.loads import Loads, PoolLoad, WorkerLoad
from services.controller.records import WorkerSet
from services.controller.rules import ScalingRules
from tests.unit.controller.build import (
    DRAINED,
    DRAINING,
    READY,
    SUSPECT,
    make_loads,
    make_set,
    make_unit,
)

STEP_S = 5.0


def make_rules(**changes: Any) -> ScalingRules:
    fields: dict[str, Any] = {"min_replicas": 1, "max_replicas": 8}
    return ScalingRules(**{**fields, **changes})


class Group:
    """One group whose cluster does at once what is decided, and whose load the test sets."""

    def __init__(self, sets: list[WorkerSet], **rules: Any) -> None:
        self.sets = sets
        self.rules = make_rules(**rules)
        self.autoscaler = Autoscaler()
        self.now = 0.0
        self.pool: dict[str, Any] = {"saturation": 0.8, "oldest_queued_s": 0.0}
        self.states: dict[str, WorkerLoad] = {}
        self.drained: list[str] = []
        self.is_silent = False

    @property
    def loads(self) -> Loads | None:
        if self.is_silent:
            return None
        ids = [worker_id for each in self.sets for worker_id in each.worker_ids]
        return make_loads({one: self.states.get(one, READY) for one in ids}, **self.pool)

    @property
    def num_workers(self) -> int:
        return sum(each.num_workers for each in self.sets)

    def decide(self) -> Verdict:
        return self.autoscaler.decide("g", self.sets, self.rules, self.loads, self.now)

    def passes(self, seconds: float) -> list[Scale | Drain]:
        """Decide every 5 s, and have it done."""
        actions: list[Scale | Drain] = []
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            for action in self.decide().actions:
                actions.append(action)
                self.apply(action)
        return actions

    def apply(self, action: Scale | Drain) -> None:
        if isinstance(action, Drain):
            self.drained.append(action.worker_id)
            self.states.setdefault(action.worker_id, DRAINED)
            return
        before = {worker_id for each in self.sets for worker_id in each.worker_ids}
        self.sets = [
            replace(each, replicas=action.replicas) if each.name == action.worker_set.name else each
            for each in self.sets
        ]
        after = {worker_id for each in self.sets for worker_id in each.worker_ids}
        for worker_id in before ^ after:
            self.states.pop(worker_id, None)


def single(replicas: int, **rules: Any) -> Group:
    return Group([make_set("w", replicas=replicas)], **rules)


def units(num_on: int, num_all: int, **rules: Any) -> Group:
    return Group([make_unit(i, is_on=i < num_on) for i in range(num_all)], **rules)


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        ({"saturation": 0.8}, 4),
        ({"saturation": 0.87}, 4),
        ({"saturation": 0.9}, 5),
        ({"saturation": 1.2}, 6),
        ({"saturation": 9.0}, 8),
        ({"saturation": 0.4}, 2),
        ({"saturation": 0.0}, 1),
        ({"oldest_queued_s": 3.0}, 6),
        ({"oldest_queued_s": 300.0}, 8),
        ({"kv_used_ratio": 1.0}, 5),
        ({"saturation": 0.0, "kv_used_ratio": 0.9}, 4),
    ],
)
def test_the_value_that_is_furthest_above_its_target_decides(
    load: dict[str, float], wanted: int
) -> None:
    group = single(4, max_replicas=100)
    group.pool = {"saturation": 0.0, **load}
    assert group.decide().wanted == wanted


def test_values_without_a_target_are_not_looked_at() -> None:
    group = single(4, saturation=None, kv_used=None)
    group.pool = {"saturation": None, "kv_used_ratio": 1.0, "oldest_queued_s": 2.0}
    assert group.decide().wanted == 4


def test_those_that_start_are_expected_to_help() -> None:
    group = single(4)
    group.states = {"w-2": SUSPECT, "w-3": SUSPECT}
    group.pool["saturation"] = 1.6
    # Two ready ones need two more, and these are there.
    assert group.decide().wanted == 4


def test_those_that_are_not_ready_count_as_busy_when_it_would_shrink() -> None:
    group = single(4)
    group.states = {"w-3": SUSPECT}
    group.pool["saturation"] = 0.08
    assert group.decide().wanted == 2


def test_fractions_that_are_not_exact_cost_no_worker() -> None:
    group = single(10, max_replicas=20)
    group.pool["saturation"] = 0.56
    # 0.56 / 0.8 * 10 is a little more than 7.
    assert group.decide().wanted == 7
    group = single(5)
    group.pool["saturation"] = 1.12
    assert group.decide().wanted == 7


def test_it_grows_once_the_need_has_lasted() -> None:
    group = single(2, scale_up_window_seconds=15)
    group.passes(60)
    group.pool["saturation"] = 1.2
    assert not group.passes(15)
    (action,) = group.passes(5)
    assert isinstance(action, Scale)
    assert (action.worker_set.name, action.replicas) == ("w", 3)


def test_a_short_peak_changes_nothing() -> None:
    group = single(2)
    group.passes(60)
    group.pool["saturation"] = 5.0
    group.passes(10)
    group.pool["saturation"] = 0.8
    assert not group.passes(600)


def test_it_shrinks_one_by_one_after_the_window_and_drains_each_before() -> None:
    group = single(4, scale_down_window_seconds=60)
    group.passes(120)
    group.pool["saturation"] = 0.1
    assert not group.passes(60)
    # No window between one and the next.
    group.passes(40)
    assert group.num_workers == 1
    assert group.drained == ["w-3", "w-2", "w-1"]


def test_a_trough_shorter_than_the_window_changes_nothing() -> None:
    group = single(4, scale_down_window_seconds=300)
    for _ in range(10):
        group.pool["saturation"] = 0.1
        assert not group.passes(290)
        group.pool["saturation"] = 0.8
        assert not group.passes(10)


def test_a_worker_that_still_has_requests_stays_until_they_are_done() -> None:
    group = single(2, scale_down_window_seconds=0)
    group.pool["saturation"] = 0.1
    group.states["w-1"] = READY
    actions = group.passes(60)
    assert {type(action) for action in actions} == {Drain}
    group.states["w-1"] = DRAINING
    assert not group.passes(120), "it knows already"
    group.states["w-1"] = DRAINED
    (action,) = group.passes(5)
    assert isinstance(action, Scale)
    assert action.replicas == 1


def test_a_worker_that_has_nothing_to_do_is_drained_all_the_same() -> None:
    group = single(2, scale_down_window_seconds=0)
    group.pool["saturation"] = 0.1
    group.states["w-1"] = READY._replace(num_requests=0)
    for _ in range(5):
        assert group.passes(5) == [Drain("w-1", "the group gets smaller")]


def test_a_worker_that_never_ends_goes_after_the_timeout() -> None:
    group = single(2, scale_down_window_seconds=0, drain_timeout_seconds=100)
    group.pool["saturation"] = 0.1
    group.states["w-1"] = READY
    assert group.passes(5) == [Drain("w-1", "the group gets smaller")]
    group.states["w-1"] = DRAINING
    assert not [action for action in group.passes(95) if isinstance(action, Scale)]
    assert [action for action in group.passes(10) if isinstance(action, Scale)]


def test_a_worker_that_no_scheduler_knows_is_not_waited_for_long() -> None:
    group = single(2, scale_down_window_seconds=0)
    group.pool["saturation"] = 0.0
    loads = make_loads({"w-0": READY}, **group.pool)
    now, actions = 0.0, []
    while not actions:
        now += STEP_S
        actions = group.autoscaler.decide("g", group.sets, group.rules, loads, now).actions
        assert now < 60
    assert isinstance(actions[0], Scale)
    assert now >= 10


def test_a_drained_worker_that_a_controller_before_left_behind_is_removed() -> None:
    group = single(3)
    group.states["w-2"] = DRAINED
    assert not group.passes(25)
    group.passes(30)
    assert group.num_workers == 2


def test_a_worker_that_is_being_replaced_is_not_taken_for_one_left_behind() -> None:
    group = single(3)
    for state in (DRAINING, DRAINED, SUSPECT, READY) * 3:
        group.states["w-2"] = state
        assert not group.passes(20)


def test_the_next_worker_of_the_name_is_not_drained_for_the_one_before() -> None:
    group = single(2, min_replicas=1, scale_down_window_seconds=0, scale_up_window_seconds=0)
    group.pool["saturation"] = 0.1
    group.passes(10)
    assert group.num_workers == 1
    group.rules = make_rules(min_replicas=2)
    group.drained.clear()
    group.passes(60)
    group.rules = make_rules(min_replicas=1)
    group.pool["saturation"] = 0.8
    group.passes(60)
    assert (group.num_workers, group.drained) == (2, [])


def test_units_go_on_from_the_lowest_and_off_from_the_highest() -> None:
    group = units(1, 4, scale_down_window_seconds=0, scale_up_window_seconds=0)
    group.pool["saturation"] = 1.6
    group.passes(5)
    group.passes(5)
    assert [each.replicas for each in group.sets] == [2, 2, 2, 2]
    group.pool["saturation"] = 0.3
    while group.num_workers > 2:
        assert group.passes(5)
    group.pool["saturation"] = 0.8
    assert not group.passes(60)
    assert [each.replicas for each in group.sets] == [2, 2, 0, 0]
    assert group.drained == ["u3-0", "u2-0"]


def test_no_more_units_are_wanted_than_there_are() -> None:
    group = units(2, 2, max_replicas=8)
    group.pool["saturation"] = 5.0
    assert group.decide().wanted == 2
    assert not group.passes(120)


def test_bounds_hold_whatever_the_load_is() -> None:
    group = single(1, min_replicas=3)
    group.is_silent = True
    group.passes(5)
    assert group.num_workers == 3
    group = single(6, max_replicas=4)
    group.pool["saturation"] = 5.0
    group.passes(600)
    assert group.num_workers == 4
    assert group.drained == ["w-5", "w-4"]
    group = single(6, max_replicas=4)
    group.pool["saturation"] = None
    group.passes(600)
    assert group.num_workers == 4


def test_a_group_that_somebody_turned_off_stays_off() -> None:
    group = single(0, min_replicas=2)
    group.pool["saturation"] = 5.0
    assert not group.passes(600)


@pytest.mark.parametrize(
    "missing",
    [
        {"saturation": None},
        {"kv_used_ratio": None},
        {"saturation": float("nan")},
        {"saturation": float("inf")},
    ],
)
def test_pain_29_m_a_value_that_is_missing_scales_nothing(missing: dict[str, Any]) -> None:
    """The other values may say what they like."""
    for others in ({"oldest_queued_s": 900.0}, {"saturation": 0.0, "oldest_queued_s": 0.0}):
        group = single(4, scale_up_window_seconds=0, scale_down_window_seconds=0)
        group.pool = {**others, **missing}
        assert not group.passes(1200)
        assert group.decide().wanted is None


def test_pain_29_m_silence_and_empty_answers_scale_nothing() -> None:
    group = single(4, scale_down_window_seconds=30)
    group.passes(60)
    group.is_silent = True
    assert not group.passes(1200)
    group.is_silent = False
    for loads in (Loads({}), make_loads({}), make_loads({"other": READY})):
        for _ in range(100):
            group.now += STEP_S
            actions = group.autoscaler.decide("g", group.sets, group.rules, loads, group.now)
            assert not actions.actions
    # What was said before the silence counts no more: the window begins anew.
    group.pool["saturation"] = 0.1
    assert not group.passes(30)
    assert group.passes(10)


def test_pain_29_m_a_leader_that_has_just_begun_waits_for_the_windows() -> None:
    group = single(4, scale_up_window_seconds=15, scale_down_window_seconds=300)
    group.pool["saturation"] = 0.1
    assert not group.passes(300)
    assert group.passes(10)
    group = single(4, scale_up_window_seconds=60)
    group.pool["saturation"] = 5.0
    assert not group.passes(60)
    assert group.passes(10)


def test_two_pools_that_know_the_groups_workers_say_nothing_together() -> None:
    pool = PoolLoad(900.0, 5.0, 1.0, {"w-0": READY})
    other = PoolLoad(0.0, 0.0, 0.0, {"w-1": READY})
    group = single(2)
    loads = Loads({"a": pool, "b": other})
    verdict = group.autoscaler.decide("g", group.sets, group.rules, loads, 5.0)
    assert (verdict.wanted, verdict.actions) == (None, [])


LOADS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "saturation": st.one_of(st.none(), st.floats(0, 10)),
            "oldest_queued_s": st.floats(0, 1000),
            "kv_used_ratio": st.one_of(st.none(), st.floats(0, 1)),
        }
    ),
)
STATES = st.sampled_from([None, READY, DRAINING, DRAINED, SUSPECT])


@settings(deadline=None, max_examples=80)
@given(
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.tuples(LOADS, st.integers(0, 5), STATES, st.integers(1, 30)), max_size=25),
)
def test_whatever_is_said_a_group_stays_in_its_bounds_and_drains_before_it_shrinks(
    of_units: bool, least: int, extra: int, steps: list[Any]
) -> None:
    most = least + extra
    group = units(least, most + 1) if of_units else single(least)
    group.rules = make_rules(
        min_replicas=least,
        max_replicas=most,
        scale_down_window_seconds=20,
        drain_timeout_seconds=40,
    )
    for load, index, state, num_steps in steps:
        group.is_silent = load is None
        group.pool = load or group.pool
        worker_ids = [worker_id for each in group.sets for worker_id in each.worker_ids]
        worker_id = worker_ids[index % len(worker_ids)]
        if state is None:
            group.states.pop(worker_id, None)
        else:
            group.states[worker_id] = state
        for _ in range(num_steps):
            before = group.num_workers
            asked_at = dict.fromkeys(group.drained, group.now)
            for action in group.passes(STEP_S):
                if isinstance(action, Scale) and action.replicas < action.worker_set.replicas:
                    gone = action.worker_set.worker_ids[-1]
                    is_known = gone in asked_at or gone in group.states or state is not None
                    assert is_known, "nobody was asked to drain"
                    assert before - group.num_workers <= 1
            assert least <= group.num_workers <= most
            assert group.num_workers <= 2 * before
