"""CacheIndexService over the index: thin, because every microsecond here delays a placement."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from grpc import aio

from rhizome.cache_index.v1 import cache_index_service_pb2 as pb
from rhizome.cache_index.v1.cache_index_service_pb2_grpc import CacheIndexServiceServicer
from rhizome.common.v1 import cache_tier_pb2
from services.cache_index.discovery import Discovery
from services.cache_index.follower import Follower
from services.cache_index.holders import NUM_TIERS
from services.cache_index.index import PrefixIndex
from services.common.spans import NO_TRACER, Tracer

_MATCH_PREFIX = "rhizome.cache_index.v1.CacheIndexService/MatchPrefix"

# By the index's tier.
_TIERS = (
    cache_tier_pb2.CACHE_TIER_GPU,
    cache_tier_pb2.CACHE_TIER_HOST,
    cache_tier_pb2.CACHE_TIER_REMOTE,
)


class CacheIndexServicer(CacheIndexServiceServicer):
    """Answers from the index as it is now."""

    def __init__(
        self, index: PrefixIndex, discovery: Discovery, tracer: Tracer = NO_TRACER
    ) -> None:
        self._index = index
        self._discovery = discovery
        self._tracer = tracer

    async def MatchPrefix(
        self, request: pb.MatchPrefixRequest, context: Any
    ) -> pb.MatchPrefixResponse:
        with self._tracer.begin_call(_MATCH_PREFIX, context):
            return pb.MatchPrefixResponse(matches=self._matches(request.chains))

    async def MatchMany(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        # Reading and writing by hand costs less a message than the iterator does.
        while (request := await context.read()) is not aio.EOF:
            began_ns = time.time_ns() if self._tracer.is_on else 0
            matches = self._matches(request.chains)
            if self._tracer.is_on:
                self._trace(request.chains, matches, began_ns)
            await context.write(pb.MatchManyResponse(number=request.number, matches=matches))

    async def GetIndexStatus(
        self, request: pb.GetIndexStatusRequest, context: Any
    ) -> pb.GetIndexStatusResponse:
        followers = sorted(self._discovery.followers.items())
        return pb.GetIndexStatusResponse(
            followers=[_status(follower) for _, follower in followers],
            num_prefixes=self._index.num_prefixes,
            max_prefixes=self._index.max_prefixes,
        )

    def _trace(
        self, chains: Iterable[pb.HashChain], matches: Iterable[pb.ChainMatch], began_ns: int
    ) -> None:
        """A span for each chain that is recorded; the message's chains were matched together."""
        for chain, match in zip(chains, matches, strict=True):
            if not chain.traceparent:
                continue
            span = self._tracer.begin(_MATCH_PREFIX, chain.traceparent, start_ns=began_ns)
            span.set(
                num_pages=len(chain.prefix_hashes),
                num_workers=len(match.worker_ids),
                longest_match_pages=max(match.host_pages, default=0),
            )
            span.end()

    def _matches(self, chains: Iterable[pb.HashChain]) -> list[pb.ChainMatch]:
        match = self._index.match
        return [
            pb.ChainMatch(
                worker_ids=columns.worker_ids,
                epochs=columns.epochs,
                gpu_pages=columns.gpu_pages,
                host_pages=columns.host_pages,
                remote_pages=columns.remote_pages,
            )
            for columns in [match(chain.prefix_hashes) for chain in chains]
        ]


def _status(follower: Follower) -> pb.FollowerStatus:
    holder = follower.holder
    num_pages = holder.num_pages if holder is not None else [0] * NUM_TIERS
    return pb.FollowerStatus(
        worker_id=follower.worker_id,
        epoch=follower.epoch,
        state=follower.state,
        sequence_number=follower.sequence_number,
        lag_ns=follower.lag_ns,
        pages=[
            pb.PageCount(tier=tier, num_pages=count)
            for tier, count in zip(_TIERS, num_pages, strict=True)
        ],
        num_resyncs=follower.num_resyncs,
    )
