"""Charts are rendered by the real `helm`; without it these tests are skipped."""

from __future__ import annotations

import pytest

from tests.chart.rendering import helm_path


@pytest.fixture(autouse=True)
def _needs_helm() -> None:
    if helm_path() is None:
        pytest.skip("no helm on the path, nor among the cluster tests' tools (make cluster-tools)")
