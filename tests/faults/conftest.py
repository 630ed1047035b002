"""Fault drills run real services as processes; FAULT_SCALE in (0, 1] shrinks them."""

import os

import pytest


@pytest.fixture(scope="session")
def fault_scale() -> float:
    return float(os.environ.get("FAULT_SCALE", "1"))


@pytest.fixture(scope="session")
def num_streams(fault_scale: float) -> int:
    """Streams under way when something fails."""
    return max(4, round(32 * fault_scale))
