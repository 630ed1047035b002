"""kubectl and helm as a test calls them: JSON in and out, failures with what was said."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.programs import tool, until

Object = dict[str, Any]


class CommandError(AssertionError):
    """A command that ended with another status than 0; its text is what it said."""


def run(command: list[str], text: str | None = None, timeout_s: float = 120.0) -> str:
    """What the command wrote to standard output."""
    result = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if result.returncode:
        shown = " ".join(command[1:])
        raise CommandError(f"{shown}: {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.stdout


@dataclass(frozen=True, slots=True)
class Kubectl:
    """One user's kubectl, in one namespace."""

    config: Path
    namespace: str = "default"

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        where = ["--kubeconfig", str(self.config), "--namespace", self.namespace]
        return run([tool("kubectl"), *where, *arguments], text)

    def within(self, namespace: str) -> Kubectl:
        """The same in another namespace."""
        return Kubectl(self.config, namespace)

    def get(self, *arguments: str) -> Object:
        """One object, or a list of them under `items`."""
        found: Object = json.loads(self("get", *arguments, "--output", "json"))
        return found

    def token(self, account: str) -> str:
        """A token of a ServiceAccount, as its pods get one."""
        return self("create", "token", account).strip()

    def exists(self, kind: str, name: str, namespace: str | None = None) -> bool:
        place = self.within(namespace or self.namespace)
        return bool(place("get", kind, name, "--ignore-not-found", "--output", "name").strip())

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Make these, their status too."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self("apply", "--filename", "-", text=json.dumps(listed))

    def pods(self, selector: str = "") -> list[Object]:
        """Those that are not on their way out."""
        found = self.get("pods", *(("--selector", selector) if selector else ()))["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def until_ready(self, selector: str, number: int, timeout_s: float = 60.0) -> list[Object]:
        """The pods, once there are so many and all are ready."""
        self.until(
            lambda: (pods := self.pods(selector)) and len(pods) == number and all(map(ready, pods)),
            timeout_s,
        )
        return self.pods(selector)

    def until(self, condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        """Until this holds; a failure shows the namespace's pods and events."""
        until(
            condition,
            timeout_s,
            lambda: self("get", "pods,events", "--output", "wide"),
            period_s=0.25,
        )


def ready(pod: Object) -> bool:
    """Whether a pod says that it is."""
    conditions = pod.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


@dataclass(frozen=True, slots=True)
class Helm:
    """helm, in one namespace of a cluster."""

    config: Path
    namespace: str
    # Where helm keeps what is no user's business.
    home: Path

    def __call__(self, *arguments: str, timeout_s: float = 120.0) -> str:
        where = ["--kubeconfig", str(self.config), "--namespace", self.namespace]
        folders = {
            f"HELM_{kind}_HOME": str(self.home / kind.lower())
            for kind in ("CACHE", "CONFIG", "DATA")
        }
        command = ["env", *(f"{key}={value}" for key, value in folders.items())]
        return run([*command, tool("helm"), *where, *arguments], timeout_s=timeout_s)


def helm_template(chart: Path, *arguments: str) -> str:
    """The chart's manifests, rendered without a cluster."""
    return run([tool("helm"), "template", "rhizome", str(chart), *arguments])
