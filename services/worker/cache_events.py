"""Which pages this worker holds, told in order to whoever watches.

A ring of the newest events with sequence numbers, and a mirror of all pages held, for
snapshots. Watchers read both at their own pace: one that falls behind the ring is told so, and
nothing waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from rhizome.common.v1 import cache_tier_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import InvalidRequestError, OutOfRangeError, PreconditionError
from services.worker.engine.messages import CacheEvent, PagesRemoved, PagesStored

# Hashes a message carries at most: about 140 KiB of a snapshot.
_CHUNK_HASHES = 8192

_GPU = cache_tier_pb2.CACHE_TIER_GPU


@dataclass(frozen=True, slots=True)
class _Entry:
    event: CacheEvent
    num_hashes: int


class CacheEventLog:
    """Events numbered from 1, and the pages held after the newest one.

    The mirror keeps pages in the order they were stored, so parents come before children: a page
    is stored only while its parent is held, and removed only after its children.
    """

    def __init__(self, epoch: int, max_ring_hashes: int = 262_144) -> None:
        self._epoch = epoch
        self._max_ring_hashes = max_ring_hashes
        # By sequence number, without a gap.
        self._ring: dict[int, _Entry] = {}
        self._ring_hashes = 0
        self._sequence_number = 0
        # Prefix hash to parent's hash.
        self._held: dict[int, int] = {}
        self._changed = asyncio.Event()

    @property
    def sequence_number(self) -> int:
        """Number of the newest event."""
        return self._sequence_number

    @property
    def num_held_pages(self) -> int:
        """Pages in the mirror."""
        return len(self._held)

    def append(self, events: Sequence[CacheEvent]) -> None:
        """Take what a step did to the cache."""
        if not events:
            return
        for event in events:
            entry = _Entry(event, self._apply(event))
            self._sequence_number += 1
            self._ring[self._sequence_number] = entry
            self._ring_hashes += entry.num_hashes
        while self._ring_hashes > self._max_ring_hashes and len(self._ring) > 1:
            oldest = self._ring.pop(self._sequence_number - len(self._ring) + 1)
            self._ring_hashes -= oldest.num_hashes
        # Wakes every watcher that waits, and leaves a fresh event for the next wait.
        self._changed.set()
        self._changed = asyncio.Event()

    def check_start(self, request: pb.WatchCacheEventsRequest) -> None:
        """Refuse a watch that cannot start where it asks."""
        start = request.WhichOneof("start")
        if start is None or (start == "snapshot" and not request.snapshot):
            raise InvalidRequestError(
                "say where to start: after_sequence_number or snapshot", "start"
            )
        if start == "after_sequence_number":
            if request.epoch != self._epoch:
                raise PreconditionError(f"this worker's epoch is {self._epoch}; take a snapshot")
            self._check_held(request.after_sequence_number)

    async def watch(
        self, request: pb.WatchCacheEventsRequest
    ) -> AsyncIterator[pb.WatchCacheEventsResponse]:
        """Messages for one watcher, for ever. Raises OutOfRangeError when it is too slow."""
        self.check_start(request)
        if request.WhichOneof("start") == "snapshot":
            position = self._sequence_number
            for chunk in self._snapshot():
                yield chunk
        else:
            position = request.after_sequence_number
        while True:
            changed = self._changed
            while position < self._sequence_number:
                message, position = self._batch(position)
                yield message
            await changed.wait()

    def _apply(self, event: CacheEvent) -> int:
        """Change the mirror; returns the event's weight in the ring."""
        if isinstance(event, PagesStored):
            parent = event.parent_hash
            for prefix_hash in event.prefix_hashes:
                self._held[prefix_hash] = parent
                parent = prefix_hash
            return 1 + len(event.prefix_hashes)
        if isinstance(event, PagesRemoved):
            for prefix_hash in event.prefix_hashes:
                self._held.pop(prefix_hash, None)
            return 1 + len(event.prefix_hashes)
        self._held.clear()
        return 1

    def _check_held(self, after: int) -> None:
        first_held = self._sequence_number - len(self._ring)
        if not first_held <= after <= self._sequence_number:
            raise OutOfRangeError(
                f"events after {after} are not held (only after {first_held} to "
                f"{self._sequence_number}); take a snapshot"
            )

    def _snapshot(self) -> Iterator[pb.WatchCacheEventsResponse]:
        """Everything held when the first chunk is asked for; the mirror may go on changing."""
        hashes, parents = list(self._held), list(self._held.values())
        sequence_number = self._sequence_number
        for start in range(0, max(1, len(hashes)), _CHUNK_HASHES):
            stop = start + _CHUNK_HASHES
            message = pb.WatchCacheEventsResponse(epoch=self._epoch)
            chunk = message.snapshot_chunk
            chunk.sequence_number = sequence_number
            chunk.prefix_hashes.extend(hashes[start:stop])
            chunk.parent_hashes.extend(parents[start:stop])
            chunk.tiers.extend([_GPU] * len(chunk.prefix_hashes))
            chunk.last = stop >= len(hashes)
            yield message

    def _batch(self, after: int) -> tuple[pb.WatchCacheEventsResponse, int]:
        """The events that follow `after`, as many as one message takes."""
        self._check_held(after)
        message = pb.WatchCacheEventsResponse(epoch=self._epoch)
        batch = message.events
        batch.first_sequence_number = after + 1
        batch.unix_ns = time.time_ns()
        num_hashes = 0
        while after < self._sequence_number:
            entry = self._ring[after + 1]
            if num_hashes and num_hashes + entry.num_hashes > _CHUNK_HASHES:
                break
            _fill(batch.events.add(), entry.event)
            num_hashes += entry.num_hashes
            after += 1
        return message, after


def _fill(message: pb.CacheEvent, event: CacheEvent) -> None:
    if isinstance(event, PagesStored):
        message.stored.parent_hash = event.parent_hash
        message.stored.prefix_hashes.extend(event.prefix_hashes)
        message.stored.tier = _GPU
    elif isinstance(event, PagesRemoved):
        message.removed.prefix_hashes.extend(event.prefix_hashes)
        message.removed.tier = _GPU
    else:
        message.cleared.SetInParent()
