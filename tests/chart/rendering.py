"""Renders the chart with the real `helm`, for tests and for the examples that are kept."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "rhizome"
EXAMPLES = CHART / "examples"
KUBE_VERSION = "1.34.0"

_TOOLS = ROOT / "tests" / "cluster" / "tools" / "build"
# Drawn anew at every rendering without a cluster.
_DRAWN = re.compile(r"^(  (?:ca\.crt|tls\.crt|tls\.key): ).+$", re.MULTILINE)

Object = dict[str, Any]


class HelmError(Exception):
    """What helm says when it refuses."""


@functools.cache
def helm_path() -> str | None:
    """The program: from the path, else where the cluster tests' tools are."""
    if (found := shutil.which("helm")) is not None:
        return found
    if not _TOOLS.is_file():
        return None
    folder = subprocess.run([_TOOLS, "--folder"], check=True, capture_output=True, text=True)
    path = Path(folder.stdout.strip()) / "helm"
    return str(path) if os.access(path, os.X_OK) else None


def helm(*args: str | Path, stdin: str | None = None) -> str:
    """What the command prints. Raises HelmError with what it complains about."""
    path = helm_path()
    assert path is not None, "callers have looked for helm"
    result = subprocess.run(
        [path, *map(str, args)], input=stdin, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise HelmError(result.stderr)
    return result.stdout


def template(values: Mapping[str, Any] | Path | None = None, *flags: str) -> str:
    """The manifests of a release `rhizome` in the namespace `llm`, as text."""
    text = values.read_text() if isinstance(values, Path) else yaml.safe_dump(dict(values or {}))
    return _rendered(text, flags)


@functools.cache
def _rendered(values: str, flags: tuple[str, ...]) -> str:
    return helm(
        *("template", "rhizome", CHART, "--namespace", "llm", "--kube-version", KUBE_VERSION),
        *("--values", "-", *flags),
        stdin=values,
    )


def masked(rendered: str) -> str:
    """Without what is different each time."""
    return _DRAWN.sub(r"\1(drawn)", rendered)


class Manifests:
    """Rendered objects, found by kind and name."""

    def __init__(self, rendered: str) -> None:
        loaded = (entry for entry in yaml.safe_load_all(rendered) if entry)
        self.by_key: dict[tuple[str, str], Object] = {}
        for entry in loaded:
            key = (entry["kind"], entry["metadata"]["name"])
            assert key not in self.by_key, f"{key} is there twice"
            self.by_key[key] = entry

    def __iter__(self) -> Any:
        return iter(self.by_key.values())

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.by_key

    def get(self, kind: str, name: str) -> Object:
        assert (kind, name) in self.by_key, f"no {kind} {name} in {sorted(self.by_key)}"
        return self.by_key[kind, name]

    def of_kind(self, kind: str) -> dict[str, Object]:
        return {name: entry for (found, name), entry in self.by_key.items() if found == kind}

    def pods(self) -> list[Pod]:
        """Every pod template, whatever makes the pods."""
        return [pod for entry in self if (pod := _pod_of(entry)) is not None]

    def pod(self, name: str) -> Pod:
        (found,) = (pod for pod in self.pods() if pod.name == name)
        return found


class Pod(NamedTuple):
    """A pod template and the object that it is part of."""

    kind: str
    name: str
    metadata: Object
    spec: Object

    @property
    def component(self) -> str:
        return str(self.metadata["labels"]["app.kubernetes.io/component"])

    @property
    def container(self) -> Object:
        container = self.spec["containers"][0]
        assert isinstance(container, dict)
        return container

    @property
    def containers(self) -> Sequence[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def env(self) -> dict[str, Any]:
        """Values, or where they come from, by name."""
        given = self.container.get("env", [])
        names = [entry["name"] for entry in given]
        assert len(names) == len(set(names)), f"{self.name} sets a variable twice: {names}"
        return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in given}

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}


def render(values: Mapping[str, Any] | Path | None = None, *flags: str) -> Manifests:
    """The objects that these values make."""
    return Manifests(template(values, *flags))


def group(**values: Any) -> dict[str, Any]:
    """Values of a release with one group of GPU workers, `main`."""
    return {"model": "pvc://models/some", "worker": {"groups": {"main": values}}}


def scenarios() -> list[str]:
    return sorted(path.parent.name for path in EXAMPLES.glob("*/values.yaml"))


def _pod_of(entry: Object) -> Pod | None:
    kind, metadata = entry["kind"], entry["metadata"]
    if kind == "Pod":
        return Pod(kind, metadata["name"], metadata, entry["spec"])
    if kind == "LeaderWorkerSet":
        made = entry["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    elif "template" in entry.get("spec", {}):
        made = entry["spec"]["template"]
    else:
        return None
    return Pod(kind, metadata["name"], made["metadata"], made["spec"])
