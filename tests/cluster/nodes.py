"""The cluster's nodes, which kwok pretends to be, and what it does with pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NUM_GPUS = 8
# By name: rack, zone. Two racks of two nodes in one zone, one rack in another.
PLACES = {
    "node-a": ("rack-1", "zone-1"),
    "node-b": ("rack-1", "zone-1"),
    "node-c": ("rack-2", "zone-1"),
    "node-d": ("rack-2", "zone-1"),
    "node-e": ("rack-3", "zone-2"),
    "node-f": ("rack-3", "zone-2"),
}
RACK_LABEL = "topology.kubernetes.io/rack"
ZONE_LABEL = "topology.kubernetes.io/zone"


def _node(name: str, number: int) -> dict[str, Any]:
    rack, zone = PLACES[name]
    amounts = {
        "cpu": "64",
        "memory": "512Gi",
        "pods": "110",
        "ephemeral-storage": "1Ti",
        "nvidia.com/gpu": str(NUM_GPUS),
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                RACK_LABEL: rack,
                ZONE_LABEL: zone,
            },
        },
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": f"10.1.0.{number}"},
                {"type": "Hostname", "address": name},
            ],
            "capacity": amounts,
            "allocatable": amounts,
        },
    }


NODES = tuple(_node(name, number) for number, name in enumerate(PLACES, start=1))
# Nodes become ready at once; pods do so, those of Jobs and of `helm test` end well.
STAGES = (Path(__file__).parent / "stages.yaml").read_text()
