"""The shared gRPC bootstrap over a real server: errors, cancellation, health, reflection."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rhizome.inference.v1 import inference_service_pb2 as pb, inference_service_pb2_grpc as pb_grpc
from services.common.errors import (
    InvalidRequestError,
    OverloadedError,
    RhizomeError,
    error_from_rpc,
)
from services.common.rpc import RunningServer, open_channel, running_server

Field = descriptor_pb2.FieldDescriptorProto
SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]


class Servicer(pb_grpc.InferenceServiceServicer):
    """Raises what the request's model name says; streams for ever otherwise."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        raise ZeroDivisionError("secret detail")

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        try:
            if request.model == "bad":
                raise InvalidRequestError("wrong", param="top_p")
            if request.model == "full":
                raise OverloadedError("later", retry_after_s=2.5)
            while True:
                await context.write(pb.GenerateResponse(text="x"))
                await asyncio.sleep(0.01)
        finally:
            self.ended.set()


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def server(servicer: Servicer) -> AsyncIterator[RunningServer]:
    def add(server: aio.Server) -> None:
        pb_grpc.add_InferenceServiceServicer_to_server(servicer, server)

    async with running_server(add, [SERVICE], "localhost:0", grace_s=0.1) as running:
        yield running


@pytest.fixture
async def channel(server: RunningServer) -> AsyncIterator[aio.Channel]:
    async with open_channel(f"localhost:{server.port}") as channel:
        yield channel


async def _failure(channel: aio.Channel, model: str) -> RhizomeError:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in pb_grpc.InferenceServiceStub(channel).Generate(
            pb.GenerateRequest(model=model)
        ):
            pass
    return error_from_rpc(caught.value)


async def test_an_error_keeps_its_kind_message_and_parameter(channel: aio.Channel) -> None:
    error = await _failure(channel, "bad")
    assert isinstance(error, InvalidRequestError)
    assert (error.message, error.param) == ("wrong", "top_p")


async def test_an_overload_carries_its_retry_hint(channel: aio.Channel) -> None:
    error = await _failure(channel, "full")
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 2.5


def _google_rpc_types() -> tuple[Any, Any]:
    """google.rpc.Status and RetryInfo, declared as googleapis does."""
    status = descriptor_pb2.FileDescriptorProto(
        name="status.proto", package="google.rpc", syntax="proto3"
    )
    status.dependency.extend(["google/protobuf/any.proto", "google/protobuf/duration.proto"])
    fields = {
        "Status": [
            ("code", 1, Field.TYPE_INT32, Field.LABEL_OPTIONAL, ""),
            ("message", 2, Field.TYPE_STRING, Field.LABEL_OPTIONAL, ""),
            ("details", 3, Field.TYPE_MESSAGE, Field.LABEL_REPEATED, ".google.protobuf.Any"),
        ],
        "RetryInfo": [
            (
                *("retry_delay", 1, Field.TYPE_MESSAGE, Field.LABEL_OPTIONAL),
                ".google.protobuf.Duration",
            ),
        ],
    }
    for message, members in fields.items():
        made = status.message_type.add(name=message)
        for name, number, kind, label, type_name in members:
            made.field.add(
                name=name, number=number, type=kind, label=label, type_name=type_name or None
            )
    pool = descriptor_pool.DescriptorPool()
    for module in (any_pb2, duration_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    pool.Add(status)  # type: ignore[no-untyped-call]
    names = ("google.rpc.Status", "google.rpc.RetryInfo")
    found = [message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names]
    return found[0], found[1]


async def test_an_overload_carries_retry_info_for_any_grpc_client(channel: aio.Channel) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in pb_grpc.InferenceServiceStub(channel).Generate(
            pb.GenerateRequest(model="full")
        ):
            pass
    trailers = dict(caught.value.trailing_metadata() or ())
    status_type, retry_info_type = _google_rpc_types()
    status = status_type.FromString(trailers["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert status.message == caught.value.details() == "later"
    (detail,) = status.details
    assert detail.type_url == "type.googleapis.com/google.rpc.RetryInfo"
    delay = retry_info_type.FromString(detail.value).retry_delay
    assert (delay.seconds, delay.nanos) == (2, 500_000_000)


async def test_an_unknown_error_is_internal_without_its_text(
    channel: aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await pb_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (caught.value.details() or "")
    assert "secret detail" in caplog.text


async def test_a_malformed_message_is_the_callers_fault(channel: aio.Channel) -> None:
    call = channel.unary_unary(f"/{SERVICE.full_name}/ListModels")
    with pytest.raises(aio.AioRpcError) as caught:
        await call(b"\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_cancelled_call_runs_the_servicers_finally(
    channel: aio.Channel, servicer: Servicer
) -> None:
    call = pb_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest(model="stream"))
    await call.read()
    call.cancel()
    await asyncio.wait_for(servicer.ended.wait(), 5)


async def test_pain_23_h_readiness_can_be_flipped(
    channel: aio.Channel, server: RunningServer
) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE.full_name):
        request = health_pb2.HealthCheckRequest(service=service)
        await server.set_ready(True)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        await server.set_ready(False)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_service(channel: aio.Channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
    reply = await call.read()
    assert SERVICE.full_name in [s.name for s in reply.list_services_response.service]


async def test_an_address_in_use_is_an_os_error(server: RunningServer) -> None:
    with pytest.raises(OSError, match="cannot listen"):
        async with running_server(lambda _: None, [], f"localhost:{server.port}"):
            pass


async def test_a_port_that_cannot_be_is_refused_rather_than_another_taken() -> None:
    with pytest.raises(ValueError, match="ports go up to 65535"):
        async with running_server(lambda _: None, [], "localhost:99999"):
            pass
