"""What clients see when a service dies under load: a pause, and the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from tests.e2e.system import System, running_system
from tests.faults.processes import engine_process, service_process
from tests.faults.streams import Streamed, assert_pause, assert_same, run_streams

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pair() -> Iterator[System]:
    """A system with two workers."""
    with running_system("--dp", "2") as system:
        yield system


@pytest.fixture
def undisturbed(pair: System, num_streams: int) -> list[Streamed]:
    return run_streams([pair.openai], num_streams, lambda: None)


def num_migrations(system: System) -> float:
    """Choices that went on after their worker lost them, so far."""
    metrics = httpx.get(f"{system.url}/metrics").text
    name = "rhizome_gateway_migrations_total "
    return float(next(line for line in metrics.splitlines() if line.startswith(name)).split()[1])


def busiest_worker(system: System) -> psutil.Process:
    """Streams may all be on one worker, which has their prefixes from the run before."""
    states = httpx.get(f"{system.url}/get_server_info").json()["internal_states"]
    busiest = max(states, key=lambda state: state["num_running"])
    return service_process(system.process.pid, "services.worker", busiest["worker_id"])


def drill(
    pair: System, undisturbed: list[Streamed], num_streams: int, fault: Callable[[], object]
) -> None:
    disturbed = run_streams([pair.openai], num_streams, fault)
    assert_same(disturbed, undisturbed)
    assert_pause(disturbed, undisturbed)


def test_a_killed_worker_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[Streamed]
) -> None:
    before = num_migrations(pair)
    drill(pair, undisturbed, num_streams, lambda: busiest_worker(pair).kill())
    assert num_migrations(pair) > before


def test_a_killed_engine_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[Streamed]
) -> None:
    def kill() -> None:
        engine_process(busiest_worker(pair)).kill()

    before = num_migrations(pair)
    drill(pair, undisturbed, num_streams, kill)
    assert num_migrations(pair) > before


@pytest.mark.parametrize("module", ["services.scheduler", "services.cache_index"])
def test_a_killed_control_plane_service_is_not_noticed(
    pair: System, num_streams: int, undisturbed: list[Streamed], module: str
) -> None:
    def kill() -> None:
        service_process(pair.process.pid, module).kill()

    drill(pair, undisturbed, num_streams, kill)


def test_a_killed_tokenizer_costs_a_pause_only(
    pair: System, num_streams: int, undisturbed: list[Streamed]
) -> None:
    def kill() -> None:
        service_process(pair.process.pid, "services.tokenizer").kill()

    drill(pair, undisturbed, num_streams, kill)
