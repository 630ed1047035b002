"""helm install, upgrade, rollback and uninstall; where pods land, and who may evict them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.cluster.kubectl import CommandError, Object, ready
from tests.cluster.nodes import NUM_GPUS, PLACES, RACK_LABEL
from tests.cluster.releases import NAME, Release


def environment(pod: Object) -> dict[str, Any]:
    """Of the pod's only container: values, or where they come from."""
    (container,) = pod["spec"]["containers"]
    return {
        each["name"].rpartition("__")[2]: each.get("value", each.get("valueFrom"))
        for each in container["env"]
    }


def host_ports(pod: Object) -> set[int]:
    return {
        port["hostPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
        if "hostPort" in port
    }


def gpus(pod: Object) -> int:
    (container,) = pod["spec"]["containers"]
    return int(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0))


def uids(pods: list[Object]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


def test_a_release_comes_changes_goes_back_and_leaves_nothing(release: Release) -> None:
    release.install({})
    assert all(map(ready, release.kubectl.pods()))
    before = {name: uids(release.pods(name)) for name in ("gateway", "scheduler", "tokenizer")}

    # What pods read at their start rolls them, and only them.
    release.upgrade({"tenants": {"acme": {"weight": 2}}})
    rolled = {name: uids(release.pods(name)) for name in before}
    for name in ("gateway", "scheduler"):
        assert not rolled[name] & before[name], f"{name} reads the tenants"
    assert rolled["tokenizer"] == before["tokenizer"]

    release.helm("rollback", NAME, "1", "--wait", "--timeout", "90s")
    assert not uids(release.pods("gateway")) & rolled["gateway"]
    assert release.leftovers()
    release.uninstall()
    release.kubectl.until(lambda: not release.leftovers(), 30)


def test_helm_says_what_is_wrong_with_values(release: Release) -> None:
    with pytest.raises(CommandError, match="replicaz"):
        release.install({"gateway": {"replicaz": 3}}, "--no-wait")
    assert release.leftovers() == set()


def test_units_of_several_nodes_share_nodes_without_a_collision(release: Release) -> None:
    groups = {
        "large": {"tp": 8, "nodes": 2, "replicas": 2},
        "small": {"tp": 4, "nodes": 2, "replicas": 2},
    }
    release.install({"model": "/models/some", "worker": {"groups": groups}})
    pods = release.pods("worker")
    assert len(pods) == 8
    units: dict[str, list[Object]] = {}
    for pod in pods:
        units.setdefault(pod["metadata"]["name"].rpartition("-")[0], []).append(pod)
    assert len(units) == 4
    rendezvous = set()
    for name, ranks in units.items():
        assert len({pod["spec"]["nodeName"] for pod in ranks}) == 2, f"{name} needs two nodes"
        for number, pod in enumerate(ranks):
            found = environment(pod)
            # The rank is the ordinal, which the pod's label has.
            assert found["NODE_RANK"]["fieldRef"]["fieldPath"].endswith("/pod-index']")
            assert pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] == str(number)
            host, _, port = found["NCCL_INIT_ADDR"].rpartition(":")
            assert host.startswith(f"{name}-0.{name}.{release.kubectl.namespace}.svc")
            assert int(port) in host_ports(pod)
            rendezvous.add(found["NCCL_INIT_ADDR"])
    assert len(rendezvous) == len(units)
    for node in PLACES:
        here = [pod for pod in pods if pod["spec"]["nodeName"] == node]
        assert sum(map(gpus, here)) <= NUM_GPUS
        ports = Counter(port for pod in here for port in host_ports(pod))
        assert not ports or max(ports.values()) == 1
    # Two units did meet on a node, or this showed nothing.
    assert max(Counter(pod["spec"]["nodeName"] for pod in pods).values()) > 1


def test_a_unit_stays_within_a_rack_and_never_shares_a_node_with_itself(release: Release) -> None:
    # One unit: two could each take half of a rack, and wait for the other's half.
    group = {"tp": 16, "nodes": 2, "topologyKey": RACK_LABEL}
    release.install({"model": "/models/some", "worker": {"groups": {"main": group}}})
    nodes = [pod["spec"]["nodeName"] for pod in release.pods("worker")]
    assert len(set(nodes)) == 2
    assert len({PLACES[node][0] for node in nodes}) == 1


def test_replicas_of_a_service_spread_over_nodes_and_zones(release: Release) -> None:
    release.install({"gateway": {"replicas": 4}})
    nodes = [pod["spec"]["nodeName"] for pod in release.pods("gateway")]
    assert len(set(nodes)) == 4
    assert len({PLACES[node][1] for node in nodes}) == 2


def test_disruption_budgets_keep_one_of_each_service(release: Release) -> None:
    release.install({})
    admin = release.kubectl
    admin("cordon", *PLACES)
    try:
        # What is evicted cannot come back meanwhile.
        for component in ("gateway", "scheduler", "tokenizer"):
            first, second = (pod["metadata"]["name"] for pod in release.pods(component))
            evict(release, first)
            with pytest.raises(CommandError, match="disruption budget"):
                evict(release, second)
    finally:
        admin("uncordon", *PLACES)


def evict(release: Release, name: str) -> None:
    """Ask as `kubectl drain` does."""
    kubectl = release.kubectl
    metadata = {"name": name, "namespace": kubectl.namespace}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{kubectl.namespace}/pods/{name}/eviction"
    kubectl("create", "--raw", path, "--filename", "-", text=json.dumps(body))
