"""Two gateways and two schedulers with Redis between them: what clients see when one of these goes.

Texts are compared with undisturbed ones. Streams that run need no scheduler, so each drill goes on
with requests that have to be placed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import httpx
import pytest
from openai import APIConnectionError

from tests.fakes.cluster import Cluster, running_cluster
from tests.fakes.redis_process import RedisProcess, needs_redis, running_redis
from tests.faults.streams import Streamed, assert_pause, assert_same, run_rounds, stream

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300), needs_redis]

SCHEDULERS = ("scheduler-0", "scheduler-1")
UP = "rhizome_gateway_redis_up"
ANSWERING = "rhizome_gateway_schedulers_answering"
UNPLACED = "rhizome_gateway_placed_without_scheduler_total"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with running_redis(tmp_path_factory.mktemp("redis")) as process:
        yield process


@pytest.fixture(scope="module")
def cluster(redis: RedisProcess) -> Iterator[Cluster]:
    tenants = {"bounded": {"requests_per_minute": 20}, "counted": {"requests_per_minute": 100_000}}
    with running_cluster(
        num_schedulers=2, num_gateways=2, redis_url=redis.url, tenants=tenants
    ) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, num_streams: int) -> list[Streamed]:
    return run_rounds(cluster.clients, num_streams, lambda: None)


def leader(cluster: Cluster) -> str:
    """The scheduler that all gateways prefer, once they agree on one that leads."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        last = {_preferred(cluster.log(f"gateway-{number}")) for number in range(2)}
        if len(last) == 1 and (name := last.pop()) is not None:
            return name
        time.sleep(0.05)
    raise AssertionError("the gateways prefer no leader")


def _preferred(log: str) -> str | None:
    lines = [line for line in log.splitlines() if "event=scheduler_preferred" in line]
    if not lines or lines[-1].endswith("term=0"):
        return None
    return next(name for name in SCHEDULERS if f"{name}.sock" in lines[-1])


def other(name: str) -> str:
    return SCHEDULERS[1 - SCHEDULERS.index(name)]


def until_metric(cluster: Cluster, name: str, value: float) -> None:
    """Until every gateway shows it."""
    deadline = time.monotonic() + 30
    while any(cluster.metric(number, name) != value for number in range(2)):
        assert time.monotonic() < deadline, f"{name} never became {value}"
        time.sleep(0.05)


def drill(
    cluster: Cluster, undisturbed: list[Streamed], num_streams: int, fault: Callable[[], object]
) -> None:
    disturbed = run_rounds(cluster.clients, num_streams, fault)
    assert_same(disturbed, undisturbed)
    assert_pause(disturbed, undisturbed)


def test_a_killed_redis_is_not_noticed(
    cluster: Cluster, redis: RedisProcess, undisturbed: list[Streamed], num_streams: int
) -> None:
    before = leader(cluster)
    until_metric(cluster, UP, 1)
    drill(cluster, undisturbed, num_streams, redis.kill)
    until_metric(cluster, UP, 0)
    # Who has a limit is served too, and nobody else could take the lead meanwhile.
    assert [ask(url, "counted") for url in cluster.urls] == [200, 200]
    assert leader(cluster) == before
    redis.start()
    until_metric(cluster, UP, 1)


def test_a_stopped_redis_is_not_waited_for(
    cluster: Cluster, redis: RedisProcess, undisturbed: list[Streamed], num_streams: int
) -> None:
    until_metric(cluster, UP, 1)
    try:
        drill(cluster, undisturbed, num_streams, redis.pause)
        until_metric(cluster, UP, 0)
        assert [ask(url, "counted") for url in cluster.urls] == [200, 200]
    finally:
        redis.resume()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_leader_is_replaced_by_the_other_scheduler(
    cluster: Cluster, undisturbed: list[Streamed], num_streams: int, number: signal.Signals
) -> None:
    lost = leader(cluster)
    left = other(lost)
    unplaced = [cluster.metric(gateway, UNPLACED) for gateway in range(2)]
    process = cluster.process(lost)
    try:
        drill(cluster, undisturbed, num_streams, lambda: process.send_signal(number))
        until_metric(cluster, ANSWERING, 1)
        # The other one placed them all, and leads now.
        assert [cluster.metric(gateway, UNPLACED) for gateway in range(2)] == unplaced
        assert leader(cluster) == left
    finally:
        if number == signal.SIGSTOP:
            process.resume()
        else:
            cluster.processes[lost].wait()
            cluster.start(lost)
    until_metric(cluster, ANSWERING, 2)
    # Who comes back does not take the lead from who has it.
    assert leader(cluster) == left


def test_a_killed_gateway_takes_only_its_own_streams(
    cluster: Cluster, undisturbed: list[Streamed], num_streams: int
) -> None:
    doomed, survivor = cluster.clients
    under_way = Barrier(num_streams // 2 + 1)

    def lose(index: int) -> bool:
        try:
            stream(doomed, index, lambda: under_way.wait(60))
        except (APIConnectionError, httpx.TransportError):
            return True
        return False

    def kill() -> None:
        under_way.wait(60)
        cluster.process("gateway-0").kill()

    with ThreadPoolExecutor(num_streams // 2) as pool:
        lost = pool.map(lose, range(num_streams // 2))
        assert_same(run_rounds([survivor], num_streams, kill), undisturbed)
        assert all(lost)
    cluster.processes["gateway-0"].wait()
    cluster.start("gateway-0")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{cluster.urls[0]}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the gateway did not come back")


def test_a_tenants_limit_holds_over_both_gateways(cluster: Cluster) -> None:
    """One after the other: what comes within 100 ms at two gateways may exceed it."""
    statuses: list[int] = []
    for number in range(60):
        statuses.append(ask(cluster.urls[number % 2], "bounded"))
        time.sleep(0.05)
    # A minute's turn may fall between.
    assert 20 <= statuses.count(200) <= 30
    assert set(statuses) == {200, 429}
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda url: ask(url, "free"), cluster.urls * 4)) == {200}


def ask(url: str, tenant: str) -> int:
    """The status of a one-token request."""
    reply = httpx.post(
        f"{url}/generate",
        json={"text": "Hello", "sampling_params": {"max_new_tokens": 1}},
        headers={"x-tenant-id": tenant},
        timeout=60,
    )
    assert reply.status_code == 200 or "retry-after" in reply.headers, reply.text
    return reply.status_code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_scheduler_requests_are_placed_over_the_last_table(
    num_streams: int, undisturbed: list[Streamed], number: signal.Signals
) -> None:
    with running_cluster(num_schedulers=1, num_gateways=1) as alone:
        process = alone.process("scheduler-0")
        disturbed = run_rounds(alone.clients, num_streams, lambda: process.send_signal(number))
        assert_same(disturbed, undisturbed)
        assert alone.metric(0, UNPLACED) >= 3 * num_streams


def test_without_redis_the_next_scheduler_takes_over(
    num_streams: int, undisturbed: list[Streamed]
) -> None:
    with running_cluster(num_schedulers=2, num_gateways=1) as alone:
        disturbed = run_rounds(alone.clients, num_streams, alone.process("scheduler-0").kill)
        assert_same(disturbed, undisturbed)
        assert alone.metric(0, UNPLACED) == 0
