"""From a pod's spec to what its containers find: environment, command, files."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.images import image_of
from tests.cluster.kubectl import Kubectl, Object

_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
_KEYED_FIELD = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


@dataclass(frozen=True, slots=True)
class PodParts:
    """One pod's, given the address that it has here."""

    kubectl: Kubectl
    pod: Object
    address: str
    # Where its volumes are, and a stand-in for the node's own directories.
    directory: Path

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    def environment(self, container: Object, links: Mapping[str, str]) -> dict[str, str]:
        """The image's, Kubernetes' own variables, and what the pod says."""
        found = {**image_of(container["image"]).environment, **links}
        for source in container.get("envFrom", []):
            for kind, key in (("configmap", "configMapRef"), ("secret", "secretRef")):
                if key in source:
                    data = self._data(kind, source[key]["name"])
                    found |= {name: value.decode() for name, value in data.items()}
        for entry in container.get("env", []):
            found[entry["name"]] = self._value(entry, found)
        return found

    def command(self, container: Object, environment: Mapping[str, str]) -> list[str]:
        """The pod's command or else the image's entry point, with the pod's arguments."""
        command = container.get("command") or image_of(container["image"]).entrypoint
        parts = [*command, *container.get("args", [])]
        return [_expanded(part, environment) for part in parts]

    def mounts(self, container: Object) -> dict[str, Path | None]:
        """Folders and files of this host by the paths at which the container has them."""
        volumes = {each["name"]: each for each in self.pod["spec"].get("volumes", [])}
        found: dict[str, Path | None] = {}
        for mount in container.get("volumeMounts", []):
            folder = self._volume(volumes[mount["name"]])
            found[mount["mountPath"]] = folder / str(mount.get("subPath", ""))
        return found

    def user(self, container: Object) -> int:
        """Who runs it; the images' user has no rights."""
        contexts = (container.get("securityContext", {}), self.pod["spec"]["securityContext"])
        return int(next((each["runAsUser"] for each in contexts if "runAsUser" in each), 0))

    def field(self, path: str) -> str:
        """What the downward API gives for a path."""
        if match := _KEYED_FIELD.fullmatch(path):
            return str(self.pod["metadata"].get(match[1], {})[match[2]])
        if path in ("status.podIP", "status.hostIP", "status.podIPs"):
            return self.address
        value: Object | str = self.pod
        for part in path.split("."):
            assert isinstance(value, dict), path
            value = value[part]
        return str(value)

    def _value(self, entry: Object, so_far: Mapping[str, str]) -> str:
        source = entry.get("valueFrom")
        if source is None:
            return _expanded(entry.get("value", ""), so_far)
        if "fieldRef" in source:
            return self.field(source["fieldRef"]["fieldPath"])
        for kind, key in (("configmap", "configMapKeyRef"), ("secret", "secretKeyRef")):
            if key in source:
                return self._data(kind, source[key]["name"])[source[key]["key"]].decode()
        raise AssertionError(f"{self.name}: {entry} is not known here")

    def _data(self, kind: str, name: str) -> dict[str, bytes]:
        found = self.kubectl.get(kind, name)
        if kind == "secret":
            return {key: base64.b64decode(text) for key, text in found.get("data", {}).items()}
        return {key: text.encode() for key, text in found.get("data", {}).items()}

    def _volume(self, volume: Object) -> Path:
        """A folder with the volume's content; the same one for all containers of the pod."""
        folder: Path = self.directory / "volumes" / self.name / volume["name"]
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        if "hostPath" in volume or "persistentVolumeClaim" in volume or "emptyDir" in volume:
            folder.chmod(0o777)
        elif "projected" in volume:
            for source in volume["projected"]["sources"]:
                self._write(folder, source, 0o644)
        else:
            mode = next(
                volume[kind].get("defaultMode", 0o644)
                for kind in ("secret", "configMap")
                if kind in volume
            )
            self._write(folder, volume, mode)
        return folder

    def _write(self, folder: Path, source: Object, mode: int) -> None:
        """The files of one source, readable by the pod's group as `fsGroup` says."""
        content: dict[str, bytes] = {}
        if "serviceAccountToken" in source:
            token = self.kubectl.token(self.pod["spec"]["serviceAccountName"])
            content[source["serviceAccountToken"]["path"]] = token.encode()
        for kind, key in (("configmap", "configMap"), ("secret", "secret")):
            if key in source:
                data = self._data(kind, source[key].get("secretName") or source[key]["name"])
                items = source[key].get("items") or [{"key": name, "path": name} for name in data]
                content |= {item["path"]: data[item["key"]] for item in items}
        for item in source.get("downwardAPI", {}).get("items", []):
            content[item["path"]] = self.field(item["fieldRef"]["fieldPath"]).encode()
        group = self.pod["spec"]["securityContext"].get("fsGroup", 0)
        for path, written in content.items():
            (folder / path).write_bytes(written)
            os.chown(folder / path, 0, group)
            (folder / path).chmod(mode | (0o440 if group else 0))


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` where the name is known."""
    return _REFERENCE.sub(lambda match: environment.get(match[1], match[0]), text)
