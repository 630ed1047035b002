"""Configuration that renders is configuration that runs.

The chart is installed on the real control plane; every container of every pod then runs as a
process, with its image's entry point and its pod's environment, files, user and read-only root,
and talks to the API server with its ServiceAccount's token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.live import CHAT, Running, running_release
from tests.cluster.network import missing_rights
from tests.cluster.programs import until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing_rights()), reason=missing_rights()),
]


@pytest.fixture(scope="module")
def running(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The defaults: a built-in model on CPUs, TLS between services; its workers are scaled."""
    targets = {"scaleUpWindowSeconds": 2, "scaleDownWindowSeconds": 4, "saturation": 0.5}
    group = {"minReplicas": 1, "maxReplicas": 2, "config": {"max_running_requests": 4}}
    values = {"worker": {"groups": {"main": group}, "autoscaling": {"targets": targets}}}
    with running_release(control_plane, tmp_path_factory.mktemp("running"), values) as live:
        yield live


def test_a_chat_through_the_default_release(running: Running) -> None:
    reply = httpx.post(f"{running.url()}/v1/chat/completions", json=CHAT, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"]


def test_the_pod_of_helm_test_ends_well(running: Running) -> None:
    status, said = running.kubelet.run_once(running.release.test_pod())
    assert status == 0, said


def test_services_run_beside_kubernetes_link_variables(running: Running) -> None:
    """These have names of the kind `RHIZOME_GATEWAY_PORT=tcp://...`."""
    for pod in running.kubelet.pods.values():
        for _, container in pod.specs:
            link = container.spec.environment["RHIZOME_GATEWAY_PORT"]
            assert link.startswith("tcp://10.96.")
            assert container.statuses == [], f"{pod.name} was started again:\n{pod.log()}"


def test_metrics_are_where_the_annotations_say(running: Running) -> None:
    for pod in running.kubelet.pods.values():
        annotations = pod.pod["metadata"]["annotations"]
        place = f"{pod.machine.address}:{annotations['prometheus.io/port']}"
        with closing(httpx.Client(base_url=f"http://{place}")) as client:
            try:
                text = client.get(annotations["prometheus.io/path"]).text
            except httpx.ConnectError:
                pytest.fail(f"{pod.name} has no metrics at {place}")
            assert "process_resident_memory_bytes" in text, pod.name


def leader(running: Running) -> str:
    """The pod that the schedulers' Lease names; none before one stands for it."""
    kubectl, name = running.release.kubectl, "rhizome-scheduler"
    if not kubectl.exists("lease", name):
        return ""
    return str(kubectl.get("lease", name)["spec"].get("holderIdentity") or "")


def test_the_lease_moves_when_the_leading_scheduler_dies(running: Running) -> None:
    schedulers = {pod.name: pod for pod in running.pods("scheduler")}
    until(lambda: any(name in leader(running) for name in schedulers), 30, lambda: leader(running))
    first = next(name for name in schedulers if name in leader(running))
    (other,) = set(schedulers) - {first}
    (container,) = schedulers[first].containers.values()
    # It is started again and finds the Lease taken.
    container.process.kill()
    died = time.monotonic()
    until(lambda: other in leader(running), 30, lambda: leader(running))
    print(f"the Lease moved after {time.monotonic() - died:.1f} s")
    until(lambda: sum(running.metric("scheduler", 30022, "rhizome_scheduler_leads")) == 1, 30)
    reply = httpx.post(f"{running.url()}/v1/chat/completions", json=CHAT, timeout=60)
    assert reply.status_code == 200, reply.text


def test_the_controller_scales_with_the_queue_and_drains_before_it_removes(
    running: Running,
) -> None:
    long = {**CHAT, "max_tokens": 400, "ignore_eos": True}
    statuses: list[int] = []
    is_over = False

    def ask(number: int) -> None:
        with httpx.Client(timeout=120) as client:
            while not is_over:
                reply = client.post(f"{running.url()}/v1/chat/completions", json=long)
                statuses.append(reply.status_code)

    with ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(ask, number) for number in range(12)]
        try:
            until(lambda: len(running.release.pods("worker")) == 2, 60, lambda: controller(running))
            running.release.kubectl.until_ready("app.kubernetes.io/component=worker", 2)
            running.kubelet.sync()
            running.kubelet.until_ready()
            until(lambda: registered(running) == 2, 30)
        finally:
            is_over = True
        for client in clients:
            client.result()
    assert set(statuses) == {200}
    until(lambda: len(running.release.pods("worker")) == 1, 60, lambda: controller(running))
    said = controller(running)
    assert said.index("event=drain worker=rhizome-worker-main-1") < said.rindex("event=scaled")
    running.kubelet.sync()
    reply = httpx.post(f"{running.url()}/v1/chat/completions", json=CHAT, timeout=60)
    assert reply.status_code == 200, reply.text


def controller(running: Running) -> str:
    (pod,) = running.pods("controller")
    return pod.log()


def registered(running: Running) -> int:
    """Workers that the gateway knows."""
    return len(httpx.get(f"{running.url()}/get_server_info").json()["internal_states"])


def test_nobody_was_refused_by_the_api_server(running: Running) -> None:
    """After all of the above."""
    for pod in running.kubelet.pods.values():
        assert "orbidden" not in pod.log(), pod.log()
