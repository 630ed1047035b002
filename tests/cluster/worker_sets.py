"""A release's workers without the chart: StatefulSets, the controller's role, its process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Kubectl, Object, run
from tests.cluster.programs import Program, tool

RELEASE = "r"
LEASE = f"{RELEASE}-controller"
_ROOT = Path(__file__).parents[2]


def worker_labels(group: str, unit: int | None = None) -> dict[str, str]:
    labels = {
        "app.kubernetes.io/instance": RELEASE,
        "app.kubernetes.io/component": "worker",
        "rhizome.ai/group": group,
    }
    return labels if unit is None else {**labels, "rhizome.ai/unit": str(unit)}


def worker_set(
    name: str,
    group: str,
    replicas: int,
    *,
    unit: int | None = None,
    nodes: int = 1,
    scaling: str | None = None,
    **pod_spec: Any,
) -> Object:
    """As docs/kubernetes-controller.md asks for it."""
    labels = worker_labels(group, unit)
    annotations = {"rhizome.ai/nodes": str(nodes)}
    if scaling is not None:
        annotations["rhizome.ai/autoscaling"] = scaling
    containers = [{"name": "worker", "image": "none"}]
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "RollingUpdate" if nodes == 1 else "OnDelete"},
            "selector": {"matchLabels": {**labels, "app": name}},
            "template": {
                "metadata": {"labels": {**labels, "app": name}},
                "spec": {"containers": containers, **pod_spec},
            },
        },
    }


def lease_rules(name: str) -> list[Object]:
    """What whoever stands for a lease needs."""
    return [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "resourceNames": [name],
            "verbs": ["get", "update"],
        },
    ]


# The role of docs/kubernetes-controller.md, and no more.
CONTROLLER_RULES: list[Object] = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch", "delete"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
    {"apiGroups": ["apps"], "resources": ["statefulsets"], "verbs": ["list", "watch"]},
    {"apiGroups": ["apps"], "resources": ["statefulsets/scale"], "verbs": ["patch"]},
    *lease_rules(LEASE),
]


def account(
    plane: ControlPlane, kubectl: Kubectl, directory: Path, name: str, rules: Sequence[Object]
) -> Path:
    """A kubeconfig of a new ServiceAccount that may do what `rules` say, in its namespace."""
    rbac = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": name}}
    binding = {"apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": {"name": name}}
    subject = {"kind": "ServiceAccount", "name": name, "namespace": kubectl.namespace}
    kubectl("create", "serviceaccount", name)
    kubectl.apply(
        {**role, "rules": list(rules)},
        {
            **binding,
            "subjects": [subject],
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
        },
    )
    path = plane.token_kubeconfig(directory / f"{name}.conf", kubectl.token(name))
    return in_namespace(path, kubectl.namespace)


def in_namespace(kubeconfig: Path, namespace: str) -> Path:
    """The same file, whose context names the namespace."""
    context = ["config", "set-context", "--current", f"--namespace={namespace}"]
    run([tool("kubectl"), "--kubeconfig", str(kubeconfig), *context])
    return kubeconfig


@contextlib.contextmanager
def running_controller(
    directory: Path, kubeconfig: Path, *arguments: str, name: str = "controller"
) -> Iterator[Program]:
    """`python -m services.controller`, as its image starts it."""
    command = [sys.executable, "-m", "services.controller", "--release", RELEASE]
    command += ["--kubeconfig", str(kubeconfig), *arguments]
    program = Program(name, ["env", f"PYTHONPATH={_ROOT}", *command], directory)
    try:
        yield program
    finally:
        program.close()


def uids(kubectl: Kubectl, set_name: str) -> dict[str, str]:
    """Of the pods of one StatefulSet that nobody deletes, by name."""
    return {
        pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in kubectl.pods(f"app={set_name}")
    }


def events(kubectl: Kubectl, set_name: str, reason: str) -> list[str]:
    """What was told about a StatefulSet."""
    return [
        event["message"]
        for event in kubectl.get("events")["items"]
        if (event["involvedObject"]["name"], event["reason"]) == (set_name, reason)
    ]


def holder(kubectl: Kubectl, lease: str = LEASE) -> str:
    """Who has the lease; empty for nobody."""
    if not kubectl.exists("lease", lease):
        return ""
    return str(kubectl.get("lease", lease)["spec"].get("holderIdentity", ""))
