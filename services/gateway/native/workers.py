"""Calls that the native API makes to every worker itself, outside the request pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc
from grpc import aio

from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from services.common.errors import UnavailableError, error_from_rpc
from services.common.rpc import open_channel
from services.gateway.serving import Serving

if TYPE_CHECKING:
    from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

_T = TypeVar("_T")


async def ask_workers(
    serving: Serving, call: Callable[[WorkerServiceAsyncStub], Awaitable[_T]]
) -> list[_T]:
    """Every worker's answer, in the table's order.

    Raises UnavailableError where one does not answer, and what a worker's refusal stands for.
    """
    workers = serving.pipeline.control.table.workers()
    if not workers:
        raise UnavailableError("no worker is registered")

    async def ask(address: str) -> _T:
        async with open_channel(address, serving.tls) as channel:
            return await call(WorkerServiceStub(channel))

    try:
        return await asyncio.gather(*(ask(worker.address) for worker in workers))
    except aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            raise error_from_rpc(error) from error
        raise UnavailableError(f"a worker did not answer: {error.details()}") from error
