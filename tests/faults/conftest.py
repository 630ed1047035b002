"""Fault drills run real services as processes; FAULT_SCALE in (0, 1] shrinks them."""

import os

import pytest


@pytest.fixture(scope="session")
def fault_scale() -> float:
    return float(os.environ.get("FAULT_SCALE", "1"))
