"""SGLang's `/start_profile` and `/stop_profile`: traces of every worker's steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from rhizome.worker.v1.worker_service_pb2 import StartProfileRequest, StopProfileRequest
from services.common.errors import InvalidRequestError, PreconditionError
from services.gateway.exchange import Exchange
from services.gateway.json_body import decode_body
from services.gateway.native.workers import ask_workers
from services.gateway.serving import Serving

if TYPE_CHECKING:
    from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceAsyncStub

_T = TypeVar("_T")

_TEXT = b"text/plain; charset=utf-8"
_MAX_STEPS = 100_000
# A long recording takes a while to write.
_TIMEOUT_S = 300.0


class _StartProfile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The members of SGLang's body that are supported; null means absent."""

    num_steps: int | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None


_decoder = msgspec.json.Decoder(_StartProfile)


async def start_profile(serving: Serving, exchange: Exchange) -> None:
    """GET and POST /start_profile: every worker records its next steps."""
    body = await exchange.body()
    asked = decode_body(_decoder, body) if body.strip() else _StartProfile()
    if asked.num_steps is not None and not 0 < asked.num_steps <= _MAX_STEPS:
        raise InvalidRequestError(f"num_steps must be within 1..{_MAX_STEPS}", "num_steps")
    request = StartProfileRequest(
        num_steps=asked.num_steps or 0,
        with_stack=asked.with_stack,
        record_shapes=asked.record_shapes,
    )

    async def start(stub: WorkerServiceAsyncStub) -> None:
        await stub.StartProfile(request, timeout=_TIMEOUT_S)

    await _ask(serving, start)
    await exchange.reply(200, b"Start profiling.\n", _TEXT)


async def stop_profile(serving: Serving, exchange: Exchange) -> None:
    """GET and POST /stop_profile: answers where each worker's trace is, on its own host."""

    async def stop(stub: WorkerServiceAsyncStub) -> str:
        return (await stub.StopProfile(StopProfileRequest(), timeout=_TIMEOUT_S)).trace_path

    paths = await _ask(serving, stop)
    lines = "".join(f"{path}\n" for path in paths)
    await exchange.reply(200, f"Stop profiling. This wrote:\n{lines}".encode(), _TEXT)


async def _ask(
    serving: Serving, call: Callable[[WorkerServiceAsyncStub], Awaitable[_T]]
) -> list[_T]:
    """Every worker's answer. A refusal is the caller's to mend, so it becomes a 400."""
    try:
        return await ask_workers(serving, call)
    except PreconditionError as error:
        raise InvalidRequestError(error.message) from error
