"""A mock worker's prefix cache: which pages it would hold, and the events that tell of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from rhizome.common.v1 import cache_tier_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import (
    InvalidRequestError,
    OutOfRangeError,
    PreconditionError,
    RhizomeError,
)
from services.common.prefix_hash import ROOT_HASH

_GPU = cache_tier_pb2.CACHE_TIER_GPU
_SNAPSHOT_CHUNK_PAGES = 4096
_MAX_BATCH_EVENTS = 256


class MockCache:
    """Pages by prefix hash, least recently used first, and a ring of numbered events.

    Invariant: a parent comes after all its children in `_pages`, because each use of a chain
    moves its pages to the end, deepest first. So evicting from the front removes children first,
    and the reverse order announces parents first.
    """

    def __init__(self, epoch: int, num_pages: int, ring_events: int = 4096) -> None:
        self.num_pages = num_pages
        self.sequence_number = 0
        self._epoch = epoch
        self._pages: dict[int, int] = {}
        self._ring: deque[pb.CacheEvent] = deque(maxlen=ring_events)
        self._changed = asyncio.Event()
        self._breaks: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __len__(self) -> int:
        return len(self._pages)

    def use(self, chain: Sequence[int]) -> int:
        """Hold a chain's pages as just used; returns how many leading ones were held before."""
        chain = chain[: self.num_pages]
        num_held = next((i for i, page in enumerate(chain) if page not in self._pages), len(chain))
        parents = (ROOT_HASH, *chain)
        for page, parent in zip(reversed(chain), reversed(parents[: len(chain)]), strict=True):
            self._pages.pop(page, None)
            self._pages[page] = parent
        if num_held < len(chain):
            self._emit(
                pb.CacheEvent(
                    stored=pb.PagesStored(
                        parent_hash=parents[num_held], prefix_hashes=chain[num_held:], tier=_GPU
                    )
                )
            )
        if (excess := len(self._pages) - self.num_pages) > 0:
            self.evict(excess)
        return num_held

    def evict(self, num_pages: int) -> None:
        """Drop the least recently used pages."""
        gone = list(itertools.islice(self._pages, num_pages))
        for page in gone:
            del self._pages[page]
        if gone:
            self._emit(pb.CacheEvent(removed=pb.PagesRemoved(prefix_hashes=gone, tier=_GPU)))

    def clear(self) -> int:
        """Drop everything; returns how many pages that was."""
        num_freed = len(self._pages)
        self._pages.clear()
        self._emit(pb.CacheEvent(cleared=pb.CacheCleared()))
        return num_freed

    def break_watches(self, error: RhizomeError) -> None:
        """End every watch under way, as a broken network would."""
        self._breaks.set_exception(error)
        # Nobody may be watching.
        self._breaks.exception()
        self._breaks = asyncio.get_running_loop().create_future()
        self._wake()

    async def watch(
        self, request: pb.WatchCacheEventsRequest
    ) -> AsyncIterator[pb.WatchCacheEventsResponse]:
        """What one watcher gets, without end."""
        start = request.WhichOneof("start")
        if start == "after_sequence_number":
            if request.epoch != self._epoch:
                raise PreconditionError(f"this worker's epoch is {self._epoch:#x}")
            number = request.after_sequence_number
        elif request.snapshot:
            number = self.sequence_number
            for chunk in self._snapshot():
                yield pb.WatchCacheEventsResponse(epoch=self._epoch, snapshot_chunk=chunk)
        else:
            raise InvalidRequestError("say where to start", "start")
        breaks = self._breaks
        while True:
            oldest = self.sequence_number - len(self._ring) + 1
            if not oldest - 1 <= number <= self.sequence_number:
                raise OutOfRangeError(f"events from {oldest} to {self.sequence_number} are held")
            first = number - oldest + 1
            events = list(itertools.islice(self._ring, first, first + _MAX_BATCH_EVENTS))
            if breaks.done():
                breaks.result()
            if not events:
                await self._changed.wait()
                continue
            batch = pb.CacheEventBatch(
                first_sequence_number=number + 1, events=events, unix_ns=time.time_ns()
            )
            number += len(events)
            yield pb.WatchCacheEventsResponse(epoch=self._epoch, events=batch)

    def _snapshot(self) -> list[pb.CacheSnapshotChunk]:
        pages = list(reversed(self._pages.items()))
        starts = range(0, max(len(pages), 1), _SNAPSHOT_CHUNK_PAGES)
        return [
            pb.CacheSnapshotChunk(
                sequence_number=self.sequence_number,
                prefix_hashes=[page for page, _ in pages[start : start + _SNAPSHOT_CHUNK_PAGES]],
                parent_hashes=[
                    parent for _, parent in pages[start : start + _SNAPSHOT_CHUNK_PAGES]
                ],
                tiers=[_GPU] * len(pages[start : start + _SNAPSHOT_CHUNK_PAGES]),
                last=start == starts[-1],
            )
            for start in starts
        ]

    def _emit(self, event: pb.CacheEvent) -> None:
        self.sequence_number += 1
        self._ring.append(event)
        self._wake()

    def _wake(self) -> None:
        """Wake every watcher that waits, and leave a fresh event for the next wait."""
        self._changed.set()
        self._changed = asyncio.Event()
