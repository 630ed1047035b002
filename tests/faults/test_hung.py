"""Stopped processes, found by their silence: what clients see, and what happens when they go on."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from tests.fakes.cluster import Cluster, running_cluster
from tests.faults.processes import engine_process
from tests.faults.settled import assert_nothing_is_left, until_ready
from tests.faults.streams import Streamed, assert_pause, assert_same, run_rounds

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

MIGRATIONS = "rhizome_gateway_migrations_total"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(num_schedulers=1, num_gateways=1, num_tokenizers=2) as running:
        yield running


@pytest.fixture(scope="module")
def num_streams(fault_scale: float) -> int:
    return max(4, round(32 * fault_scale))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, num_streams: int) -> list[Streamed]:
    return run_rounds(cluster.clients, num_streams, lambda: None)


def drill(
    cluster: Cluster, undisturbed: list[Streamed], num_streams: int, stopped: list[psutil.Process]
) -> None:
    """Stop processes under load; let them go on under load, too."""

    def stop() -> None:
        for process in stopped:
            process.suspend()

    def resume() -> None:
        for process in stopped:
            process.resume()

    try:
        disturbed = run_rounds(cluster.clients, num_streams, stop)
        assert_same(disturbed, undisturbed)
        assert_pause(disturbed, undisturbed)
        before = cluster.metric(0, MIGRATIONS)
        again = run_rounds(cluster.clients, num_streams, resume)
        assert_same(again, undisturbed)
        assert cluster.metric(0, MIGRATIONS) == before
    finally:
        resume()
    assert_nothing_is_left(cluster)


@pytest.mark.parametrize("part", ["front and engine", "front", "engine"])
def test_a_stopped_worker_costs_a_pause_and_comes_back(
    cluster: Cluster, undisturbed: list[Streamed], num_streams: int, part: str
) -> None:
    front = cluster.process("worker-0")
    engine = engine_process(front)
    parts = {"front and engine": [front, engine], "front": [front], "engine": [engine]}
    before = cluster.metric(0, MIGRATIONS)
    drill(cluster, undisturbed, num_streams, parts[part])
    assert cluster.metric(0, MIGRATIONS) > before
    until_ready(cluster, 2)


def test_a_stopped_tokenizer_costs_a_pause_only(
    cluster: Cluster, undisturbed: list[Streamed], num_streams: int
) -> None:
    before = cluster.metric(0, MIGRATIONS)
    drill(cluster, undisturbed, num_streams, [cluster.process("tokenizer-0")])
    assert cluster.metric(0, MIGRATIONS) == before


def test_a_stopped_index_is_not_noticed(
    cluster: Cluster, undisturbed: list[Streamed], num_streams: int
) -> None:
    before = cluster.metric(0, MIGRATIONS)
    drill(cluster, undisturbed, num_streams, [cluster.process("cache_index-0")])
    assert cluster.metric(0, MIGRATIONS) == before
