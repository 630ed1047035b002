"""What the chart gives Prometheus and Grafana is what the repository's files say."""

from __future__ import annotations

import json

import yaml

from tests.chart.rendering import CHART, render

MONITORED = {
    "model": "Qwen/Qwen3-8B",
    "metrics": {
        "podMonitor": {"enabled": True},
        "rules": {"enabled": True},
        "dashboards": {"enabled": True},
    },
}


def test_the_rule_object_has_all_groups_of_all_files() -> None:
    (rules,) = render(MONITORED).of_kind("PrometheusRule").values()
    files = sorted((CHART / "rules").glob("*.yaml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    assert rules["spec"]["groups"] == groups
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)


def test_each_dashboard_is_a_config_map_that_grafanas_sidecar_finds() -> None:
    found = {}
    for map_ in render(MONITORED).of_kind("ConfigMap").values():
        if map_["metadata"]["labels"].get("grafana_dashboard") == "1":
            found |= {name: json.loads(text) for name, text in map_["data"].items()}
    files = (CHART / "dashboards").glob("*.json")
    assert found == {file.name: json.loads(file.read_text()) for file in files}


def test_targets_carry_what_dashboards_choose_by() -> None:
    (monitor,) = render(MONITORED).of_kind("PodMonitor").values()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    # The operator adds `namespace` itself.
    assert {each["targetLabel"] for each in endpoint["relabelings"]} == {"release", "instance"}
