"""What clients see of a network between the services that breaks, parts, delays and loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil
import pytest

from tests.fakes.cluster import Cluster, running_cluster
from tests.faults.network import FINE, Condition, Link, Network, running_network
from tests.faults.settled import assert_nothing_is_left, until_ready
from tests.faults.streams import Streamed, assert_pause, assert_same, run_rounds

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

MIGRATIONS = "rhizome_gateway_migrations_total"


class Net(NamedTuple):
    """A cluster whose services reach each other through proxies only."""

    cluster: Cluster
    network: Network


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
def num_streams(fault_scale: float) -> int:
    return max(4, round(32 * fault_scale))


@pytest.fixture(scope="module")
def undisturbed(net: Net, num_streams: int) -> list[Streamed]:
    return run_rounds(net.cluster.clients, num_streams, lambda: None)


# One worker and one tokenizer, so that there is another; the scheduler and the index are alone.
PAIRS: dict[str, Callable[[Net], Between]] = {
    "gateway-worker": lambda net: Between(
        net.network.links("*", "worker-0"), net.cluster.process("gateway-0")
    ),
    "gateway-scheduler": lambda net: Between(net.network.links("gateway", "scheduler")),
    "gateway-tokenizer": lambda net: Between(net.network.links("gateway", "tokenizer-0")),
    "worker-scheduler": lambda net: Between(net.network.links("worker-0", "scheduler")),
    "scheduler-index": lambda net: Between(net.network.links("scheduler", "cache_index")),
    "index-worker": lambda net: Between(
        net.network.links("*", "worker-0"), net.cluster.process("cache_index-0")
    ),
}


def drill(
    net: Net,
    undisturbed: list[Streamed],
    num_streams: int,
    fault: Callable[[], object],
    mend: Callable[[], object],
) -> float:
    """A fault and its end, each under load; returns how many prompts migrated."""
    before = net.cluster.metric(0, MIGRATIONS)
    try:
        disturbed = run_rounds(net.cluster.clients, num_streams, fault)
        assert_same(disturbed, undisturbed)
        assert_pause(disturbed, undisturbed)
        assert_same(run_rounds(net.cluster.clients, num_streams, mend), undisturbed)
    finally:
        mend()
    until_ready(net.cluster, 2)
    assert_nothing_is_left(net.cluster)
    return net.cluster.metric(0, MIGRATIONS) - before


@pytest.mark.parametrize("pair", PAIRS)
def test_a_broken_connection_is_resumed_and_not_migrated(
    net: Net, undisturbed: list[Streamed], num_streams: int, pair: str
) -> None:
    links, only = PAIRS[pair](net)
    cut: list[int] = []
    before = net.cluster.metric(0, MIGRATIONS)
    disturbed = run_rounds(
        net.cluster.clients, num_streams, lambda: cut.append(net.network.cut(links, only))
    )
    assert_same(disturbed, undisturbed)
    assert_pause(disturbed, undisturbed)
    assert cut[0] > 0
    assert net.cluster.metric(0, MIGRATIONS) == before
    assert_nothing_is_left(net.cluster)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_partition_costs_a_pause_only(
    net: Net, undisturbed: list[Streamed], num_streams: int, pair: str
) -> None:
    links, only = PAIRS[pair](net)
    num_migrations = drill(
        net,
        undisturbed,
        num_streams,
        lambda: net.network.set(links, Condition(partitioned=True), only),
        lambda: net.network.set(links, FINE),
    )
    # Only who has lost sight of a worker leaves it.
    assert (num_migrations > 0) == (pair == "gateway-worker")


@pytest.mark.parametrize("condition", [Condition(delay_s=0.05), Condition(loss=0.02)])
def test_delay_and_loss_everywhere_fail_nothing(
    net: Net, undisturbed: list[Streamed], num_streams: int, condition: Condition
) -> None:
    everywhere = net.network.links("", "")
    drill(
        net,
        undisturbed,
        num_streams,
        lambda: net.network.set(everywhere, condition),
        lambda: net.network.set(everywhere, FINE),
    )
