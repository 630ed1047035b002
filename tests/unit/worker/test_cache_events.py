"""The event ring and the mirror of held pages."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import InvalidRequestError, OutOfRangeError, PreconditionError
from services.worker.cache_events import CacheEventLog
from services.worker.engine.messages import CacheCleared, CacheEvent, PagesRemoved, PagesStored

EPOCH = 5
SNAPSHOT = pb.WatchCacheEventsRequest(snapshot=True)


def after(sequence_number: int, epoch: int = EPOCH) -> pb.WatchCacheEventsRequest:
    return pb.WatchCacheEventsRequest(after_sequence_number=sequence_number, epoch=epoch)


class Follower:
    """Applies what a watch sends, as the index does, and checks every rule of the wire."""

    def __init__(self, log: CacheEventLog, request: pb.WatchCacheEventsRequest) -> None:
        self.held: dict[int, int] = {}
        self.sequence_number = request.after_sequence_number
        self.num_chunks = 0
        self._messages: AsyncIterator[pb.WatchCacheEventsResponse] = log.watch(request)

    async def catch_up(self, sequence_number: int) -> None:
        while self.sequence_number < sequence_number or not self._complete:
            self._apply(await anext(self._messages))

    _complete = True

    def _apply(self, message: pb.WatchCacheEventsResponse) -> None:
        assert message.epoch == EPOCH
        if message.WhichOneof("message") == "snapshot_chunk":
            chunk = message.snapshot_chunk
            self.num_chunks += 1
            self.sequence_number = chunk.sequence_number
            self._complete = chunk.last
            for prefix_hash, parent in zip(chunk.prefix_hashes, chunk.parent_hashes, strict=True):
                self._store(prefix_hash, parent)
            return
        assert message.events.first_sequence_number == self.sequence_number + 1
        self.sequence_number += len(message.events.events)
        for event in message.events.events:
            if event.HasField("stored"):
                parent = event.stored.parent_hash
                for prefix_hash in event.stored.prefix_hashes:
                    self._store(prefix_hash, parent)
                    parent = prefix_hash
            elif event.HasField("removed"):
                for prefix_hash in event.removed.prefix_hashes:
                    assert prefix_hash not in self.held.values(), "a parent went before its child"
                    del self.held[prefix_hash]
            else:
                self.held.clear()

    def _store(self, prefix_hash: int, parent: int) -> None:
        assert parent == 0 or parent in self.held, "a page was announced without its parent"
        self.held[prefix_hash] = parent


async def test_a_snapshot_and_the_events_after_it_give_what_is_held() -> None:
    log = CacheEventLog(EPOCH)
    log.append([PagesStored(0, [1, 2, 3]), PagesStored(2, [4])])
    follower = Follower(log, SNAPSHOT)
    await follower.catch_up(2)
    assert follower.held == {1: 0, 2: 1, 3: 2, 4: 2}
    log.append([PagesRemoved([3, 4]), PagesStored(2, [5])])
    await follower.catch_up(4)
    assert follower.held == {1: 0, 2: 1, 5: 2}
    log.append([CacheCleared()])
    await follower.catch_up(5)
    assert follower.held == {}


async def test_an_empty_cache_has_an_empty_snapshot() -> None:
    messages = CacheEventLog(EPOCH).watch(SNAPSHOT)
    chunk = (await anext(messages)).snapshot_chunk
    assert chunk.last
    assert not chunk.prefix_hashes


async def test_a_snapshot_is_of_one_moment_whatever_happens_while_it_is_read() -> None:
    log = CacheEventLog(EPOCH)
    log.append([PagesStored(0, list(range(1, 20_001)))])
    messages = log.watch(SNAPSHOT)
    hashes = list((await anext(messages)).snapshot_chunk.prefix_hashes)
    log.append([PagesRemoved(list(range(20_000, 100, -1)))])
    last = False
    while not last:
        chunk = (await anext(messages)).snapshot_chunk
        assert chunk.sequence_number == 1
        hashes += chunk.prefix_hashes
        last = chunk.last
    assert hashes == list(range(1, 20_001))
    assert (await anext(messages)).events.first_sequence_number == 2


async def test_watching_goes_on_after_the_last_event_seen() -> None:
    log = CacheEventLog(EPOCH)
    log.append([PagesStored(0, [1]), PagesStored(1, [2]), PagesStored(2, [3])])
    batch = (await anext(log.watch(after(1)))).events
    assert batch.first_sequence_number == 2
    assert [list(event.stored.prefix_hashes) for event in batch.events] == [[2], [3]]


async def test_a_watcher_waits_for_the_next_event() -> None:
    log = CacheEventLog(EPOCH)
    log.append([PagesStored(0, [1])])
    waiting = asyncio.create_task(anext(log.watch(after(1))))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert not waiting.done()
    log.append([PagesStored(1, [2])])
    assert (await waiting).events.first_sequence_number == 2


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (after(0, epoch=EPOCH + 1), PreconditionError),
        (after(0), OutOfRangeError),
        (after(99), OutOfRangeError),
        (pb.WatchCacheEventsRequest(), InvalidRequestError),
        (pb.WatchCacheEventsRequest(snapshot=False), InvalidRequestError),
    ],
)
async def test_a_watch_that_cannot_start_is_refused(
    request_: pb.WatchCacheEventsRequest, error: type[Exception]
) -> None:
    log = CacheEventLog(EPOCH, max_ring_hashes=4)
    log.append([PagesStored(0, [1, 2, 3]), PagesStored(3, [4, 5, 6])])
    with pytest.raises(error):
        await anext(log.watch(request_))


async def test_a_watcher_that_falls_behind_the_ring_is_told_so() -> None:
    log = CacheEventLog(EPOCH, max_ring_hashes=8)
    messages = log.watch(SNAPSHOT)
    await anext(messages)
    for parent in range(20):
        log.append([PagesStored(parent, [parent + 1])])
    with pytest.raises(OutOfRangeError, match="snapshot"):
        await anext(messages)


async def test_batches_are_bounded() -> None:
    log = CacheEventLog(EPOCH)
    log.append([PagesStored(0, list(range(i * 5000 + 1, i * 5000 + 5001))) for i in range(4)])
    messages = log.watch(after(0))
    assert [len((await anext(messages)).events.events) for _ in range(4)] == [1, 1, 1, 1]


async def test_any_watcher_ends_with_what_a_random_history_holds() -> None:
    draw = random.Random(3)
    log = CacheEventLog(EPOCH, max_ring_hashes=10_000)
    held: dict[int, int] = {}
    followers = [Follower(log, SNAPSHOT)]
    names = iter(range(1, 10_000))
    for _ in range(200):
        events: list[CacheEvent] = []
        for _ in range(draw.randint(0, 3)):
            leaves = [name for name in held if name not in held.values()]
            if leaves and draw.random() < 0.4:
                gone = draw.sample(leaves, draw.randint(1, len(leaves)))
                events.append(PagesRemoved(gone))
                for name in gone:
                    del held[name]
            else:
                parent = draw.choice([0, *held])
                run = [next(names) for _ in range(draw.randint(1, 4))]
                events.append(PagesStored(parent, run))
                for name in run:
                    held[name], parent = parent, name
        log.append(events)
        if draw.random() < 0.1:
            followers.append(Follower(log, SNAPSHOT))
            await followers[-1].catch_up(log.sequence_number)
            assert followers[-1].held == held
        if draw.random() < 0.3:
            follower = draw.choice(followers)
            await follower.catch_up(log.sequence_number)
            assert follower.held == held
    for follower in followers:
        await follower.catch_up(log.sequence_number)
        assert follower.held == held
    assert log.num_held_pages == len(held)
