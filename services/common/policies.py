"""The scheduler's policies by name, for its own flags and the launcher's."""

from typing import Literal

PolicyName = Literal["prefix_load", "least_loaded", "power_of_two", "round_robin", "random"]
