"""What the controller knows of pods and StatefulSets: immutable records, read from their JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Json = dict[str, Any]

INSTANCE_LABEL = "app.kubernetes.io/instance"
COMPONENT_LABEL = "app.kubernetes.io/component"
GROUP_LABEL = "rhizome.ai/group"
UNIT_LABEL = "rhizome.ai/unit"
NODES_ANNOTATION = "rhizome.ai/nodes"
SCALING_ANNOTATION = "rhizome.ai/autoscaling"
_REVISION_LABEL = "controller-revision-hash"


def worker_selector(release: str) -> str:
    """Finds a release's pods and StatefulSets of workers."""
    return f"{INSTANCE_LABEL}={release},{COMPONENT_LABEL}=worker"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """One pod of a StatefulSet."""

    name: str
    uid: str
    set_name: str
    revision: str = ""
    node_name: str = ""
    is_ready: bool = False
    has_failed: bool = False
    # Of all its containers together.
    num_restarts: int = 0
    # Wall time at which it should be gone; None while nobody deletes it.
    due: float | None = None

    @property
    def is_leaving(self) -> bool:
        return self.due is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSet:
    """One StatefulSet: a group's workers of one pod each, or one unit, a worker of several."""

    name: str
    uid: str
    resource_version: str
    group: str
    # The index among the group's units.
    unit: int = 0
    # Pods of a worker.
    nodes: int = 1
    replicas: int = 0
    # The revision that new pods have; whether it replaces old ones itself.
    update_revision: str = ""
    rolls_itself: bool = True
    # The autoscaling annotation.
    scaling: str | None = None

    @property
    def is_unit(self) -> bool:
        return self.nodes > 1

    @property
    def num_workers(self) -> int:
        """As asked for."""
        return min(1, self.replicas) if self.is_unit else self.replicas

    def worker_id(self, ordinal: int) -> str:
        """The name of the worker that a pod is of: its own, or that of rank 0."""
        return f"{self.name}-{0 if self.is_unit else ordinal}"

    @property
    def worker_ids(self) -> list[str]:
        return [self.worker_id(ordinal) for ordinal in range(self.num_workers)]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All StatefulSets of the release's workers and their pods, by name."""

    sets: dict[str, WorkerSet]
    pods: dict[str, Pod]

    def pods_of(self, worker_set: WorkerSet) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.set_name == worker_set.name]

    @property
    def groups(self) -> dict[str, list[WorkerSet]]:
        """Each group's StatefulSets, by unit."""
        groups: dict[str, list[WorkerSet]] = {}
        for worker_set in sorted(self.sets.values(), key=lambda each: (each.unit, each.name)):
            groups.setdefault(worker_set.group, []).append(worker_set)
        return groups


def read_pod(pod: Json) -> Pod | None:
    """None for a pod that no StatefulSet owns."""
    metadata, status = pod["metadata"], pod.get("status", {})
    owner = _owner(metadata.get("ownerReferences", ()))
    if owner is None:
        return None
    containers = status.get("containerStatuses", ())
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        set_name=owner,
        revision=metadata.get("labels", {}).get(_REVISION_LABEL, ""),
        node_name=pod.get("spec", {}).get("nodeName", ""),
        is_ready=is_ready(status),
        has_failed=status.get("phase") in ("Failed", "Succeeded"),
        num_restarts=sum(container.get("restartCount", 0) for container in containers),
        due=_time(metadata.get("deletionTimestamp")),
    )


def read_set(worker_set: Json) -> WorkerSet | None:
    """None for a StatefulSet without a group. Raises ValueError, naming what is wrong."""
    metadata, spec = worker_set["metadata"], worker_set["spec"]
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    if GROUP_LABEL not in labels:
        return None
    return WorkerSet(
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        group=labels[GROUP_LABEL],
        unit=_number(UNIT_LABEL, labels.get(UNIT_LABEL, "0"), 0),
        nodes=_number(NODES_ANNOTATION, annotations.get(NODES_ANNOTATION, "1"), 1),
        replicas=spec.get("replicas", 1),
        update_revision=worker_set.get("status", {}).get("updateRevision", ""),
        rolls_itself=spec.get("updateStrategy", {}).get("type") != "OnDelete",
        scaling=annotations.get(SCALING_ANNOTATION),
    )


def is_ready(status: Json) -> bool:
    """Whether the Ready condition of a pod or node holds."""
    return any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in status.get("conditions", ())
    )


def _owner(references: Iterable[Json]) -> str | None:
    return next(
        (
            str(reference["name"])
            for reference in references
            if reference.get("kind") == "StatefulSet" and reference.get("controller")
        ),
        None,
    )


def _number(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} must be a number from {least}, got {text!r}")
    return int(text)


def _time(text: str | None) -> float | None:
    return None if text is None else datetime.fromisoformat(text).timestamp()
