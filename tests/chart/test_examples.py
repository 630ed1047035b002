"""Every example: renders as it is kept, is legal in several versions, and can be run as it is."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.config import parse_config
from services.common.tenants import read_tenants
from services.gateway.api_keys import parse_keys
from services.scheduler.pools import read_declarations
from tests.chart.examples import rendered
from tests.chart.rendering import CHART, EXAMPLES, Manifests, Pod, helm, render, scenarios
from tests.chart.services import SERVICES, config_fields, config_type

API_VERSIONS = ("1.28", "1.31", "1.34", "1.37")
# Of operators: their schemas do not come with Kubernetes.
FOREIGN_GROUPS = (
    *("cert-manager.io", "gateway.networking.k8s.io", "keda.sh"),
    *("leaderworkerset.x-k8s.io", "monitoring.coreos.com"),
)
# What the kubelet puts in place of references.
FIELDS = {
    "metadata.name": "pod-0",
    "status.podIP": "10.0.0.7",
    "metadata.labels['apps.kubernetes.io/pod-index']": "1",
    "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']": "1",
}
SECRETS = {
    "RHIZOME__GATEWAY__REDIS_URL": "redis://:secret@redis:6379/0",
    "RHIZOME__GATEWAY__ADMIN_API_KEY": "secret",
}
# What a kubelet injects for Services of these names where enableServiceLinks is on.
SERVICE_LINKS = {
    f"RHIZOME_{service}_{name}": value
    for service in ("GATEWAY", "TOKENIZER", "SCHEDULER", "CACHE_INDEX", "WORKER", "CONTROLLER")
    for name, value in {
        "PORT": "tcp://10.0.0.1:80",
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "80",
        "PORT_80_TCP": "tcp://10.0.0.1:80",
        "PORT_80_TCP_ADDR": "10.0.0.1",
    }.items()
}

pytestmark = pytest.mark.parametrize("scenario", scenarios())


def manifests(scenario: str) -> Manifests:
    return render(EXAMPLES / scenario / "values.yaml")


def test_an_example_renders_as_it_is_kept(scenario: str) -> None:
    kept = (EXAMPLES / scenario / "rendered.yaml").read_text()
    assert rendered(scenario) == kept, "`make chart-examples`, and look at the difference"


def test_an_example_passes_helm_lint(scenario: str) -> None:
    said = helm("lint", CHART, "--strict", "--values", EXAMPLES / scenario / "values.yaml")
    assert "0 chart(s) failed" in said


@pytest.mark.parametrize("version", API_VERSIONS)
def test_an_example_is_legal_in(version: str, scenario: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate").validate
    for entry in manifests(scenario):
        if entry["apiVersion"].partition("/")[0] not in FOREIGN_GROUPS:
            validate(entry, version, strict=True)


def test_what_an_example_sets_is_what_the_services_read(
    scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    for pod in manifests(scenario).pods():
        if pod.component not in SERVICES:
            continue
        service = SERVICES[pod.component]
        with monkeypatch.context() as environment:
            for name, value in resolved_env(pod).items():
                environment.setenv(name, value)
            # Exits where the environment does not parse.
            config = parse_config(config_type(service), service, arguments(pod))
        known = config_fields(service)
        read = flattened(asdict(config))
        for name in pod.env:
            prefix, _, field = name.rpartition("__")
            if prefix:
                assert prefix == f"RHIZOME__{service.upper()}"
                assert field.lower() in known, f"{service} has no {field.lower()}"
                assert read[field.lower()] is not None


def test_files_of_an_example_are_what_the_services_read(scenario: str, tmp_path: Path) -> None:
    readers = {
        "tenants.json": read_tenants,
        "pools.json": read_declarations,
        "api-keys.json": lambda path: parse_keys([path.read_bytes()]),
    }
    everything = manifests(scenario)
    for kind, part in (("ConfigMap", "data"), ("Secret", "stringData")):
        for entry in everything.of_kind(kind).values():
            for name, text in entry.get(part, {}).items():
                (tmp_path / name).write_text(text)
                # Raises ValueError where it is wrong.
                assert readers[name](tmp_path / name)


def test_no_container_may_do_more_than_it_must(scenario: str) -> None:
    for pod in manifests(scenario).pods():
        assert pod.spec["enableServiceLinks"] is False
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        may_ask_the_api = pod.spec["automountServiceAccountToken"]
        assert not may_ask_the_api or pod.component in ("scheduler", "controller")
        for container in pod.containers:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"]["drop"] == ["ALL"]


def test_every_port_that_is_probed_or_addressed_is_declared(scenario: str) -> None:
    for pod in manifests(scenario).pods():
        ports = pod.container.get("ports", [])
        declared = {port["name"] for port in ports} | {port["containerPort"] for port in ports}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            (port,) = re.findall(r"'port': '?(\w+)'?", str(pod.container.get(kind, {}))) or [None]
            assert port is None or port in declared or int(port) in declared
        annotation = pod.metadata.get("annotations", {}).get("prometheus.io/port")
        assert annotation is None or int(annotation) == pod.ports["metrics"]


def test_volumes_and_mounts_are_the_same(scenario: str) -> None:
    for pod in manifests(scenario).pods():
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        mounted = {m["name"] for c in pod.containers for m in c.get("volumeMounts", [])}
        assert mounted == volumes, pod.name


def test_selectors_find_the_pods_that_they_mean(scenario: str) -> None:
    everything = manifests(scenario)
    pods = everything.pods()
    for name, service in everything.of_kind("Service").items():
        selected = [pod for pod in pods if matches(service["spec"]["selector"], pod)]
        assert len(selected) == 1, (name, selected)
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in selected[0].ports
    for kind in ("Deployment", "StatefulSet", "DaemonSet"):
        for name, entry in everything.of_kind(kind).items():
            selected = [
                pod for pod in pods if matches(entry["spec"]["selector"]["matchLabels"], pod)
            ]
            assert [pod.name for pod in selected] == [name]


def test_secrets_are_referred_to_and_never_written_out(scenario: str) -> None:
    for pod in manifests(scenario).pods():
        for name, value in pod.env.items():
            if re.search(r"KEY$|TOKEN$|PASSWORD", name):
                assert isinstance(value, dict), f"{name} is plain in {pod.name}"
                assert "secretKeyRef" in value


def test_values_of_an_example_are_few(scenario: str) -> None:
    values = yaml.safe_load((EXAMPLES / scenario / "values.yaml").read_text())
    assert set(values) <= set(yaml.safe_load((CHART / "values.yaml").read_text()))


def matches(selector: dict[str, str], pod: Pod) -> bool:
    return selector.items() <= pod.metadata["labels"].items()


def resolved_env(pod: Pod) -> dict[str, str]:
    """The container's environment as the kubelet would give it."""
    env: dict[str, str] = {}
    for name, value in pod.env.items():
        if isinstance(value, str):
            env[name] = expanded(value, env)
        elif "fieldRef" in value:
            env[name] = FIELDS[value["fieldRef"]["fieldPath"]]
        else:
            env[name] = SECRETS[name]
    return env


def arguments(pod: Pod) -> list[str]:
    given = {**resolved_env(pod), "LWS_LEADER_ADDRESS": "leader.of.set"}
    return [expanded(argument, given) for argument in pod.container.get("args", [])]


def expanded(text: str, env: dict[str, str]) -> str:
    """`$(NAME)` replaced; a name that is not there yet is an error of the chart's."""
    return re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], text)


def flattened(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of nested configurations beside the others, as they are as flags."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
