"""What gateways and schedulers share through a real redis-server, and what is left without it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from rhizome.scheduler.v1.scheduler_service_pb2 import WatchWorkersRequest, WatchWorkersResponse
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from services.common.errors import OverloadedError
from services.common.rpc import open_channel
from services.common.shared_store import SharedStore, StoreDownError
from services.common.tenants import TenantPolicy, TenantSet
from services.gateway.metrics import GatewayMetrics
from services.gateway.rate_limits import RateLimits
from services.scheduler.config import SchedulerConfig
from services.scheduler.leadership import Leadership
from services.scheduler.redis_lease import RedisLease
from services.scheduler.service import running_scheduler
from tests.fakes.gateway_stack import until
from tests.fakes.redis_process import RedisProcess, needs_redis, running_redis
from tests.fakes.scheduler_peers import make_description, registered_worker

pytestmark = needs_redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    with running_redis(tmp_path) as process:
        yield process


@pytest.fixture
async def store(redis: RedisProcess) -> AsyncIterator[SharedStore]:
    shared = make_store(redis)
    yield shared
    await shared.aclose()


def make_store(redis: RedisProcess) -> SharedStore:
    """One that tries again at once."""
    return SharedStore(redis.url, CollectorRegistry(), "test", timeout_s=0.2, retry_s=0.0)


async def test_replies_come_in_the_order_of_the_commands(store: SharedStore) -> None:
    replies = await store.execute(("SET", "a", 1), ("INCRBY", "a", 4), ("GET", "a"))
    assert replies == [True, 5, b"5"]
    assert store.is_up


async def test_a_command_that_redis_refuses_is_a_failure(store: SharedStore) -> None:
    with pytest.raises(StoreDownError):
        await store.execute(("NONSENSE",))
    assert not store.is_up


@pytest.mark.parametrize("fault", ["kill", "pause"])
async def test_the_store_comes_back_with_redis(
    redis: RedisProcess, store: SharedStore, fault: str
) -> None:
    await store.execute(("SET", "a", 1))
    getattr(redis, fault)()
    for _ in range(2):
        with pytest.raises(StoreDownError):
            await store.execute(("GET", "a"))
    assert not store.is_up
    if fault == "kill":
        redis.start()
    else:
        redis.resume()
    assert await store.execute(("SET", "b", 2), ("GET", "b")) == [True, b"2"]
    assert store.is_up


class Candidate:
    """A scheduler's standing, driven by hand."""

    def __init__(self, store: SharedStore, settle_s: float = 0.0) -> None:
        self.has_ready_worker = True
        self.told: list[int] = []
        self.leadership = Leadership(
            RedisLease(store, duration_s=0.3),
            lambda: self.has_ready_worker,
            self.told.append,
            settle_s=settle_s,
        )

    @property
    def term(self) -> int:
        return self.leadership.term

    async def stand(self) -> None:
        await self.leadership.stand()


async def test_one_leads_and_the_other_follows_with_a_higher_term(store: SharedStore) -> None:
    first, second = Candidate(store), Candidate(store)
    await first.stand()
    await second.stand()
    assert first.term > 0
    assert second.term == 0
    term = first.term
    await first.stand()
    assert (first.term, first.told) == (term, [term])
    await first.leadership.resign()
    await second.stand()
    assert first.told == [term, 0]
    assert second.term > term


async def test_a_leader_that_says_nothing_loses_its_lease(store: SharedStore) -> None:
    first, second = Candidate(store), Candidate(store)
    await first.stand()
    term = first.term
    async with asyncio.timeout(10):
        while not second.term:
            await second.stand()
            await asyncio.sleep(0.05)
    assert second.term > term
    await first.stand()
    assert first.term == 0


async def test_who_has_no_worker_does_not_lead(store: SharedStore) -> None:
    first, second = Candidate(store), Candidate(store)
    await first.stand()
    first.has_ready_worker = False
    await first.stand()
    await second.stand()
    assert (first.term == 0, second.term > 0) == (True, True)


async def test_who_has_just_met_its_workers_does_not_lead(store: SharedStore) -> None:
    candidate = Candidate(store, settle_s=0.2)
    await candidate.stand()
    assert candidate.term == 0
    async with asyncio.timeout(10):
        while not candidate.term:
            await asyncio.sleep(0.05)
            await candidate.stand()


