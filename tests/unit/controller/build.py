"""Records of the controller with defaults, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.controller.loads import Loads, PoolLoad, WorkerLoad
from services.controller.records import Pod, Snapshot, WorkerSet

OLD, NEW = "old", "new"


def make_set(name: str = "w", **changes: Any) -> WorkerSet:
    fields: dict[str, Any] = {
        "uid": f"uid-of-{name}",
        "resource_version": "1",
        "group": "g",
        "replicas": 1,
        "update_revision": OLD,
    }
    return WorkerSet(name=name, **{**fields, **changes})


def make_unit(index: int = 0, *, nodes: int = 2, is_on: bool = True, **changes: Any) -> WorkerSet:
    fields = {"unit": index, "nodes": nodes, "replicas": nodes if is_on else 0}
    return make_set(f"u{index}", rolls_itself=False, **{**fields, **changes})


def make_pod(set_name: str, ordinal: int, **changes: Any) -> Pod:
    name = f"{set_name}-{ordinal}"
    fields: dict[str, Any] = {"uid": f"{name}-1", "is_ready": True, "revision": OLD}
    return Pod(name=name, set_name=set_name, **{**fields, **changes})


def pods_of(*sets: WorkerSet, **changes: Any) -> list[Pod]:
    return [make_pod(each.name, rank, **changes) for each in sets for rank in range(each.replicas)]


def make_snapshot(sets: list[WorkerSet], pods: list[Pod]) -> Snapshot:
    return Snapshot({each.name: each for each in sets}, {each.name: each for each in pods})


def make_loads(workers: Mapping[str, WorkerLoad], **changes: Any) -> Loads:
    fields: dict[str, Any] = {"oldest_queued_s": 0.0, "saturation": 0.0, "kv_used_ratio": 0.0}
    return Loads({"model": PoolLoad(workers=dict(workers), **{**fields, **changes})})


READY = WorkerLoad(is_ready=True, is_draining=False, num_requests=3)
DRAINING = WorkerLoad(is_ready=False, is_draining=True, num_requests=3)
DRAINED = WorkerLoad(is_ready=False, is_draining=True, num_requests=0)
SUSPECT = WorkerLoad(is_ready=False, is_draining=False, num_requests=3)
