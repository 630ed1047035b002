"""The system that most end-to-end tests share."""

from collections.abc import Iterator

import pytest

from tests.e2e.system import System, running_system


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    with running_system() as system:
        yield system
