"""Follows one worker's cache events and keeps its pages in the index current."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import grpc

from rhizome.cache_index.v1 import cache_index_service_pb2 as index_pb
from rhizome.common.v1 import cache_tier_pb2
from rhizome.worker.v1 import worker_service_pb2 as worker_pb
from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from services.cache_index.holders import GPU, HOST, REMOTE, Holder
from services.cache_index.index import PrefixIndex
from services.common.peer_tls import PeerTls
from services.common.rpc import open_channel

logger = logging.getLogger(__name__)

# Pages applied before the event loop may answer a match: about half a millisecond.
_SLICE_PAGES = 512

# A tier this release does not know is the farthest one.
_TIERS: dict[int, int] = {
    cache_tier_pb2.CACHE_TIER_GPU: GPU,
    cache_tier_pb2.CACHE_TIER_HOST: HOST,
    cache_tier_pb2.CACHE_TIER_REMOTE: REMOTE,
}

_TAKE_A_SNAPSHOT = (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION)


class LostPlaceError(Exception):
    """The stream skipped events, or gave events where a snapshot was asked for."""


class Follower:
    """One worker's event stream: subscribe, apply, resume; a snapshot when it cannot resume.

    Owns the worker's holders in the index. While a snapshot is taken again, the pages known
    before go on answering until the new ones are complete; a first snapshot answers as it
    arrives. `sequence_number` is the last event applied to the holder. `turns` is shared by all
    followers: whoever has applied a slice of pages goes on in its turn, one slice in a pass of
    the event loop, so that matches stay quick while many snapshots load.
    """

    def __init__(
        self,
        index: PrefixIndex,
        worker_id: str,
        address: str,
        turns: asyncio.Lock,
        *,
        tls: PeerTls | None = None,
        first_delay_s: float = 0.1,
        max_delay_s: float = 1.0,
        unreached_s: float = 5.0,
    ) -> None:
        self.worker_id = worker_id
        self.address = address
        self.state = index_pb.FOLLOWER_STATE_CONNECTING
        self.sequence_number = 0
        self.lag_ns = 0
        self.num_resyncs = 0
        self._index = index
        self._turns = turns
        self._tls = tls
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._unreached_s = unreached_s
        # The complete holding, and the one whose snapshot is arriving.
        self._holder: Holder | None = None
        self._loading: Holder | None = None
        # Whether `sequence_number` is a place in the holder's stream to go on from.
        self._can_resume = False
        self._num_snapshots = 0
        self._slice_left = _SLICE_PAGES

    @property
    def holder(self) -> Holder | None:
        """What this follower keeps current; None before the first message."""
        return self._holder or self._loading

    @property
    def epoch(self) -> int:
        return self.holder.epoch if self.holder is not None else 0

    async def run(self) -> None:
        """Follow until cancelled; then the worker's pages leave the index."""
        delay_s = self._first_delay_s
        try:
            async with open_channel(self.address, self._tls) as channel:
                stub = WorkerServiceStub(channel)
                while True:
                    await self._reach(channel)
                    try:
                        await self._follow(stub)
                    except grpc.aio.AioRpcError as error:
                        self._on_broken_stream(error)
                    except LostPlaceError as error:
                        logger.warning("event=lost_place worker=%s %s", self.worker_id, error)
                        self._can_resume = False
                    except Exception:
                        logger.exception("event=follower_failed worker=%s", self.worker_id)
                        self._drop_holder()
                    if self.state == index_pb.FOLLOWER_STATE_LIVE:
                        delay_s = self._first_delay_s
                    self.state = index_pb.FOLLOWER_STATE_CONNECTING
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, self._max_delay_s)
        finally:
            self._drop_holder()

    async def _reach(self, channel: grpc.aio.Channel) -> None:
        """Wait for the worker, and say so where that takes long: nothing else would."""
        try:
            async with asyncio.timeout(self._unreached_s):
                await channel.channel_ready()
        except TimeoutError:
            logger.warning(
                "event=worker_unreached worker=%s address=%s", self.worker_id, self.address
            )
            await channel.channel_ready()

    async def _follow(self, stub: Any) -> None:
        """Apply one stream until it ends."""
        request = worker_pb.WatchCacheEventsRequest(snapshot=True)
        if self._can_resume:
            assert self._holder is not None, "only a complete holding can go on"
            request = worker_pb.WatchCacheEventsRequest(
                after_sequence_number=self.sequence_number, epoch=self._holder.epoch
            )
            self.state = index_pb.FOLLOWER_STATE_LIVE
        else:
            self.num_resyncs += self._num_snapshots > 0
            self._num_snapshots += 1
            self.state = index_pb.FOLLOWER_STATE_SNAPSHOT
        call = stub.WatchCacheEvents(request)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.WhichOneof("message") == "snapshot_chunk":
                    await self._apply_chunk(response.epoch, response.snapshot_chunk)
                else:
                    await self._apply_batch(response.epoch, response.events)
        finally:
            call.cancel()
            if self._loading is not None:
                self._index.retire(self._loading)
                self._loading = None

    async def _apply_chunk(self, epoch: int, chunk: worker_pb.CacheSnapshotChunk) -> None:
        if self._loading is None:
            if self._holder is not None and self._holder.epoch != epoch:
                self._drop_holder()
            self._loading = self._index.add_holder(
                self.worker_id, epoch, visible=self._holder is None
            )
        hashes, parents = list(chunk.prefix_hashes), list(chunk.parent_hashes)
        tiers = list(chunk.tiers)
        for start in range(0, len(hashes), _SLICE_PAGES):
            end = start + _SLICE_PAGES
            self._store_pages(
                self._loading, hashes[start:end], parents[start:end], tiers[start:end]
            )
            await self._give_way(_SLICE_PAGES)
        if chunk.last:
            loaded, self._loading = self._loading, None
            self._drop_holder()
            self._index.show(loaded)
            self._holder, self._can_resume = loaded, True
            self.sequence_number = chunk.sequence_number
            self.state = index_pb.FOLLOWER_STATE_LIVE
            logger.info(
                "event=snapshot worker=%s epoch=%016x sequence_number=%d pages=%d",
                *(self.worker_id, epoch, self.sequence_number, sum(loaded.num_pages)),
            )

    def _store_pages(
        self,
        holder: Holder,
        hashes: Sequence[int],
        parents: Sequence[int],
        tiers: Sequence[int],
    ) -> None:
        """Store pages of a snapshot as runs, each page the child of the one before."""
        starts = [
            i
            for i in range(1, len(hashes))
            if parents[i] != hashes[i - 1] or tiers[i] != tiers[i - 1]
        ]
        for start, end in zip([0, *starts], [*starts, len(hashes)], strict=True):
            tier = _TIERS.get(tiers[start], REMOTE)
            self._index.store(holder, tier, parents[start], hashes[start:end])

    async def _apply_batch(self, epoch: int, batch: worker_pb.CacheEventBatch) -> None:
        holder = self._holder
        if holder is None or holder.epoch != epoch or self._loading is not None:
            raise LostPlaceError("reason=events_without_snapshot")
        skip = self.sequence_number + 1 - batch.first_sequence_number
        if skip < 0:
            raise LostPlaceError(
                f"reason=gap after={self.sequence_number} first={batch.first_sequence_number}"
            )
        for event in batch.events[skip:]:
            await self._apply_event(event)
            self.sequence_number += 1
        self.lag_ns = max(0, time.time_ns() - batch.unix_ns)

    async def _apply_event(self, event: worker_pb.CacheEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "stored":
            await self._apply_stored(event.stored)
        elif kind == "removed":
            await self._apply_removed(event.removed)
        elif kind == "cleared":
            assert self._holder is not None, "events apply to a complete holding"
            self._index.retire(self._holder)
            self._holder = self._index.add_holder(self.worker_id, self._holder.epoch)

    async def _apply_stored(self, stored: worker_pb.PagesStored) -> None:
        assert self._holder is not None, "events apply to a complete holding"
        hashes, parent = list(stored.prefix_hashes), stored.parent_hash
        for start in range(0, len(hashes), _SLICE_PAGES):
            run = hashes[start : start + _SLICE_PAGES]
            self._index.store(self._holder, _TIERS.get(stored.tier, REMOTE), parent, run)
            parent = run[-1]
            await self._give_way(len(run))

    async def _apply_removed(self, removed: worker_pb.PagesRemoved) -> None:
        assert self._holder is not None, "events apply to a complete holding"
        hashes = list(removed.prefix_hashes)
        for start in range(0, len(hashes), _SLICE_PAGES):
            run = hashes[start : start + _SLICE_PAGES]
            self._index.remove(self._holder, _TIERS.get(removed.tier, REMOTE), run)
            await self._give_way(len(run))

    async def _give_way(self, num_pages: int) -> None:
        """After each slice of pages, let matches be answered and other followers go on."""
        self._slice_left -= num_pages
        if self._slice_left <= 0:
            self._slice_left = _SLICE_PAGES
            async with self._turns:
                await asyncio.sleep(0)

    def _on_broken_stream(self, error: grpc.aio.AioRpcError) -> None:
        logger.info(
            "event=stream_broken worker=%s status=%s detail=%r",
            *(self.worker_id, error.code().name, error.details()),
        )
        if error.code() in _TAKE_A_SNAPSHOT:
            self._can_resume = False

    def _drop_holder(self) -> None:
        self._can_resume = False
        if self._holder is not None:
            self._index.retire(self._holder)
            self._holder = None
