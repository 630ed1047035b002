"""What is read from objects, annotations and schedulers' answers."""

from __future__ import annotations

from typing import Any

import pytest

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from services.controller.config import ControllerConfig
from services.controller.loads import WorkerLoad, merge
from services.controller.records import read_pod, read_set
from services.controller.rules import read_rules


def set_json(**changes: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "u1",
            "uid": "u",
            "resourceVersion": "7",
            "labels": {"rhizome.ai/group": "big", "rhizome.ai/unit": "1"},
            "annotations": {"rhizome.ai/nodes": "4", "rhizome.ai/autoscaling": "{}"},
            **changes,
        },
        "spec": {"replicas": 4, "updateStrategy": {"type": "OnDelete"}},
        "status": {"updateRevision": "r2"},
    }


def pod_json(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "u1-3",
            "uid": "p",
            "labels": {"controller-revision-hash": "r1"},
            "ownerReferences": [{"kind": "StatefulSet", "name": "u1", "controller": True}],
        },
        "spec": {"nodeName": "n"},
        "status": status,
    }


def test_a_unit_is_read_from_its_labels_and_annotations() -> None:
    unit = read_set(set_json())
    assert unit is not None
    assert (unit.group, unit.unit, unit.nodes, unit.replicas) == ("big", 1, 4, 4)
    assert (unit.is_unit, unit.rolls_itself, unit.update_revision) == (True, False, "r2")
    assert unit.scaling == "{}"


def test_without_annotations_it_is_a_group_of_one_pod_each() -> None:
    plain = set_json(labels={"rhizome.ai/group": "g"}, annotations={})
    del plain["spec"]["updateStrategy"]
    read = read_set(plain)
    assert read is not None
    assert (read.is_unit, read.rolls_itself, read.num_workers) == (False, True, 4)
    assert read_set(set_json(labels={})) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": {"rhizome.ai/nodes": "0"}},
        {"annotations": {"rhizome.ai/nodes": "two"}},
        {"labels": {"rhizome.ai/group": "g", "rhizome.ai/unit": "-1"}},
    ],
)
def test_numbers_that_are_none_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rhizome\.ai/(nodes|unit)"):
        read_set(set_json(**changes))


def test_a_pods_state_is_read() -> None:
    conditions = [{"type": "Ready", "status": "True"}]
    containers = [{"restartCount": 1}, {"restartCount": 2}]
    pod = read_pod(pod_json(phase="Running", conditions=conditions, containerStatuses=containers))
    assert pod is not None
    assert (pod.set_name, pod.revision, pod.node_name) == ("u1", "r1", "n")
    assert (pod.is_ready, pod.has_failed, pod.num_restarts, pod.is_leaving) == (
        True,
        False,
        3,
        False,
    )
    failed = pod_json(phase="Failed")
    failed["metadata"]["deletionTimestamp"] = "1970-01-01T00:01:00Z"
    pod = read_pod(failed)
    assert pod is not None
    assert (pod.is_ready, pod.has_failed, pod.due) == (False, True, 60.0)


def test_pods_of_nobody_are_not_looked_at() -> None:
    lonely = pod_json()
    lonely["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "j", "controller": True}]
    assert read_pod(lonely) is None


def test_rules_have_defaults_and_targets_can_be_left_out() -> None:
    rules = read_rules('{"minReplicas": 1, "maxReplicas": 3, "kvUsed": null}')
    assert (rules.min_replicas, rules.max_replicas, rules.kv_used) == (1, 3, None)
    assert (rules.saturation, rules.queue_seconds) == (0.8, 2.0)
    assert (rules.scale_up_window_seconds, rules.scale_down_window_seconds) == (15, 300)


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        ("", "malformed|truncated"),
        ("[]", "object"),
        ('{"minReplicas": 1}', "maxReplicas"),
        ('{"minReplicas": 0, "maxReplicas": 3}', "minReplicas"),
        ('{"minReplicas": 4, "maxReplicas": 3}', "maxReplicas"),
        ('{"minReplicas": 1, "maxReplicas": 3, "saturated": 1}', "saturated"),
        ('{"minReplicas": 1, "maxReplicas": 3, "saturation": 0}', "saturation"),
        ('{"minReplicas": 1, "maxReplicas": 3, "scaleDownWindowSeconds": -1}', "scaleDown"),
        (
            '{"minReplicas":1,"maxReplicas":3,"saturation":null,"queueSeconds":null,"kvUsed":null}',
            "target",
        ),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_by_name(annotation: str, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        read_rules(annotation)


def load(model: str = "m", **changes: Any) -> pb.PoolLoad:
    made = pb.PoolLoad(model=model, **changes)
    made.workers.append(
        pb.WorkerLoad(worker_id="w", state=pb.WORKER_STATE_READY, num_running=1, num_promised=2)
    )
    return made


def test_the_busiest_of_the_schedulers_counts() -> None:
    waiting = load(saturation=1.5)
    waiting.oldest_queued.FromMilliseconds(2500)
    draining = load(saturation=0.5, kv_used_ratio=0.25)
    draining.workers[0].state = pb.WORKER_STATE_DRAINING
    draining.workers[0].num_running = 5
    loads = merge([[waiting], [draining]])
    assert loads is not None
    pool = loads.pool_of(["w"])
    assert pool is not None
    assert (pool.oldest_queued_s, pool.saturation, pool.kv_used_ratio) == (2.5, 1.5, 0.25)
    assert pool.workers["w"] == WorkerLoad(is_ready=True, is_draining=True, num_requests=7)


def test_no_answer_is_no_load_and_an_answer_without_pools_is_an_empty_one() -> None:
    assert merge([]) is None
    empty = merge([[]])
    assert empty is not None
    assert empty.pool_of(["w"]) is None
    unset = merge([[load()]])
    assert unset is not None
    pool = unset.pool_of(["w"])
    assert pool is not None
    assert (pool.saturation, pool.kv_used_ratio, pool.oldest_queued_s) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"release": ""}, "release"),
        ({"release": "a,b=c"}, "release"),
        ({"scheduler": ()}, "scheduler"),
        ({"leader_lease": ""}, "leader_lease"),
        ({"force_delete_after_s": -1.0}, "force_delete_after_s"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(changes: dict[str, Any], name: str) -> None:
    fields: dict[str, Any] = {"release": "r", "scheduler": ("s:1",)}
    with pytest.raises(ValueError, match=name):
        ControllerConfig(**{**fields, **changes})


def test_the_lease_is_named_after_the_release() -> None:
    assert ControllerConfig(release="r", scheduler=("s:1",)).lease_name == "r-controller"
