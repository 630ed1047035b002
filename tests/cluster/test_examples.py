"""The API server takes every object of every example of the chart."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubectl import helm_template
from tests.cluster.releases import CHART

EXAMPLES = sorted(path.parent.name for path in CHART.glob("examples/*/values.yaml"))
# Kinds that other people's controllers bring; their schemas are looked at elsewhere.
FOREIGN = {
    "cert-manager.io",
    "gateway.networking.k8s.io",
    "keda.sh",
    "leaderworkerset.x-k8s.io",
    "monitoring.coreos.com",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_api_server_takes_the_example(example: str, control_plane: ControlPlane) -> None:
    values = CHART / "examples" / example / "values.yaml"
    text = helm_template(CHART, "--values", str(values), "--namespace", "default")
    objects = [entry for entry in yaml.safe_load_all(text) if entry]
    ours = [entry for entry in objects if entry["apiVersion"].partition("/")[0] not in FOREIGN]
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": ours})
    flags = ("--dry-run=server", "--validate=strict", "--filename", "-", "--output=name")
    taken = control_plane.kubectl("create", *flags, text=listed)
    assert len(taken.splitlines()) == len(ours) > 10
