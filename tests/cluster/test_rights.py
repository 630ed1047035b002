"""What the chart's ServiceAccounts may do: enough (other tests run with them), and no more."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Kubectl
from tests.cluster.releases import Release

# (resource, names, verbs); every authenticated user may ask who it is besides.
EVERYONES = {
    "selfsubjectreviews.authentication.k8s.io",
    "selfsubjectaccessreviews.authorization.k8s.io",
    "selfsubjectrulesreviews.authorization.k8s.io",
}
SCHEDULER = {
    ("leases.coordination.k8s.io", "", "create"),
    ("leases.coordination.k8s.io", "rhizome-scheduler", "get update"),
}
CONTROLLER = {
    ("pods", "", "delete list watch"),
    ("statefulsets.apps", "", "list watch"),
    ("events", "", "create"),
    ("leases.coordination.k8s.io", "", "create"),
    ("leases.coordination.k8s.io", "rhizome-controller", "get update"),
}
SCALING = {("statefulsets.apps/scale", "", "patch")}


def rights(
    release: Release, account: str, plane: ControlPlane, directory: Path
) -> set[tuple[str, str, str]]:
    """What the API server says that an account may do in its namespace, by its token."""
    kubectl = release.kubectl
    config = plane.token_kubeconfig(directory / f"{account}.conf", kubectl.token(account))
    listed = Kubectl(config, kubectl.namespace)("auth", "can-i", "--list", "--no-headers")
    found = set()
    for line in listed.splitlines():
        resource, urls, names, verbs = (part.strip("[] ") for part in _columns(line))
        if resource and resource not in EVERYONES:
            found.add((resource, names, " ".join(sorted(verbs.split()))))
        # Discovery, which all users have.
        assert urls == "" or verbs == "get"
    return found


def _columns(line: str) -> tuple[str, str, str, str]:
    resource, _, rest = line.partition(" ")
    parts = [part.partition("]")[0] for part in rest.split("[")[1:]]
    assert len(parts) == 3, line
    return resource, parts[0], parts[1], parts[2]


def test_accounts_may_do_what_they_need_and_no_more(
    release: Release, control_plane: ControlPlane, tmp_path: Path
) -> None:
    release.install({}, "--no-wait")

    def of(account: str) -> set[tuple[str, str, str]]:
        return rights(release, account, control_plane, tmp_path)

    assert of("rhizome-scheduler") == SCHEDULER
    assert of("rhizome-controller") == CONTROLLER
    assert of("default") == set()
    group = {"minReplicas": 1, "maxReplicas": 2}
    release.upgrade({"worker": {"groups": {"main": group}}}, "--no-wait")
    assert of("rhizome-controller") == CONTROLLER | SCALING


def test_only_who_talks_to_the_api_server_has_a_token(release: Release) -> None:
    release.install({})
    with_token = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]
        for pod in release.kubectl.pods()
        for volume in pod["spec"]["volumes"]
        if "projected" in volume
    }
    assert with_token == {"controller", "scheduler"}
