"""The other services: addresses, secrets, certificates, probes, rights, policies, routes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import CHART, KUBE_VERSION, HelmError, Manifests, helm, render, template

SCHEDULERS = " ".join(f"rhizome-scheduler-{i}.rhizome-scheduler.llm.svc:30020" for i in range(2))


def policies(values: dict[str, Any]) -> dict[str, list[Any]]:
    found = render(values).of_kind("NetworkPolicy")
    return {name: entry["spec"]["ingress"] for name, entry in found.items()}


def rules(manifests: Manifests, name: str) -> list[tuple[str, str, list[str]]]:
    """What a Role allows: resource, names it is bound to, verbs."""
    return [
        (rule["resources"][0], ",".join(rule.get("resourceNames", [])), rule["verbs"])
        for rule in manifests.get("Role", name)["rules"]
    ]


def test_all_who_ask_schedulers_know_every_one_in_one_order() -> None:
    manifests = render()
    assert manifests.pod("rhizome-gateway").env["RHIZOME__GATEWAY__SCHEDULERS"] == SCHEDULERS
    assert manifests.pod("rhizome-worker-main").env["RHIZOME__WORKER__SCHEDULER"] == SCHEDULERS
    assert manifests.pod("rhizome-cache-index").env["RHIZOME__CACHE_INDEX__SCHEDULER"] == SCHEDULERS
    assert manifests.pod("rhizome-controller").env["RHIZOME__CONTROLLER__SCHEDULER"] == SCHEDULERS


def test_gateways_find_all_ready_tokenizers_however_many_there_are() -> None:
    manifests = render()
    target = manifests.pod("rhizome-gateway").env["RHIZOME__GATEWAY__TOKENIZERS"]
    assert target == "dns+all:rhizome-tokenizer.llm.svc:30010"
    service = manifests.get("Service", "rhizome-tokenizer")["spec"]
    assert service["clusterIP"] == "None"
    assert "publishNotReadyAddresses" not in service


@pytest.mark.parametrize("component", ["gateway", "tokenizer"])
def test_an_autoscaler_alone_says_how_many_replicas_there_are(component: str) -> None:
    manifests = render({component: {"autoscaling": {"enabled": True, "maxReplicas": 5}}})
    name = f"rhizome-{component}"
    assert "replicas" not in manifests.get("Deployment", name)["spec"]
    scaler = manifests.get("HorizontalPodAutoscaler", name)["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert scaler["maxReplicas"] == 5


def test_what_is_addressed_pod_by_pod_has_headless_services() -> None:
    manifests = render()
    for name in ("rhizome-scheduler", "rhizome-worker-main"):
        assert manifests.get("Service", name)["spec"]["clusterIP"] == "None"
        assert manifests.get("StatefulSet", name)["spec"]["serviceName"] == name
    assert "clusterIP" not in manifests.get("Service", "rhizome-gateway")["spec"]


def test_the_gateways_grace_covers_all_that_it_waits_for() -> None:
    config = {"drain_delay_s": 20, "shutdown_grace_s": 90.5}
    pod = render({"gateway": {"config": config, "preStopSeconds": 7}}).pod("rhizome-gateway")
    assert pod.env["RHIZOME__GATEWAY__DRAIN_DELAY_S"] == "20"
    assert pod.container["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "7"]}}
    assert pod.spec["terminationGracePeriodSeconds"] == 7 + 20 + 91 + 10


def test_the_drain_delay_outlasts_the_readiness_probe() -> None:
    pod = render().pod("rhizome-gateway")
    probe = pod.container["readinessProbe"]
    noticed_s = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert float(pod.env["RHIZOME__GATEWAY__DRAIN_DELAY_S"]) > noticed_s


@pytest.mark.parametrize(
    ("values", "scheme"), [({}, "HTTP"), ({"gateway": {"tls": {"secretName": "e"}}}, "HTTPS")]
)
def test_the_gateways_probe_speaks_what_the_gateway_speaks(
    values: dict[str, Any], scheme: str
) -> None:
    manifests = render(values)
    probe = manifests.pod("rhizome-gateway").container["readinessProbe"]["httpGet"]
    assert (probe["path"], probe["scheme"]) == ("/health", scheme)
    url = manifests.pod("rhizome-test-chat").env["URL"]
    assert url == f"{scheme.lower()}://rhizome-gateway.llm.svc:80"


def test_services_with_grpc_are_probed_in_plain_text() -> None:
    for pod in render().pods():
        if pod.component in ("tokenizer", "scheduler", "cache-index", "controller", "worker"):
            probe = pod.container["readinessProbe"]["grpc"]
            service = pod.component.replace("-", "_").upper()
            assert pod.env[f"RHIZOME__{service}__HEALTH_PORT"] == str(probe["port"])
            assert pod.ports["health"] == probe["port"]


def test_certificates_are_made_for_one_name_and_used_by_all() -> None:
    manifests = render()
    secret = manifests.get("Secret", "rhizome-tls")
    assert secret["type"] == "kubernetes.io/tls"
    assert set(secret["data"]) == {"ca.crt", "tls.crt", "tls.key"}
    for pod in manifests.pods():
        if pod.component == "test-chat":
            continue
        service = pod.component.replace("-", "_").upper()
        assert pod.env[f"RHIZOME__{service}__TLS_SERVER_NAME"] == "rhizome.internal"
        (mount,) = (m for m in pod.container["volumeMounts"] if m["name"] == "tls")
        # A directory: the kubelet does not renew files that are mounted one by one.
        assert "subPath" not in mount
        for part, file in (("CERT", "tls.crt"), ("KEY", "tls.key"), ("CA", "ca.crt")):
            path = f"{mount['mountPath']}/{file}"
            assert pod.env[f"RHIZOME__{service}__TLS_{part}_FILE"] == path


def test_cert_manager_makes_the_certificate_where_asked() -> None:
    manifests = render({"tls": {"source": "certManager"}})
    assert ("Secret", "rhizome-tls") not in manifests
    certificate = manifests.get("Certificate", "rhizome-tls")["spec"]
    assert certificate["dnsNames"] == ["rhizome.internal"]
    assert {"server auth", "client auth"} <= set(certificate["usages"])
    assert manifests.get("Issuer", certificate["issuerRef"]["name"])


def test_an_issuer_of_ones_own_is_used() -> None:
    issuer = {"name": "corporate", "kind": "ClusterIssuer"}
    manifests = render({"tls": {"source": "certManager", "certManager": {"issuerRef": issuer}}})
    assert not manifests.of_kind("Issuer")
    assert manifests.get("Certificate", "rhizome-tls")["spec"]["issuerRef"] == issuer


def test_a_missing_secret_of_certificates_is_refused() -> None:
    with pytest.raises(HelmError, match="tls.existingSecret must name a Secret"):
        template({"tls": {"source": "secret"}})


def test_without_tls_nothing_of_it_is_left() -> None:
    assert "tls" not in template({"tls": {"enabled": False}}, "--skip-tests").lower()


def test_keys_are_kept_as_hashes() -> None:
    digest = hashlib.sha256(b"other").hexdigest()
    keys = [{"name": "a", "key": "plain"}, {"name": "b", "tenant": "t", "sha256": digest}]
    text = template({"gateway": {"apiKeys": [*keys, {"name": "c", "key": "k", "admin": True}]}})
    assert "plain" not in text
    manifests = Manifests(text)
    kept = json.loads(manifests.get("Secret", "rhizome-api-keys")["stringData"]["api-keys.json"])
    assert kept == [
        {"name": "a", "sha256": hashlib.sha256(b"plain").hexdigest()},
        {"name": "b", "sha256": digest, "tenant": "t"},
        {"name": "c", "sha256": hashlib.sha256(b"k").hexdigest(), "admin": True},
    ]
    file = manifests.pod("rhizome-gateway").env["RHIZOME__GATEWAY__API_KEYS"]
    assert file == "/etc/rhizome/keys/api-keys.json"


def test_two_sources_of_keys_are_refused() -> None:
    keys = [{"name": "a", "key": "b"}]
    with pytest.raises(HelmError, match="give one of the two"):
        template({"gateway": {"apiKeys": keys, "apiKeysSecret": "mine"}})


def test_no_keys_means_no_file_of_keys() -> None:
    assert "RHIZOME__GATEWAY__API_KEYS" not in render().pod("rhizome-gateway").env


def test_tenants_reach_gateways_and_schedulers_and_a_change_restarts_both() -> None:
    before = render({"tenants": {"a": {"weight": 2}}})
    after = render({"tenants": {"a": {"weight": 3}}})
    config = before.get("ConfigMap", "rhizome-config")["data"]
    assert json.loads(config["tenants.json"]) == {"a": {"weight": 2}}
    for name in ("rhizome-gateway", "rhizome-scheduler"):
        old, new = (each.pod(name).metadata["annotations"] for each in (before, after))
        assert old["checksum/config"] != new["checksum/config"]
    old, new = (each.pod("rhizome-worker-main") for each in (before, after))
    assert old == new


def test_a_new_version_of_the_chart_alone_restarts_nothing() -> None:
    for pod in render().pods():
        assert "helm.sh/chart" not in pod.metadata["labels"] or pod.kind == "Pod"
        assert "app.kubernetes.io/version" not in pod.metadata["labels"] or pod.kind == "Pod"


def test_redis_is_there_only_where_asked() -> None:
    assert ("Deployment", "rhizome-redis") not in render()
    bundled = render({"redis": {"mode": "bundled"}})
    url = bundled.pod("rhizome-gateway").env["RHIZOME__GATEWAY__REDIS_URL"]
    assert url == "redis://rhizome-redis.llm.svc:6379/0"
    assert bundled.get("Service", "rhizome-redis")["spec"]["ports"][0]["port"] == 6379


def test_the_url_of_an_external_redis_stays_in_its_secret() -> None:
    manifests = render({"redis": {"mode": "external", "existingSecret": "r"}})
    url = manifests.pod("rhizome-gateway").env["RHIZOME__GATEWAY__REDIS_URL"]
    assert url == {"secretKeyRef": {"name": "r", "key": "redis-url"}}
    with pytest.raises(HelmError, match="redis.existingSecret must name the Secret"):
        template({"redis": {"mode": "external"}})


def test_schedulers_may_touch_their_lease_only() -> None:
    manifests = render()
    name = manifests.pod("rhizome-scheduler").env["RHIZOME__SCHEDULER__LEADER_LEASE"]
    assert rules(manifests, "rhizome-scheduler") == [
        ("leases", "", ["create"]),
        ("leases", name, ["get", "update"]),
    ]


def test_a_single_scheduler_elects_nobody_and_has_no_token() -> None:
    manifests = render({"scheduler": {"replicas": 1}})
    assert ("Role", "rhizome-scheduler") not in manifests
    pod = manifests.pod("rhizome-scheduler")
    assert pod.spec["automountServiceAccountToken"] is False
    assert "RHIZOME__SCHEDULER__LEADER_LEASE" not in pod.env


def test_the_controller_may_scale_only_where_it_scales() -> None:
    fixed, scaling = (
        rules(render({"worker": {"groups": {"main": bounds}}}), "rhizome-controller")
        for bounds in ({}, {"minReplicas": 1, "maxReplicas": 2})
    )
    assert [rule for rule in scaling if rule not in fixed] == [
        ("statefulsets/scale", "", ["patch"])
    ]
    assert ("leases", "rhizome-controller", ["get", "update"]) in fixed


def test_the_controller_sees_nodes_only_to_force_deletions() -> None:
    assert not render().of_kind("ClusterRole")
    forced = render({"controller": {"config": {"force_delete_after_s": 60}}})
    (role,) = forced.of_kind("ClusterRole").values()
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]


def test_policies_let_in_who_calls_and_nobody_else() -> None:
    callers = {
        name: [
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for peer in ingress[0].get("from", [])
        ]
        for name, ingress in policies({"redis": {"mode": "bundled"}}).items()
    }
    assert callers == {
        "rhizome-gateway": [],
        "rhizome-tokenizer": ["gateway"],
        "rhizome-scheduler": ["gateway", "cache-index", "controller", "worker"],
        "rhizome-cache-index": ["scheduler"],
        "rhizome-controller": [],
        "rhizome-redis": ["gateway", "scheduler"],
        "rhizome-worker": ["gateway", "cache-index"],
    }


def test_policies_know_workers_on_the_host_network_by_their_nodes() -> None:
    groups = {"worker": {"groups": {"main": {"tp": 2, "nodes": 2, "device": "cpu"}}}}
    anyone = policies(groups)["rhizome-scheduler"][0]
    assert anyone == {"ports": [{"port": 30020, "protocol": "TCP"}]}
    known = policies({**groups, "networkPolicy": {"nodeCidrs": ["10.1.0.0/16"]}})
    peers = known["rhizome-scheduler"][0]["from"]
    assert {"ipBlock": {"cidr": "10.1.0.0/16"}} in peers
    assert len(peers) == 5


def test_a_gateway_with_known_callers_still_serves_the_test() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"a": "b"}}}
    (first, *_) = policies({"networkPolicy": {"gatewayFrom": [peer]}})["rhizome-gateway"]
    components = [
        each["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for each in first["from"]
        if "podSelector" in each
    ]
    assert first["from"][0] == peer
    assert components == ["test-chat"]


def test_routes_do_not_cut_or_hold_streams() -> None:
    values = {
        "ingress": {"enabled": True, "host": "llm.example.com"},
        "gatewayApi": {"enabled": True, "parentRefs": [{"name": "g"}]},
    }
    manifests = render(values)
    annotations = manifests.get("Ingress", "rhizome-gateway")["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) >= 3600
    (rule,) = manifests.get("HTTPRoute", "rhizome-gateway")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert ("GRPCRoute", "rhizome-gateway") not in manifests


@pytest.mark.parametrize(
    ("edge", "protocols"), [("", ["http", "kubernetes.io/h2c"]), ("e", ["https", "https"])]
)
def test_the_gateways_service_says_what_it_speaks(edge: str, protocols: list[str]) -> None:
    service = render({"gateway": {"tls": {"secretName": edge}}}).get("Service", "rhizome-gateway")
    assert [port["appProtocol"] for port in service["spec"]["ports"]] == protocols


def test_a_route_without_a_gateway_is_refused() -> None:
    with pytest.raises(HelmError, match="parentRefs must name a Gateway"):
        template({"gatewayApi": {"enabled": True}})


def test_a_gateway_with_tls_is_reached_with_tls() -> None:
    manifests = render({"ingress": {"enabled": True}, "gateway": {"tls": {"secretName": "e"}}})
    annotations = manifests.get("Ingress", "rhizome-gateway")["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/backend-protocol"] == "HTTPS"


@pytest.mark.parametrize(
    ("by", "kind"), [("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")]
)
@pytest.mark.parametrize(
    ("nodes", "target"), [(1, ("StatefulSet", "apps/v1")), (2, ("LeaderWorkerSet", None))]
)
def test_others_scale_worker_groups_where_asked(
    by: str, kind: str, nodes: int, target: tuple[str, str | None]
) -> None:
    group = {"minReplicas": 2, "maxReplicas": 5, "nodes": nodes, "tp": nodes, "device": "cpu"}
    worker = {
        "autoscaling": {"by": by},
        "leaderWorkerSet": {"enabled": True},
        "groups": {"main": group},
    }
    manifests = render({"worker": worker})
    scaled = manifests.get(kind, "rhizome-worker-main")["spec"]
    assert scaled["scaleTargetRef"]["kind"] == target[0]
    assert scaled["scaleTargetRef"]["name"] == "rhizome-worker-main"
    assert target[1] in (scaled["scaleTargetRef"]["apiVersion"], None)
    assert (target[0], "rhizome-worker-main") in manifests
    # Two would undo each other's work.
    assert "rhizome.ai/autoscaling" not in template({"worker": worker})


def test_metrics_are_found_by_annotations_or_a_monitor() -> None:
    for pod in render().pods():
        if pod.component != "test-chat":
            assert pod.metadata["annotations"]["prometheus.io/scrape"] == "true"
    monitor = render({"metrics": {"podMonitor": {"enabled": True}}}).get("PodMonitor", "rhizome")
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"


def test_dashboards_and_rules_of_the_folders_are_shipped() -> None:
    values = {"metrics": {"dashboards": {"enabled": True}, "rules": {"enabled": True}}}
    manifests = render(values)
    boards = [name for entry in manifests.of_kind("ConfigMap").values() for name in entry["data"]]
    assert sorted(boards) == sorted(path.name for path in (CHART / "dashboards").glob("*.json"))
    groups = [
        group
        for path in sorted((CHART / "rules").glob("*.yaml"))
        for group in yaml.safe_load(path.read_text())["groups"]
    ]
    assert manifests.get("PrometheusRule", "rhizome")["spec"]["groups"] == groups


def test_the_notes_say_how_to_send_the_first_request(tmp_path: Path) -> None:
    # helm shows them after an installation only, which takes a cluster.
    chart = shutil.copytree(CHART, tmp_path / "rhizome", ignore=shutil.ignore_patterns("examples"))
    shown = '{{ include (print .Template.BasePath "/NOTES.txt") . | quote }}'
    (chart / "templates" / "shown.yaml").write_text(f"kind: Notes\nnotes: {shown}\n")
    command = ("template", "rhizome", chart, "--kube-version", KUBE_VERSION)
    keys = ("--set", "gateway.apiKeys[0].name=a", "--set", "gateway.apiKeys[0].key=b")
    asked, open_to_all = (
        yaml.safe_load(helm(*command, "--show-only", "templates/shown.yaml", *flags))["notes"]
        for flags in (keys, ())
    )
    for notes in (asked, open_to_all):
        assert "port-forward service/rhizome-gateway 30000:80" in notes
        assert "/v1/chat/completions" in notes
    assert "Authorization: Bearer" in asked
    assert "Nobody is asked for a key" in open_to_all
