"""A release whose pods run, and what a test asks it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Object
from tests.cluster.kubelet import Kubelet, RunningPod, running_kubelet
from tests.cluster.releases import Release, empty_release

QUESTION = {"model": "default", "max_tokens": 8, "temperature": 0}
CHAT = {**QUESTION, "messages": [{"role": "user", "content": "What is the capital of France?"}]}


@dataclass
class Running:
    """A release whose pods run."""

    release: Release
    kubelet: Kubelet

    def pods(self, component: str) -> list[RunningPod]:
        names = [pod["metadata"]["name"] for pod in self.release.pods(component)]
        return [self.kubelet.pod(name) for name in names]

    def url(self, scheme: str = "http") -> str:
        """One gateway's."""
        return f"{scheme}://{self.pods('gateway')[0].machine.address}:30000"

    def metric(self, component: str, port: int, name: str) -> list[float]:
        """Of each pod; a series without labels, or the sum of all."""
        found = []
        for pod in self.pods(component):
            lines = httpx.get(f"http://{pod.machine.address}:{port}/metrics").text.splitlines()
            samples = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
            found.append(sum(float(line.split()[-1]) for line in samples))
        return found


@contextlib.contextmanager
def running_release(
    plane: ControlPlane, directory: Path, values: Object, selector: str = ""
) -> Iterator[Running]:
    """Installed; all pods, or those that are selected, run and pass their probes."""
    with empty_release(plane, directory) as release:
        release.install(values)
        with running_kubelet(release.kubectl, directory, plane) as kubelet:
            kubelet.sync(selector)
            print(f"probes of {len(kubelet.pods)} pods pass: {kubelet.until_ready()}")
            yield Running(release, kubelet)
