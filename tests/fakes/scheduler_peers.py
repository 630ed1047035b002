"""Peers of the scheduler over real gRPC: a worker that only registers, and a cache index."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from grpc import aio

from rhizome.cache_index.v1 import (
    cache_index_service_pb2 as index_pb,
    cache_index_service_pb2_grpc as index_pb_grpc,
)
from rhizome.common.v1.pool_identity_pb2 import PoolIdentity, ProtocolRange
from rhizome.common.v1.worker_role_pb2 import WORKER_ROLE_MIXED
from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.rpc import open_channel, running_server

PAGE_SIZE = 16
_REPORT_INTERVAL_S = 0.1


def make_description(worker_id: str = "w0", **changes: Any) -> pb.WorkerDescription:
    """A description that fits `make_description`'s others; `identity` fields go in as a dict."""
    identity = {
        "served_model_name": "model",
        "model_revision": "r1",
        "tokenizer_digest": "t1",
        "template_digest": "c1",
        "page_size": PAGE_SIZE,
        "hash_version": 1,
        **changes.pop("identity", {}),
    }
    fields: dict[str, Any] = {
        "address": f"localhost:{worker_id}",
        "epoch": 1,
        "protocol": ProtocolRange(min_revision=1, max_revision=1),
        "role": WORKER_ROLE_MIXED,
        "num_pages": 10_000,
        "max_running_sequences": 64,
        "context_length": 100_000,
        "vocab_size": 1000,
        "tp_size": 1,
    }
    return pb.WorkerDescription(
        worker_id=worker_id, identity=PoolIdentity(**identity), **{**fields, **changes}
    )


class RegisteredWorker:
    """One registration stream; its load is what the test says."""

    def __init__(self, description: pb.WorkerDescription, call: Any) -> None:
        self.description = description
        self.load: dict[str, Any] = {"num_free_pages": description.num_pages}
        self._call = call
        self._write_lock = asyncio.Lock()

    async def read(self) -> Any:
        """The scheduler's next message, or aio.EOF."""
        return await self._call.read()

    async def report(
        self, *, admitted: Sequence[int] = (), ended: Sequence[int] = (), **load: Any
    ) -> None:
        """Report now; `load` stays until the next change."""
        self.load.update(load)
        report = pb.LoadReport(
            admitted_reservation_ids=admitted, ended_reservation_ids=ended, **self.load
        )
        async with self._write_lock:
            await self._call.write(pb.RegisterWorkerRequest(load=report))

    async def leave(self) -> None:
        """End the stream as a worker that stops does."""
        await self._call.done_writing()
        while await self._call.read() is not aio.EOF:
            pass

    def vanish(self) -> None:
        """Drop the stream without a word."""
        self._call.cancel()

    async def report_for_ever(self) -> None:
        while True:
            await self.report()
            await asyncio.sleep(_REPORT_INTERVAL_S)


@contextlib.asynccontextmanager
async def registered_worker(
    address: str, description: pb.WorkerDescription, *, silent: bool = False
) -> AsyncIterator[RegisteredWorker]:
    """A worker that registered, and reports its load unless it is `silent`."""
    async with open_channel(address) as channel:
        call = pb_grpc.SchedulerServiceStub(channel).RegisterWorker()
        await call.write(pb.RegisterWorkerRequest(description=description))
        worker = RegisteredWorker(description, call)
        response = await worker.read()
        assert response.HasField("accepted"), response
        reports = None if silent else asyncio.create_task(worker.report_for_ever())
        try:
            yield worker
        finally:
            if reports is not None:
                reports.cancel()
                # A stream that broke ended the reports before.
                await asyncio.gather(reports, return_exceptions=True)
            call.cancel()


class FakeIndex(index_pb_grpc.CacheIndexServiceServicer):
    """Answers from `pages` (first hash -> worker -> pages), or not at all while `hangs`.

    What it did not answer on a call it answers when released. Calls end while `breaks` is set.
    """

    def __init__(self) -> None:
        self.breaks = asyncio.Event()
        self._held: list[index_pb.MatchManyRequest] = []
        self._overdue: list[index_pb.MatchManyRequest] = []
        self.pages: dict[int, Mapping[str, int]] = {}
        self.hangs = False
        self.num_questions = 0
        self.num_chains = 0

    async def MatchPrefix(
        self, request: index_pb.MatchPrefixRequest, context: Any
    ) -> index_pb.MatchPrefixResponse:
        self.num_questions += 1
        self.num_chains += len(request.chains)
        if self.hangs:
            await asyncio.Event().wait()
        return index_pb.MatchPrefixResponse(
            matches=[self._match(chain.prefix_hashes) for chain in request.chains]
        )

    async def MatchMany(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        answering = asyncio.create_task(self._answer(request_iterator, context))
        breaking = asyncio.create_task(self.breaks.wait())
        await asyncio.wait((answering, breaking), return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        breaking.cancel()
        await asyncio.gather(answering, breaking, return_exceptions=True)

    def release(self) -> None:
        """Let the next answer bring those before it that are overdue."""
        self._overdue, self._held = self._held, []

    async def _answer(self, request_iterator: Any, context: Any) -> None:
        async for request in request_iterator:
            self.num_questions += 1
            self.num_chains += len(request.chains)
            if self.hangs:
                self._held.append(request)
                continue
            for question in (*self._overdue, request):
                matches = [self._match(chain.prefix_hashes) for chain in question.chains]
                await context.write(
                    index_pb.MatchManyResponse(number=question.number, matches=matches)
                )
            self._overdue.clear()

    def _match(self, prefix_hashes: Sequence[int]) -> index_pb.ChainMatch:
        held = self.pages.get(prefix_hashes[0], {})
        pages = list(held.values())
        return index_pb.ChainMatch(
            worker_ids=list(held),
            epochs=[1] * len(held),
            gpu_pages=pages,
            host_pages=pages,
            remote_pages=pages,
        )


@contextlib.asynccontextmanager
async def running_index(index: FakeIndex, address: str = "localhost:0") -> AsyncIterator[str]:
    """Serve `index`; yields its address."""

    def add(server: aio.Server) -> None:
        index_pb_grpc.add_CacheIndexServiceServicer_to_server(index, server)

    service = index_pb.DESCRIPTOR.services_by_name["CacheIndexService"]
    async with running_server(add, [service], address, grace_s=0.0) as server:
        yield f"localhost:{server.port}"
