"""A pod's probes, performed from outside it as the kubelet does."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.cluster.containers import Container
from tests.cluster.kubectl import Object

_KINDS = ("startupProbe", "readinessProbe", "livenessProbe")


def probes_of(container: Object) -> dict[str, Object]:
    """By kind."""
    return {kind: container[kind] for kind in _KINDS if kind in container}


def passes(probe: Object, container: Object, running: Container) -> bool:
    """Whether it says yes, within its time."""
    address = running.spec.machine.address
    timeout_s = probe.get("timeoutSeconds", 1)
    if "grpc" in probe:
        target = f"{address}:{probe['grpc']['port']}"
        return _is_serving(target, probe["grpc"].get("service") or "", timeout_s)
    if "httpGet" in probe:
        what = probe["httpGet"]
        url = f"{what.get('scheme', 'HTTP').lower()}://{address}:{_port(what['port'], container)}"
        headers = {each["name"]: each["value"] for each in what.get("httpHeaders", [])}
        with contextlib.suppress(httpx.HTTPError):
            reply = httpx.get(url + what["path"], headers=headers, timeout=timeout_s, verify=False)
            return 200 <= reply.status_code < 400
        return False
    if "tcpSocket" in probe:
        place = (address, _port(probe["tcpSocket"]["port"], container))
        with contextlib.suppress(OSError), socket.create_connection(place, timeout_s):
            return True
        return False
    assert "exec" in probe, f"{probe} is not known here"
    # In the container's own view of the files.
    entering = ["nsenter", "--target", str(running.process.pid), "--mount", "--net", "--root", "--"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        result = subprocess.run(
            [*entering, *probe["exec"]["command"]],
            timeout=timeout_s,
            capture_output=True,
            check=False,
        )
        return result.returncode == 0
    return False


def seconds_until_passing(
    probe: Object,
    container: Object,
    running: Container,
    timeout_s: float,
    check: Callable[[], object],
) -> float:
    """How long it took from now; a failure shows the container's log. `check` may give up."""
    began = time.monotonic()
    while not passes(probe, container, running):
        waited = time.monotonic() - began
        check()
        assert waited < timeout_s, f"{running.spec.name}: {probe}\n{running.read_log()[-3000:]}"
        time.sleep(0.2)
    return time.monotonic() - began


def _is_serving(target: str, service: str, timeout_s: float) -> bool:
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            response = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _port(port: int | str, container: Object) -> int:
    if isinstance(port, int):
        return port
    return next(int(each["containerPort"]) for each in container["ports"] if each["name"] == port)
