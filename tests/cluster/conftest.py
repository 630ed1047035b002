"""The control plane of the cluster tests: one for the session, a namespace for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane, running_control_plane
from tests.cluster.kubectl import Kubectl
from tests.cluster.programs import missing_tools
from tests.cluster.releases import Release, empty_release, namespace


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here are `cluster` tests; `make test` has none of them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running cluster of `tests.cluster.nodes.NODES`."""
    if reason := missing_tools():
        pytest.skip(reason)
    with running_control_plane(tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture
def kubectl(control_plane: ControlPlane) -> Iterator[Kubectl]:
    """An administrator in a namespace of the test's own."""
    with namespace(control_plane) as place:
        yield place


@pytest.fixture
def release(control_plane: ControlPlane, tmp_path: Path) -> Iterator[Release]:
    """A namespace of the test's own, to install the chart into."""
    with empty_release(control_plane, tmp_path) as empty:
        yield empty