async def test_a_leader_that_ends_leaves_the_lease_to_the_next(store: SharedStore) -> None:
    first, second = Candidate(store), Candidate(store)
    standing = asyncio.create_task(first.leadership.run())
    await until(lambda: first.term)
    standing.cancel()
    await asyncio.gather(standing, return_exceptions=True)
    await second.stand()
    assert second.term > 0


async def test_of_two_schedulers_one_tells_its_watchers_that_it_leads(redis: RedisProcess) -> None:
    async with contextlib.AsyncExitStack() as stack:
        schedulers, stubs = [], []
        for _ in range(2):
            config = SchedulerConfig(listen="localhost:0", redis_url=redis.url)
            schedulers.append(await stack.enter_async_context(running_scheduler(config)))
            address = f"localhost:{schedulers[-1].server.port}"
            await stack.enter_async_context(registered_worker(address, make_description()))
            channel = await stack.enter_async_context(open_channel(address))
            stubs.append(SchedulerServiceStub(channel))
        await until(lambda: sum(each.metrics.value("leads") for each in schedulers) == 1)
        leads = [each.metrics.value("leads") for each in schedulers]
        for stub, expected in zip(stubs, leads, strict=True):
            response = await stub.WatchWorkers(WatchWorkersRequest()).read()
            assert isinstance(response, WatchWorkersResponse)
            assert (response.leader_term > 0) == bool(expected)


async def test_the_leader_stays_while_redis_is_down_and_a_new_one_is_above_it(
    redis: RedisProcess, store: SharedStore
) -> None:
    first, second = Candidate(store), Candidate(store)
    await first.stand()
    term = first.term
    redis.kill()
    await first.stand()
    await second.stand()
    assert (first.term, second.term) == (term, 0)
    # What Redis held is lost: the new term is above the old all the same.
    redis.start()
    await second.stand()
    assert second.term > term
    await first.stand()
    assert first.term == 0


class Clock:
    """Wall time, at the start of a minute."""

    now = 6000.0

    def __call__(self) -> float:
        return self.now


def make_limits(clock: Clock) -> RateLimits:
    tenants = TenantSet({"t": TenantPolicy(requests_per_minute=10)})
    return RateLimits(tenants, GatewayMetrics(), clock)


def spend(rates: RateLimits, number: int) -> int:
    """Requests of so many that pass."""
    for count in range(number):
        try:
            rates.require("t")
        except OverloadedError:
            return count
        rates.charge("t", num_requests=1)
    return number


async def exchange(store: SharedStore, *gateways: RateLimits) -> None:
    """Each in turn asks for the tenant, as a request that comes does, and tells and learns."""
    for rates in gateways:
        with contextlib.suppress(OverloadedError):
            rates.require("t")
        await rates.exchange(store)


async def test_gateways_count_a_tenant_together(store: SharedStore) -> None:
    clock = Clock()
    one, other = make_limits(clock), make_limits(clock)
    assert spend(one, 6) == 6
    assert spend(other, 1) == 1
    await exchange(store, one, other)
    assert spend(other, 10) == 3
    await exchange(store, other, one)
    assert spend(one, 10) == 0
    # A minute later half of what both had still counts, also where the tenant is new.
    clock.now += 90
    new = make_limits(clock)
    await exchange(store, new)
    assert spend(new, 10) == 5


async def test_without_redis_each_gateway_goes_on_with_what_it_knows(
    redis: RedisProcess, store: SharedStore
) -> None:
    clock = Clock()
    one, other = make_limits(clock), make_limits(clock)
    assert (spend(one, 4), spend(other, 4)) == (4, 4)
    await exchange(store, one, other, one)
    redis.kill()
    assert spend(one, 10) == 2
    await one.exchange(store)
    # Redis comes back without its data, and hears everything again.
    redis.start()
    await exchange(store, one, other)
    assert (spend(one, 10), spend(other, 10)) == (0, 2)
    await exchange(store, one, other)
    new = make_limits(clock)
    await exchange(store, new)
    assert spend(new, 10) == 0
