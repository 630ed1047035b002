"""The chart's pods as processes of this host: what the cluster's nodes only pretend to run.

Each pod has a network namespace and each container a mount namespace. Services are addresses at
which a relay listens, names are in hosts files, and the API server is where pods expect it.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.containers import Container, ContainerSpec, run_once
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.network import Machine, Network, running_network
from tests.cluster.pod_parts import PodParts
from tests.cluster.probes import passes, probes_of, seconds_until_passing
from tests.cluster.programs import Program, until
from tests.e2e.system import ROOT

_API_SERVER = "10.96.0.1:443"
_SERVICES = "10.96.0.0/16"
_READY_S = 120.0
# A container that was started so often will not do better.
_MOST_STARTS = 8


@dataclass
class RunningPod:
    """A pod whose containers run."""

    pod: Object
    machine: Machine
    containers: dict[str, Container] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    @property
    def specs(self) -> Iterator[tuple[Object, Container]]:
        for spec in self.pod["spec"]["containers"]:
            yield spec, self.containers[spec["name"]]

    def log(self) -> str:
        return "".join(container.read_log() for container in self.containers.values())

    def is_ready(self) -> bool:
        """Whether all its readiness probes pass."""
        return all(
            passes(probe, spec, running)
            for spec, running in self.specs
            for kind, probe in probes_of(spec).items()
            if kind == "readinessProbe"
        )

    def close(self) -> None:
        for container in self.containers.values():
            container.close()


class Kubelet:
    """Runs pods of one namespace; `sync` starts those that are new and ends those that are gone."""

    def __init__(
        self, kubectl: Kubectl, network: Network, directory: Path, plane: ControlPlane
    ) -> None:
        self._kubectl = kubectl
        self._network = network
        self._directory = directory
        self._hosts = directory / "hosts"
        self._table = directory / "services.json"
        self._nodes: dict[str, Machine] = {}
        # By uid.
        self._addresses: dict[str, Machine] = {}
        self.pods: dict[str, RunningPod] = {}
        self._proxies: list[Program] = []
        self._start_proxies(plane)

    def node(self, name: str) -> Machine:
        """The machine of pods on the host network of a node."""
        if name not in self._nodes:
            self._nodes[name] = self._add_machine(name)
        return self._nodes[name]

    def sync(self, selector: str = "") -> None:
        """Run what the namespace's pods with these labels are now."""
        pods = {pod["metadata"]["uid"]: pod for pod in self._kubectl.pods(selector)}
        pods = {uid: pod for uid, pod in pods.items() if "nodeName" in pod["spec"]}
        for uid in set(self.pods) - set(pods):
            self.pods.pop(uid).close()
        for uid, pod in pods.items():
            if uid not in self._addresses:
                self._addresses[uid] = self._machine_for(pod)
        # Before the first of them asks for a name.
        self._publish(pods)
        for uid, pod in pods.items():
            if uid not in self.pods:
                self.pods[uid] = self._start(pod, self._addresses[uid])

    def pod(self, name: str) -> RunningPod:
        """By its name."""
        return next(pod for pod in self.pods.values() if pod.name == name)

    def until_ready(self) -> dict[str, float]:
        """Until all probes of all pods pass; seconds that those for start-up took, by pod."""
        seconds = {}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            for pod in self.pods.values():
                for spec, running in pod.specs:
                    if kind in spec:
                        took = seconds_until_passing(
                            spec[kind], spec, running, _READY_S, self.check
                        )
                        seconds[f"{pod.name} {kind}"] = round(took, 1)
        return seconds

    def check(self) -> None:
        """Raise AssertionError when a container ends again and again, or the relays have."""
        for proxy in self._proxies:
            proxy.check()
        for pod in self.pods.values():
            for _, running in pod.specs:
                starts = len(running.statuses) + 1
                assert starts < _MOST_STARTS, f"{pod.name}: {running.statuses}\n{pod.log()[-3000:]}"

    def run_once(self, pod: Object) -> tuple[int, str]:
        """A pod that ends, such as that of `helm test`: its status and what it wrote."""
        machine = self._add_machine(pod["metadata"]["name"])
        (container,) = pod["spec"]["containers"]
        result = run_once(self._spec(pod, container, machine), self._directory)
        return result.returncode, result.stdout + result.stderr

    def close(self) -> None:
        for pod in self.pods.values():
            pod.close()
        for proxy in self._proxies:
            proxy.close()

    def _start_proxies(self, plane: ControlPlane) -> None:
        services = self._network.add("services")
        # All addresses of Services are this machine's.
        services.ip("route", "add", "local", _SERVICES, "dev", "lo")
        door = f"{self._network.host_address}:{plane.port}"
        way = self._directory / "api-server.json"
        way.write_text(json.dumps({door: [f"127.0.0.1:{plane.port}"]}))
        self._table.write_text(json.dumps({_API_SERVER: [door], **self._service_table({})}))
        for name, table, entering in (
            ("api-server-relay", way, ()),
            ("service-relay", self._table, services.entering),
        ):
            command = [
                *entering,
                "env",
                f"PYTHONPATH={ROOT}",
                sys.executable,
                "-m",
                "tests.cluster.relay",
            ]
            self._proxies.append(Program(name, [*command, str(table)], self._directory))
        for proxy in self._proxies:
            _until_listening(proxy)
        self._door = door
        self._services = services

    def _add_machine(self, name: str) -> Machine:
        machine = self._network.add(name)
        machine.ip("route", "add", _SERVICES, "via", self._services.address)
        return machine

    def _machine_for(self, pod: Object) -> Machine:
        if pod["spec"].get("hostNetwork"):
            return self.node(pod["spec"]["nodeName"])
        return self._add_machine(pod["metadata"]["name"])

    def _start(self, pod: Object, machine: Machine) -> RunningPod:
        running = RunningPod(pod, machine)
        for container in pod["spec"].get("initContainers", []):
            result = run_once(self._spec(pod, container, machine), self._directory)
            assert result.returncode == 0, f"{pod['metadata']['name']}: {result.stderr}"
        for container in pod["spec"]["containers"]:
            spec = self._spec(pod, container, machine)
            running.containers[container["name"]] = Container(spec, self._directory)
        return running

    def _spec(self, pod: Object, container: Object, machine: Machine) -> ContainerSpec:
        uid = pod["metadata"]["uid"]
        parts = PodParts(self._kubectl, pod, machine.address, self._directory / uid)
        environment = parts.environment(container, self._link_variables())
        security = container.get("securityContext", {})
        return ContainerSpec(
            name=f"{parts.name}.{container['name']}.{uid[:8]}",
            machine=machine,
            command=parts.command(container, environment),
            environment=environment,
            hostname=parts.name,
            hosts=self._hosts,
            mounts=parts.mounts(container),
            read_only_root=security.get("readOnlyRootFilesystem", False),
            user=parts.user(container),
        )

    def _link_variables(self) -> dict[str, str]:
        """Those that Kubernetes injects for Services, whether the pods want them or not."""
        found = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        for service in self._services_with_addresses():
            name = re.sub("[^A-Z0-9]", "_", service["metadata"]["name"].upper())
            address = service["spec"]["clusterIP"]
            ports = [port["port"] for port in service["spec"]["ports"]]
            found |= {
                f"{name}_SERVICE_HOST": address,
                f"{name}_SERVICE_PORT": str(ports[0]),
                f"{name}_PORT": f"tcp://{address}:{ports[0]}",
            }
            for port in ports:
                found |= {
                    f"{name}_PORT_{port}_TCP": f"tcp://{address}:{port}",
                    f"{name}_PORT_{port}_TCP_ADDR": address,
                    f"{name}_PORT_{port}_TCP_PORT": str(port),
                    f"{name}_PORT_{port}_TCP_PROTO": "tcp",
                }
        return found

    def _services_with_addresses(self) -> list[Object]:
        services = self._kubectl.get("services")["items"]
        return [each for each in services if each["spec"]["clusterIP"] != "None"]

    def _publish(self, pods: Mapping[str, Object]) -> None:
        """Names and Services' pods as they are now; running containers see the same file."""
        lines = []
        for service in self._kubectl.get("services")["items"]:
            name = service["metadata"]["name"]
            if service["spec"]["clusterIP"] != "None":
                lines.append(f"{service['spec']['clusterIP']} {self._names(name)}")
                continue
            for number, uid in enumerate(_selected(service, pods)):
                address = self._addresses[uid].address
                # One address a name: gRPC's resolver takes lines that share a name for one host.
                if number == 0:
                    lines.append(f"{address} {self._names(name)}")
                if pods[uid]["spec"].get("subdomain") == name:
                    lines.append(f"{address} {self._names(pods[uid]['spec']['hostname'], name)}")
        self._hosts.write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        table = {_API_SERVER: [self._door], **self._service_table(pods)}
        self._table.write_text(json.dumps(table))

    def _names(self, *parts: str) -> str:
        place = ".".join((*parts, self._kubectl.namespace))
        short = [parts[0]] if len(parts) == 1 else []
        return " ".join((*short, place, f"{place}.svc", f"{place}.svc.cluster.local"))

    def _service_table(self, pods: Mapping[str, Object]) -> dict[str, list[str]]:
        table = {}
        for service in self._services_with_addresses():
            for port in service["spec"]["ports"]:
                targets = [
                    f"{self._addresses[uid].address}:{_target_port(port, pods[uid])}"
                    for uid in _selected(service, pods)
                ]
                table[f"{service['spec']['clusterIP']}:{port['port']}"] = targets
        return table


def _until_listening(proxy: Program) -> None:
    until(lambda: "event=ready" in proxy.read_log(), 20, proxy.read_log)


def _selected(service: Object, pods: Mapping[str, Object]) -> list[str]:
    """The pods of a Service."""
    selector = service["spec"].get("selector", {}).items()
    return [uid for uid, pod in pods.items() if selector <= pod["metadata"]["labels"].items()]


def _target_port(port: Object, pod: Object) -> int:
    target = port["targetPort"]
    if isinstance(target, int):
        return target
    return next(
        int(each["containerPort"])
        for container in pod["spec"]["containers"]
        for each in container.get("ports", [])
        if each.get("name") == target
    )


@contextlib.contextmanager
def running_kubelet(kubectl: Kubectl, directory: Path, plane: ControlPlane) -> Iterator[Kubelet]:
    """With a network of its own."""
    with running_network() as network:
        kubelet = Kubelet(kubectl, network, directory, plane)
        try:
            yield kubelet
        finally:
            kubelet.close()
