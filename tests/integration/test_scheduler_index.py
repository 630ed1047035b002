"""The scheduler's client of the cache index, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from services.common.rpc import open_channel
from services.scheduler.index_client import IndexClient, WorkerMatch, index_client
from services.scheduler.metrics import SchedulerMetrics
from tests.fakes.scheduler_peers import FakeIndex, running_index

# So long that a busy machine does not turn an answer into a failure.
DEADLINE_S = 0.4


@dataclass
class Fixture:
    index: FakeIndex
    client: IndexClient
    metrics: SchedulerMetrics


@pytest.fixture
async def connected() -> AsyncIterator[Fixture]:
    index, metrics = FakeIndex(), SchedulerMetrics()
    async with running_index(index) as address:
        channel = open_channel(address)
        await channel.channel_ready()
        async with index_client(channel, metrics, DEADLINE_S) as client:
            assert client is not None
            yield Fixture(index, client, metrics)


async def test_concurrent_chains_travel_together_and_keep_their_answers(
    connected: Fixture,
) -> None:
    for first in range(1, 11):
        connected.index.pages[first] = {f"w{first}": first}
    answers = await asyncio.gather(*(connected.client.match([first]) for first in range(1, 11)))
    assert answers == [(WorkerMatch(f"w{first}", 1, first),) for first in range(1, 11)]
    assert (connected.index.num_questions, connected.index.num_chains) == (1, 10)


async def test_a_chain_of_no_pages_is_not_asked(connected: Fixture) -> None:
    assert await connected.client.match([]) == ()
    assert connected.index.num_questions == 0


async def test_a_caller_that_leaves_does_not_spoil_the_others(connected: Fixture) -> None:
    connected.index.pages[2] = {"w": 5}
    leaving = asyncio.create_task(connected.client.match([1]))
    staying = asyncio.create_task(connected.client.match([2]))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying == (WorkerMatch("w", 1, 5),)
    assert connected.index.num_chains == 1


async def test_failures_must_come_in_a_row(connected: Fixture) -> None:
    connected.index.pages[1] = {"w": 5}
    for _ in range(2):
        connected.index.hangs = True
        for _ in range(2):
            assert await connected.client.match([1]) == ()
        connected.index.hangs = False
        assert not connected.client.is_skipped
        assert await connected.client.match([1]) == (WorkerMatch("w", 1, 5),)


async def test_after_three_failures_nobody_waits(connected: Fixture) -> None:
    connected.index.hangs = True
    for _ in range(3):
        await connected.client.match([1])
    asked = connected.index.num_questions
    assert connected.client.is_skipped
    assert await asyncio.gather(*(connected.client.match([1]) for _ in range(50))) == [()] * 50
    assert connected.index.num_questions == asked
    assert connected.metrics.value("index_skipped_total") == 50


async def test_an_answer_that_comes_too_late_is_for_nobody(connected: Fixture) -> None:
    connected.index.pages = {1: {"late": 1}, 2: {"w": 2}}
    connected.index.hangs = True
    assert await connected.client.match([1]) == ()
    connected.index.release()
    connected.index.hangs = False
    assert await connected.client.match([2]) == (WorkerMatch("w", 1, 2),)


async def test_a_broken_call_is_one_failure_and_the_next_question_opens_another(
    connected: Fixture,
) -> None:
    connected.index.pages[1] = {"w": 5}
    connected.index.hangs = True
    questions = [asyncio.create_task(connected.client.match([1])) for _ in range(5)]
    while connected.index.num_chains < 5:
        await asyncio.sleep(0.01)
    connected.index.breaks.set()
    assert await asyncio.gather(*questions) == [()] * 5
    assert connected.metrics.value("index_failures_total") == 1
    connected.index.breaks.clear()
    connected.index.hangs = False
    assert await connected.client.match([1]) == (WorkerMatch("w", 1, 5),)
