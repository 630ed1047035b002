"""The rig itself: what the other tests stand on does what a cluster does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import CommandError, Kubectl, ready
from tests.cluster.nodes import NODES, NUM_GPUS
from tests.cluster.programs import until
from tests.e2e.system import ROOT


def pod(name: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": "none", **spec.pop("container", {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "rig"}},
        "spec": {"containers": [container], **spec},
    }


def with_gpus(number: int) -> dict[str, Any]:
    return {"resources": {"limits": {"nvidia.com/gpu": str(number)}}}


def test_pods_are_scheduled_by_gpus_and_become_ready(kubectl: Kubectl) -> None:
    number = len(NODES)
    # One node's worth each, and one more than there are nodes.
    kubectl.apply(*(pod(f"p{i}", container=with_gpus(NUM_GPUS)) for i in range(number + 1)))
    kubectl.until(lambda: sum(map(ready, kubectl.pods())) == number)
    pods = kubectl.pods()
    assert len({one["spec"]["nodeName"] for one in pods if ready(one)}) == number
    (waiting,) = (one for one in pods if not ready(one))
    kubectl.until(lambda: "Insufficient nvidia.com/gpu" in str(kubectl.get("events")["items"]), 20)
    kubectl("delete", "pod", next(one["metadata"]["name"] for one in pods if ready(one)))
    kubectl.until(lambda: ready(kubectl.get("pod", waiting["metadata"]["name"])))


def test_a_host_port_is_given_once_on_a_node(kubectl: Kubectl) -> None:
    ports = {"ports": [{"containerPort": 40000, "hostPort": 40000}]}
    only_here = {"kubernetes.io/hostname": "node-a"}
    for name in ("first", "second"):
        kubectl.apply(pod(name, container=ports, hostNetwork=True, nodeSelector=only_here))
    kubectl.until(lambda: "free ports" in str(kubectl.get("events")["items"]), 20)
    assert sum(map(ready, kubectl.pods())) == 1


def test_a_service_account_may_do_what_its_role_says_and_no_more(
    kubectl: Kubectl, control_plane: ControlPlane, tmp_path: Path
) -> None:
    kubectl("create", "serviceaccount", "reader")
    kubectl("create", "role", "reader", "--verb=list", "--resource=pods")
    kubectl(
        "create",
        "rolebinding",
        "reader",
        "--role=reader",
        f"--serviceaccount={kubectl.namespace}:reader",
    )
    reader = Kubectl(
        control_plane.token_kubeconfig(tmp_path / "reader.conf", kubectl.token("reader")),
        kubectl.namespace,
    )
    assert reader.get("pods")["items"] == []
    with pytest.raises(CommandError, match="Forbidden"):
        reader.get("secrets")


_STARTER = """
import sys, time
from pathlib import Path
from tests.cluster.programs import Program
print(Program("sleeper", ["sleep", "600"], Path(sys.argv[1])).pid, flush=True)
time.sleep(600)
"""


def test_programs_die_with_who_started_them_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STARTER, str(tmp_path)]
    starter = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    sleeper = psutil.Process(int(starter.stdout.readline()))
    assert sleeper.is_running()
    starter.kill()
    starter.communicate()
    until(lambda: not sleeper.is_running())
