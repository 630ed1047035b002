"""Stopped processes, and networks that break, part, delay and lose: what clients see of these.

All services reach each other through proxies. The drills of one system share it, so each also
shows that the one before has left nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil
import pytest

from tests.fakes.cluster import Cluster, running_cluster
from tests.faults.network import FINE, Condition, Link, Network, running_network
from tests.faults.processes import engine_process
from tests.faults.settled import assert_nothing_is_left, busiest_worker, until_ready
from tests.faults.streams import (
    Streamed,
    assert_pause,
    assert_same,
    run_rounds,
    run_streams,
    without_rounds,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


class Net(NamedTuple):
    """A cluster, and the network between its services."""

    cluster: Cluster
    network: Network

    @property
    def num_migrations(self) -> float:
        return self.cluster.metric(0, "rhizome_gateway_migrations_total")


class Between(NamedTuple):
    """The connections between two services."""

    links: list[Link]
    # Which client is meant, where a link serves several.
    only: psutil.Process | None = None


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with (
        running_network() as network,
        running_cluster(
            num_schedulers=1, num_gateways=1, num_tokenizers=2, route=network.route
        ) as cluster,
    ):
        yield Net(cluster, network)


@pytest.fixture(scope="module")
def undisturbed(net: Net, num_streams: int) -> list[Streamed]:
    return run_rounds(net.cluster.clients, num_streams, lambda: None)


def drill(
    net: Net,
    undisturbed: list[Streamed],
    num_streams: int,
    fault: Callable[[], object],
    mend: Callable[[], object],
) -> float:
    """A fault and its end, each under load; returns how many prompts migrated for the fault."""
    counts = [net.num_migrations]

    def end() -> None:
        counts.append(net.num_migrations)
        mend()

    try:
        disturbed = run_rounds(net.cluster.clients, num_streams, fault, end)
    finally:
        mend()
    assert_same(disturbed, undisturbed)
    assert_pause(disturbed, undisturbed)
    before, after = counts
    # Who comes back disturbs nobody.
    assert net.num_migrations == after
    until_ready(net.cluster, 2)
    assert_nothing_is_left(net.cluster)
    return after - before


def stopping_drill(
    net: Net,
    undisturbed: list[Streamed],
    num_streams: int,
    choose: Callable[[], list[psutil.Process]],
) -> float:
    """Processes are stopped, and go on."""
    stopped: list[psutil.Process] = []

    def stop() -> None:
        stopped.extend(choose())
        for process in stopped:
            process.suspend()

    def resume() -> None:
        for process in stopped:
            process.resume()

    return drill(net, undisturbed, num_streams, stop, resume)


@pytest.mark.parametrize("part", ["front and engine", "front", "engine"])
def test_a_stopped_worker_costs_a_pause_and_comes_back(
    net: Net, undisturbed: list[Streamed], num_streams: int, part: str
) -> None:
    def parts() -> list[psutil.Process]:
        front = net.cluster.process(f"worker-{busiest_worker(net.cluster)}")
        engine = engine_process(front)
        return {"front and engine": [front, engine], "front": [front], "engine": [engine]}[part]

    assert stopping_drill(net, undisturbed, num_streams, parts) > 0


@pytest.mark.parametrize("service", ["tokenizer-0", "cache_index-0"])
def test_a_stopped_tokenizer_or_index_moves_no_stream(
    net: Net, undisturbed: list[Streamed], num_streams: int, service: str
) -> None:
    assert (
        stopping_drill(net, undisturbed, num_streams, lambda: [net.cluster.process(service)]) == 0
    )


# The busiest worker and one of the tokenizers; the scheduler and the index are alone.
PAIRS: dict[str, Callable[[Net], Between]] = {
    "gateway-worker": lambda net: _worker_seen_by(net, "gateway-0"),
    "gateway-scheduler": lambda net: Between(net.network.links("gateway", "scheduler")),
    "gateway-tokenizer": lambda net: Between(net.network.links("gateway", "tokenizer-0")),
    "worker-scheduler": lambda net: Between(net.network.links("worker-0", "scheduler")),
    "scheduler-index": lambda net: Between(net.network.links("scheduler", "cache_index")),
    "index-worker": lambda net: _worker_seen_by(net, "cache_index-0"),
}


def _worker_seen_by(net: Net, client: str) -> Between:
    links = net.network.links("*", f"worker-{busiest_worker(net.cluster)}")
    return Between(links, net.cluster.process(client))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_broken_connection_is_resumed_and_not_migrated(
    net: Net, undisturbed: list[Streamed], num_streams: int, pair: str
) -> None:
    num_cut: list[int] = []
    before = net.num_migrations
    disturbed = run_streams(
        net.cluster.clients, num_streams, lambda: num_cut.append(net.network.cut(*PAIRS[pair](net)))
    )
    assert num_cut[0] > 0
    assert_same(disturbed, without_rounds(undisturbed))
    assert_pause(disturbed, undisturbed)
    assert net.num_migrations == before
    assert_nothing_is_left(net.cluster)


def network_drill(
    net: Net,
    undisturbed: list[Streamed],
    num_streams: int,
    condition: Condition,
    between: Callable[[Net], Between],
) -> float:
    """The network is so between two services, and then fine."""

    def disturb() -> None:
        links, only = between(net)
        net.network.set(links, condition, only)

    def mend() -> None:
        net.network.set(net.network.links("", ""), FINE)

    return drill(net, undisturbed, num_streams, disturb, mend)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_partition_costs_a_pause_only(
    net: Net, undisturbed: list[Streamed], num_streams: int, pair: str
) -> None:
    num_migrations = network_drill(
        net, undisturbed, num_streams, Condition(partitioned=True), PAIRS[pair]
    )
    # Only who has lost sight of a worker leaves it.
    assert (num_migrations > 0) == (pair == "gateway-worker")


@pytest.mark.parametrize("condition", [Condition(delay_s=0.05), Condition(loss=0.02)])
def test_delay_and_loss_between_all_services_fail_nothing(
    net: Net, undisturbed: list[Streamed], num_streams: int, condition: Condition
) -> None:
    network_drill(
        net, undisturbed, num_streams, condition, lambda net: Between(net.network.links("", ""))
    )
