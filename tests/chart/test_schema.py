"""values.schema.json: knows every configuration field, and says what is wrong with values."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.chart.rendering import CHART, HelmError, render, scenarios, template
from tests.chart.services import SERVICES, config_fields, make_schema

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.mark.parametrize("service", sorted(SERVICES.values()))
def test_config_takes_the_fields_of_the_services_configuration(service: str) -> None:
    assert SCHEMA["$defs"][f"{service}_config"] == make_schema.config_schema(service), (
        "`python deploy/helm/make_schema.py`"
    )


@pytest.mark.parametrize("service", sorted(SERVICES.values()))
def test_what_the_chart_sets_itself_are_fields_too(service: str) -> None:
    hidden = make_schema.SET_BY_THE_CHART[service] | make_schema.NEVER_SET[service]
    assert hidden <= config_fields(service)
    assert not make_schema.SET_BY_THE_CHART[service] & make_schema.NEVER_SET[service]


def test_every_field_that_the_chart_takes_over_is_set_in_some_example() -> None:
    seen: dict[str, set[str]] = {service: set() for service in SERVICES.values()}
    for scenario in scenarios():
        for pod in render(CHART / "examples" / scenario / "values.yaml").pods():
            if pod.component in SERVICES:
                names = (name.rpartition("__") for name in pod.env)
                flags = (flag.split("=")[0] for flag in pod.container.get("args", []))
                seen[SERVICES[pod.component]] |= {field.lower() for _, mark, field in names if mark}
                seen[SERVICES[pod.component]] |= {flag[2:].replace("-", "_") for flag in flags}
    seen["tokenizer"] |= _set_fields("tokenizer", chatTemplate="chatml")
    seen["worker"] |= _set_fields("worker", chatTemplate="chatml")
    for service, fields in make_schema.SET_BY_THE_CHART.items():
        assert fields <= seen[service]


def test_no_object_of_the_schema_takes_unknown_keys() -> None:
    # What Kubernetes or another file defines is passed on as it is.
    assert sorted(_open_objects(SCHEMA)) == sorted(
        [
            *("/$defs/objects/items", "/$defs/env/items/properties/valueFrom"),
            "/$defs/group/properties/affinity",
            *(f"/properties/{name}/properties/affinity" for name in _placed()),
            *(
                f"/properties/{name}/properties/autoscaling/properties/{part}"
                for name in ("gateway", "tokenizer")
                for part in ("behavior", "metrics/items")
            ),
            *(
                f"/properties/worker/properties/autoscaling/properties/{part}"
                for part in ("behavior", "hpaMetrics/items", "targets")
            ),
            "/properties/global",
        ]
    )


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"gatway": {}}, "'gatway' not allowed"),
        ({"gateway": {"replica": 2}}, "'replica' not allowed"),
        ({"gateway": {"config": {"port": 80}}}, "'port' not allowed"),
        ({"gateway": {"config": {"max_inflight_requests": "many"}}}, "want null or integer|want"),
        ({"gateway": {"apiKeys": [{"name": "a"}]}}, "missing property"),
        ({"gateway": {"apiKeys": [{"name": "a", "sha256": "abc"}]}}, "does not match pattern"),
        ({"scheduler": {"config": {"policy": "best"}}}, "value must be one of"),
        ({"worker": {"groups": {"Main": {}}}}, "'Main' does not match pattern"),
        ({"worker": {"groups": {"a": {"tpSize": 2}}}}, "'tpSize' not allowed"),
        ({"worker": {"groups": {"a": {"tp": 0}}}}, "minimum: got 0, want 1"),
        ({"worker": {"groups": {"a": {"config": {"nnodes": 2}}}}}, "'nnodes' not allowed"),
        ({"worker": {"groups": {"a": {"role": "both"}}}}, "value must be one of"),
        ({"worker": {"groups": {"a": {"env": {"RHIZOME__WORKER__X": "1"}}}}}, "'not' failed"),
        ({"worker": {"groups": {"a": {"extraEnv": [{"name": "RHIZOME__A"}]}}}}, "'not' failed"),
        ({"telemetry": {"traceSampleRatio": 2}}, "maximum: got 2, want 1"),
        ({"telemetry": {"otlpTracesEndpoint": "http://a:4317"}}, "does not match pattern"),
        ({"tenants": {"a": {"wait": 2}}}, "'wait' not allowed"),
        ({"redis": {"mode": "cluster"}}, "value must be one of"),
        ({"tls": {"source": "none"}}, "value must be one of"),
        ({"model": ""}, "minLength"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(HelmError) as refusal:
        template(values)
    assert any(part in str(refusal.value) for part in complaint.split("|"))


def test_the_values_name_every_key_of_the_schema() -> None:
    missing = set(SCHEMA["properties"]) - {"global"} - set(VALUES)
    assert not missing
    group = SCHEMA["$defs"]["group"]["properties"]
    assert set(group) == set(VALUES["worker"]["groupDefaults"])
    for name, part in SCHEMA["properties"].items():
        if part.get("additionalProperties") is False:
            assert set(part["properties"]) == set(VALUES[name]), name


def _set_fields(component: str, **values: Any) -> set[str]:
    pod = next(pod for pod in render(values).pods() if pod.component == component)
    return {name.rpartition("__")[2].lower() for name in pod.env if "__" in name}


def _placed() -> list[str]:
    return [
        name
        for name, part in SCHEMA["properties"].items()
        if "affinity" in part.get("properties", {})
    ]


def _open_objects(schema: Any, path: str = "") -> list[str]:
    """Paths of objects that allow any key with any value."""
    if not isinstance(schema, dict):
        return []
    found = []
    kind = schema.get("type")
    if kind == "object" and "additionalProperties" not in schema:
        found.append(path)
    for key in ("properties", "$defs"):
        for name, part in schema.get(key, {}).items():
            found += _open_objects(part, f"{path}/{key}/{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found += _open_objects(schema[key], f"{path}/{key}")
    return found
