"""Releases of the chart in namespaces of their own, and what they leave there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Helm, Kubectl, Object
from tests.e2e.system import ROOT

CHART = ROOT / "deploy" / "helm" / "rhizome"
NAME = "rhizome"
# What every namespace has, and what only tells of the past.
_NOBODYS = {
    "configmap/kube-root-ca.crt",
    "serviceaccount/default",
}
_PASSING = ("event", "pod.metrics.k8s.io", "podmetrics")

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Release:
    """`rhizome` in a namespace; `helm` and `kubectl` work there."""

    kubectl: Kubectl
    helm: Helm
    directory: Path

    def install(self, values: Object, *flags: str) -> None:
        self._put("install", values, *flags)

    def upgrade(self, values: Object, *flags: str) -> None:
        self._put("upgrade", values, *flags)

    def uninstall(self) -> None:
        self.helm("uninstall", NAME, "--wait")

    def pods(self, component: str, **labels: str) -> list[Object]:
        """In the order of their names."""
        wanted = {"app.kubernetes.io/component": component, **labels}
        selector = ",".join(f"{key}={value}" for key, value in wanted.items())
        return sorted(self.kubectl.pods(selector), key=lambda pod: str(pod["metadata"]["name"]))

    def test_pod(self) -> Object:
        """The pod of `helm test`."""
        hooks = yaml.safe_load_all(self.helm("get", "hooks", NAME))
        pod: Object = next(hook for hook in hooks if hook["kind"] == "Pod")
        # As the API server would fill it in.
        pod["metadata"] |= {"uid": "helm-test", "namespace": self.kubectl.namespace}
        return pod

    def leftovers(self) -> set[str]:
        """Objects of any kind beyond what every namespace has, and Helm's outside of it."""
        kinds = self.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name")
        wanted = [kind for kind in kinds.split() if not kind.startswith(_PASSING)]
        found = self.kubectl("get", ",".join(wanted), "--output=name", "--ignore-not-found")
        roles = ("get", "clusterroles,clusterrolebindings", "--output=name")
        wide = self.kubectl(*roles, "--selector", "app.kubernetes.io/managed-by=Helm")
        return set((found + wide).split()) - _NOBODYS

    def _put(self, verb: str, values: Object, *flags: str) -> None:
        path = self.directory / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        wait = () if "--no-wait" in flags else ("--wait", "--timeout", "90s")
        more = [flag for flag in flags if flag != "--no-wait"]
        self.helm(verb, NAME, str(CHART), "--values", str(path), *wait, *more)


@contextlib.contextmanager
def namespace(plane: ControlPlane) -> Iterator[Kubectl]:
    """A new one, which goes with all that is in it."""
    name = f"test-{next(_numbers)}"
    plane.kubectl("create", "namespace", name)
    kubectl = plane.kubectl.within(name)
    kubectl.until(lambda: kubectl.exists("serviceaccount", "default"))
    yield kubectl
    plane.kubectl("delete", "namespace", name, "--wait=false")


@contextlib.contextmanager
def empty_release(plane: ControlPlane, directory: Path) -> Iterator[Release]:
    """A namespace to install into; its pods go with the test."""
    with namespace(plane) as kubectl:
        release = Release(
            kubectl, Helm(kubectl.config, kubectl.namespace, directory / "helm"), directory
        )
        yield release
        # Nodes' GPUs and ports are the next test's.
        kubectl("delete", "deployments,statefulsets", "--all", "--wait=false")
        kubectl("delete", "pods", "--all", "--wait=true", "--grace-period=0")
