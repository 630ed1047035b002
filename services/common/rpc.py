"""gRPC servers and channels: options, the one error interceptor, health, reflection."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.errors import (
    PARAM_METADATA_KEY,
    RETRY_AFTER_METADATA_KEY,
    InvalidRequestError,
    OverloadedError,
    RhizomeError,
)
from services.common.peer_tls import PeerIdentity, PeerTls
from services.common.rotating_channel import RotatingChannel
from services.common.status_details import STATUS_DETAILS_METADATA_KEY, retry_status

logger = logging.getLogger(__name__)

# Wire revisions this release speaks (common.v1.ProtocolRange).
MIN_PROTOCOL_REVISION = 1
MAX_PROTOCOL_REVISION = 1

# Largest message of the multiplexed streams, and of everything else (a 1 M-token prompt's ids).
MAX_FRAME_BYTES = 256 * 1024
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# gRPC takes 8 KiB of trailers, in which a byte of text can take three.
_MAX_DETAILS_BYTES = 1536

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Find a peer that vanished without closing, also on an idle connection.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)
# Reconnect fast: peers are near, and a restarted one should be found within a second.
CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


def open_channel(address: str, tls: PeerTls | None = None, host: str | None = None) -> aio.Channel:
    """A channel to `host:port` or `unix:/path`; with TLS where this service has a certificate.

    Certificates are checked against the host's name, `localhost` for a Unix socket, or against the
    name that all services have. `host` is the name by which an address was found.
    """
    if tls is None:
        return aio.insecure_channel(address, options=CLIENT_OPTIONS)
    options: list[tuple[str, int | str]] = [*CLIENT_OPTIONS]
    name = tls.server_name or host or ("localhost" if address.startswith("unix:") else None)
    if name is not None:
        options.append(("grpc.ssl_target_name_override", name))

    def connect(identity: PeerIdentity) -> aio.Channel:
        return aio.secure_channel(address, identity.channel_credentials, options=options)

    return RotatingChannel(lambda: tls.identity, connect)


class StatusInterceptor(aio.ServerInterceptor):
    """Turns `RhizomeError` into its status and anything else into INTERNAL without detail."""

    def __init__(self) -> None:
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(  # type: ignore[override]  # the stub's type variables fit no wrapper
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = str(handler_call_details.method)
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler: Any = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = _wrap(handler, method)
        return wrapped


def _wrap(handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """`handler` with errors mapped; made once a method, because this runs for every call."""
    inner = (
        handler.stream_stream or handler.unary_stream or handler.stream_unary or handler.unary_unary
    )
    # A whole request is parsed inside the error mapping: malformed bytes are the caller's.
    deserialize = handler.request_deserializer
    parse = _identity if handler.request_streaming else _parser(deserialize)

    async def stream(request: Any, context: Any) -> None:
        async with _abort_on_error(context, method):
            result = inner(parse(request), context)
            if hasattr(result, "__aiter__"):
                async for response in result:
                    await context.write(response)
            else:
                await result

    async def unary(request: Any, context: Any) -> Any:
        async with _abort_on_error(context, method):
            return await inner(parse(request), context)

    factory = _FACTORIES[bool(handler.request_streaming), bool(handler.response_streaming)]
    return factory(
        stream if handler.response_streaming else unary,
        deserialize if handler.request_streaming else None,
        handler.response_serializer,
    )


# By (request is a stream, response is a stream).
_FACTORIES: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _identity(request: Any) -> Any:
    return request


def _parser(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            raise InvalidRequestError(f"the request does not parse: {error}") from error

    return parse


def _details(error: RhizomeError) -> str:
    """The message, cut to what fits; with more, the caller gets RESOURCE_EXHAUSTED instead."""
    return error.message.encode(errors="replace")[:_MAX_DETAILS_BYTES].decode(errors="ignore")


@contextlib.asynccontextmanager
async def _abort_on_error(context: Any, method: str) -> AsyncIterator[None]:
    try:
        yield
    except RhizomeError as error:
        await context.abort(error.status, _details(error), _trailers(error))
    except aio.AbortError:
        raise
    except Exception:
        logger.exception("event=rpc_failed method=%s", method)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")


def _trailers(error: RhizomeError) -> tuple[tuple[str, str | bytes], ...]:
    if isinstance(error, InvalidRequestError) and error.param is not None:
        return ((PARAM_METADATA_KEY, error.param),)
    if isinstance(error, OverloadedError):
        details = retry_status(error.code, _details(error), error.retry_after_s)
        return (
            (RETRY_AFTER_METADATA_KEY, str(int(error.retry_after_s * 1000))),
            (STATUS_DETAILS_METADATA_KEY, details),
        )
    return ()


class RunningServer:
    """A started gRPC server with health and reflection.

    `port` is the bound port, 0 for a Unix socket; `health_port` that of the health checks alone.
    `set_ready` flips readiness (the health of "" and of every service) without touching calls in
    flight.
    """

    def __init__(
        self,
        port: int,
        health_port: int | None,
        health_servicer: health.aio.HealthServicer,
        names: list[str],
    ):
        self.port = port
        self.health_port = health_port
        self._health = health_servicer
        self._names = names

    async def set_ready(self, ready: bool) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, serving if ready else not_serving)


@contextlib.asynccontextmanager
async def running_server(
    add_servicers: Callable[[aio.Server], None],
    services: Iterable[ServiceDescriptor],
    address: str,
    *,
    ready: bool = True,
    grace_s: float = 1.0,
    credentials: grpc.ServerCredentials | None = None,
    health_port: int | None = None,
) -> AsyncIterator[RunningServer]:
    """Serve on `address` (`host:port`, port 0 picks one, or `unix:/path`) until the block ends.

    `services` are the proto descriptors (`worker_service_pb2.DESCRIPTOR.services_by_name[...]`).
    Without `credentials` it speaks plain text. `health_port` answers health checks in plain text on
    all addresses, for probes that speak no TLS. Raises OSError when an address cannot be bound,
    ValueError for a port that cannot be.
    """
    server = aio.server(interceptors=[StatusInterceptor()], options=SERVER_OPTIONS)
    add_servicers(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = ["", *(service.full_name for service in services)]
    reflection.enable_server_reflection(
        (*names[1:], health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    port = _bind(server, address, credentials)
    async with _health_server(health_servicer, health_port) as bound_health_port:
        await server.start()
        running = RunningServer(
            0 if address.startswith("unix:") else port, bound_health_port, health_servicer, names
        )
        await running.set_ready(ready)
        try:
            yield running
        finally:
            await running.set_ready(False)
            await server.stop(grace_s)


@contextlib.asynccontextmanager
async def _health_server(
    health_servicer: health.aio.HealthServicer, port: int | None
) -> AsyncIterator[int | None]:
    if port is None:
        yield None
        return
    server = aio.server(options=SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    bound = _bind(server, f"[::]:{port}", None)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


def _bind(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    port_text = address.rpartition(":")[2]
    if not address.startswith("unix:") and port_text.isdecimal() and int(port_text) > 65535:
        # gRPC would take the port modulo 65536.
        raise ValueError(f"cannot listen on {address}: ports go up to 65535")
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
