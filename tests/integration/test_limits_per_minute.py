"""Tenants' limits per minute over HTTP and gRPC: who is refused, and what is counted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc import aio

from rhizome.inference.v1 import inference_service_pb2 as pb
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.errors import OverloadedError, error_from_rpc
from services.common.rpc import open_channel
from tests.fakes.gateway_stack import GatewayStack, gateway_stack

BODY = {"model": "default", "prompt": "What is the capital of France?", "max_tokens": 4}
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[GatewayStack]:
    tenants = tmp_path / "tenants.json"
    # A request has fewer than 100 tokens, its output included; two have more than 15.
    policies = {"two": {"requests_per_minute": 2}, "few": {"tokens_per_minute": 15}}
    tenants.write_text(json.dumps(policies))
    async with gateway_stack(tenants=tenants) as running:
        yield running


async def complete(stack: GatewayStack, tenant: str, **members: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        return await http.post(
            "/v1/completions", json={**BODY, **members}, headers={"x-tenant-id": tenant}
        )


async def test_the_request_beyond_the_limit_is_a_429_with_retry_after(stack: GatewayStack) -> None:
    assert [(await complete(stack, "two")).status_code for _ in range(2)] == [200, 200]
    refused = await complete(stack, "two")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "2 requests of this minute" in refused.json()["error"]["message"]
    assert (await complete(stack, "another")).status_code == 200
    assert stack.pipeline.inflight.num_prompts == 0


async def test_each_prompt_of_a_request_counts(stack: GatewayStack) -> None:
    assert (await complete(stack, "two", prompt=["a", "b"])).status_code == 200
    assert (await complete(stack, "two")).status_code == 429


async def test_output_tokens_count_once_they_are_known(stack: GatewayStack) -> None:
    statuses = [(await complete(stack, "few")).status_code for _ in range(4)]
    assert statuses[0] == 200
    assert statuses[-1] == 429


async def test_streams_and_grpc_are_held_to_the_same_limit(stack: GatewayStack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        headers = {"x-tenant-id": "two"}
        streamed = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert streamed.status_code == 200
        async with open_channel(stack.grpc_address) as channel:
            stub = InferenceServiceStub(channel)
            request, metadata = pb.GenerateRequest(text="Hello"), (("x-tenant-id", "two"),)
            assert [piece async for piece in stub.Generate(request, metadata=metadata)]
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Generate(request, metadata=metadata).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        refused = error_from_rpc(caught.value)
        assert isinstance(refused, OverloadedError)
        assert refused.retry_after_s >= 1
        streamed = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert streamed.status_code == 429
