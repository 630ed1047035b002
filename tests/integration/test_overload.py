"""Tenants and overload across gateway and scheduler: who is told what, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from rhizome.inference.v1 import inference_service_pb2 as pb
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.errors import OverloadedError, error_from_rpc
from services.common.rpc import open_channel
from services.scheduler.metrics import SchedulerMetrics
from tests.fakes.gateway_stack import GatewayStack, gateway_stack, until

BODY = {"model": "default", "prompt": "What is the capital of France?", "max_tokens": 4}


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[GatewayStack]:
    tenants = tmp_path / "tenants.json"
    policies = {"listed": {"max_queued": 1}, "modest": {"max_priority": 3}}
    tenants.write_text(json.dumps(policies))
    scheduling = {"max_queued_requests": 2, "tenants": tenants}
    async with gateway_stack(scheduling=scheduling, tenants=tenants) as running:
        yield running


@contextlib.asynccontextmanager
async def _client(stack: GatewayStack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30, verify=False) as http:
        yield http


async def _post(http: httpx.AsyncClient, tenant: str = "", **members: Any) -> httpx.Response:
    headers = {"x-tenant-id": tenant} if tenant else {}
    return await http.post("/v1/completions", json={**BODY, **members}, headers=headers)


def _metrics(stack: GatewayStack) -> SchedulerMetrics:
    assert stack.scheduler is not None
    return stack.scheduler.metrics


def _queued(stack: GatewayStack) -> float:
    return sum(
        _metrics(stack).value("queued_requests", priority=name)
        for name in ("high", "normal", "low")
    )


async def _fill(stack: GatewayStack) -> None:
    """The only worker has no room, and the scheduler knows."""
    stack.workers[0].num_claimed = 256
    await until(lambda: stack.pipeline.control.table.workers()[0].num_running >= 256)


async def test_the_tenant_travels_to_the_scheduler_and_the_worker(stack: GatewayStack) -> None:
    async with _client(stack) as http:
        assert (await _post(http, "listed")).status_code == 200
        assert (await _post(http, "team a")).status_code == 200
        native = {"text": "Hello", "sampling_params": {"max_new_tokens": 2}}
        reply = await http.post("/generate", json=native, headers={"X-Tenant-Id": "native"})
        assert reply.status_code == 200
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        reply = await http.post("/v1/chat/completions", json=chat, headers={"x-tenant-id": "chat"})
        assert reply.status_code == 200
    async with open_channel(stack.grpc_address) as channel:
        request = pb.GenerateRequest(text="Hello")
        call = InferenceServiceStub(channel).Generate(request, metadata=(("x-tenant-id", "grpc"),))
        async for _ in call:
            pass
    tenants = [submit.tenant for submit in stack.workers[0].submits]
    assert tenants == ["listed", "team a", "native", "chat", "grpc"]
    value = _metrics(stack).value
    await until(lambda: value("tenant_service_total", tenant="other") > 0)
    assert value("tenant_service_total", tenant="listed") > 0


async def test_a_tenant_that_cannot_be_named_is_refused(stack: GatewayStack) -> None:
    async with _client(stack) as http:
        reply = await _post(http, "x" * 129)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "x-tenant-id"
    async with open_channel(stack.grpc_address) as channel:
        call = InferenceServiceStub(channel).Generate(
            pb.GenerateRequest(text="Hello"), metadata=(("x-tenant-id", "x" * 129),)
        )
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_priority_above_the_tenants_is_refused_by_name(stack: GatewayStack) -> None:
    async with _client(stack) as http:
        assert (await _post(http, "modest", priority=3)).status_code == 200
        assert (await _post(http, "another", priority=4)).status_code == 200
        refused = await _post(http, "modest", priority=4)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "priority"
        native = {"text": "Hello", "priority": 4, "stream": True}
        reply = await http.post("/generate", json=native, headers={"x-tenant-id": "modest"})
        assert reply.status_code == 400
    async with open_channel(stack.grpc_address) as channel:
        call = InferenceServiceStub(channel).Generate(
            pb.GenerateRequest(text="Hello", priority=4), metadata=(("x-tenant-id", "modest"),)
        )
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_full_queue_is_a_429_with_retry_after_and_the_rest_is_served(
    stack: GatewayStack,
) -> None:
    await _fill(stack)
    async with _client(stack) as http:
        waiting = [asyncio.create_task(_post(http, "a")) for _ in range(2)]
        await until(lambda: _queued(stack) == 2)
        refused = await _post(http, "a")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        async with open_channel(stack.grpc_address) as channel:
            call = InferenceServiceStub(channel).Generate(
                pb.GenerateRequest(text="Hello"), metadata=(("x-tenant-id", "a"),)
            )
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata() or ())
        error = error_from_rpc(caught.value)
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s >= 1.0
        stack.workers[0].num_claimed = 0
        assert [(await one).status_code for one in waiting] == [200, 200]


async def test_a_listed_tenants_bound_leaves_the_queue_to_others(stack: GatewayStack) -> None:
    await _fill(stack)
    async with _client(stack) as http:
        first = asyncio.create_task(_post(http, "listed"))
        await until(lambda: _queued(stack) == 1)
        assert (await _post(http, "listed")).status_code == 429
        other = asyncio.create_task(_post(http, "other"))
        await until(lambda: _queued(stack) == 2)
        value = _metrics(stack).value
        assert value("sheds_total", reason="tenant_full", priority="normal") == 1
        stack.workers[0].num_claimed = 0
        assert (await first).status_code == (await other).status_code == 200


async def test_who_is_pushed_out_of_a_full_queue_gets_a_429(stack: GatewayStack) -> None:
    await _fill(stack)
    async with _client(stack) as http:
        flood = [asyncio.create_task(_post(http, "flood", user="f")) for _ in range(2)]
        await until(lambda: _queued(stack) == 2)
        calm = asyncio.create_task(_post(http, "calm"))
        done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        (pushed_out,) = done
        assert pushed_out.result().status_code == 429
        assert "retry-after" in pushed_out.result().headers
        stack.workers[0].num_claimed = 0
        assert (await calm).status_code == 200
        assert sorted([(await one).status_code for one in flood]) == [200, 429]


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once() -> None:
    """The deadline travels as remaining time; the answer comes long before it passes."""
    async with gateway_stack() as stack, _client(stack) as http:
        await _fill(stack)
        worker, value = stack.workers[0], _metrics(stack).value
        waiting = [asyncio.create_task(_post(http)) for _ in range(60)]
        await until(lambda: _queued(stack) == 60)
        # The worker takes a few of them, so that their pace is known.
        while value("drain_rate") == 0:
            worker.num_claimed = 255
            await asyncio.sleep(0.1)
        worker.num_claimed = 256
        await until(lambda: worker.num_live == 0)
        assert _queued(stack) > 20
        timeout = Duration(seconds=1)
        async with open_channel(stack.grpc_address) as channel:
            request = pb.GenerateRequest(text="Hello", timeout=timeout)
            call = InferenceServiceStub(channel).Generate(request)
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "its turn is predicted" in (caught.value.details() or "")
        assert value("sheds_total", reason="deadline", priority="normal") == 1
        worker.num_claimed = 0
        assert {(await one).status_code for one in waiting} == {200}


async def test_pain_18_s_a_client_that_leaves_the_queue_leaves_nothing(
    stack: GatewayStack,
) -> None:
    await _fill(stack)
    async with _client(stack) as http:
        for stream in (False, True):
            waiting = asyncio.create_task(_post(http, stream=stream))
            await until(lambda: _queued(stack) == 1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await until(lambda: _queued(stack) == 0)
            await until(lambda: stack.pipeline.inflight.num_prompts == 0)
        stack.workers[0].num_claimed = 0
        assert (await _post(http)).status_code == 200
        assert len(stack.workers[0].submits) == 1
        await until(lambda: _metrics(stack).value("reservations") == 0)


async def test_pain_19_s_a_stream_that_waits_in_the_queue_gets_comments() -> None:
    async with gateway_stack(keepalive_s=0.2) as stack, _client(stack) as http:
        await _fill(stack)
        body = {**BODY, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.aiter_lines()
            comments = [line async for line in _first(lines, 4) if line]
            assert comments == [": keep-alive"] * 2
            assert stack.workers[0].submits == []
            assert _queued(stack) == 1
            stack.workers[0].num_claimed = 0
            rest = [line async for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"


async def _first(lines: AsyncIterator[str], count: int) -> AsyncIterator[str]:
    for _ in range(count):
        yield await anext(lines)
