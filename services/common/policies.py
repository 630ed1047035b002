"""The scheduler's policies by name, for its own flags and the launcher's."""

from typing import Literal

PolicyName = Literal[
    "prefix_load",
    "e2",
    "least_loaded",
    "least_outstanding",
    "power_of_two",
    "prefix_threshold",
    "dynamo_cost",
    "session_affinity",
    "prefix_hash",
    "round_robin",
    "random",
]
