"""What the gateway counts of requests: by model, listed tenant and outcome, under both names."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest

from rhizome.inference.v1 import inference_service_pb2 as pb
from rhizome.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.rpc import open_channel
from tests.fakes.gateway_stack import PAGE_SIZE, GatewayStack, answer_ids, gateway_stack, until

CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hello"}]}
PATH = "/v1/chat/completions"
GRPC = "/rhizome.inference.v1.InferenceService/Generate"


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[GatewayStack]:
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"gold": {}, "few": {"requests_per_minute": 1}}))
    async with gateway_stack(tenants=tenants) as running:
        yield running


async def chat(stack: GatewayStack, tenant: str = "", **members: object) -> httpx.Response:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        headers = {"x-tenant-id": tenant} if tenant else {}
        return await http.post(PATH, json={**CHAT, **members}, headers=headers)


def value(stack: GatewayStack, name: str, **labels: str) -> float | None:
    return stack.pipeline.metrics.registry.get_sample_value(name, labels)


def prompts(stack: GatewayStack, tenant: str, outcome: str) -> float | None:
    labels = {"model": "scripted", "tenant": tenant, "outcome": outcome}
    return value(stack, "rhizome_gateway_prompts_total", **labels)


async def test_prompts_are_counted_by_listed_tenant_and_how_they_ended(stack: GatewayStack) -> None:
    for tenant in ("gold", "gold", "few", "few", "unheard-of", ""):
        await chat(stack, tenant)
    assert [prompts(stack, tenant, "ok") for tenant in ("gold", "few", "other", "none")] == [
        *(2, 1, 1, 1)
    ]
    assert prompts(stack, "few", "overloaded") == 1
    assert prompts(stack, "unheard-of", "ok") is None
    for name in ("queue_seconds", "time_to_first_token_seconds", "request_latency_seconds"):
        labels = {"model": "scripted", "tenant": "gold"}
        assert value(stack, f"rhizome_gateway_{name}_count", **labels) == 2
    output = value(stack, "rhizome_gateway_output_tokens_total", model="scripted", tenant="gold")
    assert output == 2 * len(answer_ids())


async def test_a_failure_in_mid_stream_is_no_success(stack: GatewayStack) -> None:
    worker = stack.workers[0]
    for code, outcome, status in (
        (grpc.StatusCode.INTERNAL, "failed", "500"),
        (grpc.StatusCode.INVALID_ARGUMENT, "refused", "400"),
    ):
        worker.fail_at = (5, int(code.value[0]), "no more")
        assert (await chat(stack, stream=True)).status_code == 200
        assert prompts(stack, "none", outcome) == 1
        counted = value(stack, "rhizome_gateway_requests_total", endpoint=PATH, status=status)
        assert counted == 1
    assert prompts(stack, "none", "ok") is None
    assert value(stack, "rhizome_gateway_requests_total", endpoint=PATH, status="200") is None


async def test_grpc_calls_are_counted_by_their_status(stack: GatewayStack) -> None:
    async with open_channel(stack.grpc_address) as channel:
        stub = InferenceServiceStub(channel)
        assert [piece async for piece in stub.Generate(pb.GenerateRequest(text="Hello"))]
        with pytest.raises(grpc.RpcError):
            await stub.Generate(pb.GenerateRequest()).read()
    for status in ("OK", "INVALID_ARGUMENT"):
        assert value(stack, "rhizome_gateway_requests_total", endpoint=GRPC, status=status) == 1


async def test_whoever_leaves_is_cancelled_and_nothing_stays_queued_or_running() -> None:
    async with gateway_stack(step_s=0.02) as stack:
        task = asyncio.create_task(chat(stack, ignore_eos=True))
        await until(lambda: stack.workers[0].num_live == 1)
        assert value(stack, "rhizome_gateway_running_prompts") == 1
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: prompts(stack, "none", "cancelled") == 1)
        for name in ("queued_prompts", "running_prompts", "inflight_prompts"):
            await until(lambda name=name: value(stack, f"rhizome_gateway_{name}") == 0)  # type: ignore[misc]
        assert value(stack, "sglang:num_aborted_requests_total", model_name="scripted") == 1


async def test_sglangs_names_sum_up_what_tenants_had(stack: GatewayStack) -> None:
    stack.workers[0].cached_tokens = 3
    for tenant in ("gold", "few", ""):
        await chat(stack, tenant)
    model = {"model_name": "scripted"}
    assert value(stack, "sglang:num_requests_total", **model) == 3
    assert value(stack, "sglang:num_aborted_requests_total", **model) == 0
    assert value(stack, "sglang:generation_tokens_total", **model) == 3 * len(answer_ids())
    cached = value(stack, "sglang:cached_tokens_total", cache_source="device", **model)
    assert cached == 9
    prompt_tokens = value(stack, "sglang:prompt_tokens_total", **model)
    assert prompt_tokens == sum(len(submit.token_ids) for submit in stack.workers[0].submits)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert value(stack, f"sglang:{name}_count", **model) == 3
        assert value(stack, f"sglang:{name}_bucket", le="+Inf", **model) == 3
        assert value(stack, f"sglang:{name}_sum", **model) > 0  # type: ignore[operator]


async def test_an_endpoint_picker_finds_what_it_needs(stack: GatewayStack) -> None:
    (worker,) = stack.pipeline.control.table.workers()
    assert worker.num_pages > 0
    labels = {"model": "scripted", "block_size": str(PAGE_SIZE)}
    info = value(
        stack,
        "rhizome_gateway_cache_config_info",
        num_gpu_blocks=str(worker.num_pages),
        **labels,
    )
    assert info == 1
    worker.num_used_pages = worker.num_pages // 2
    used = value(stack, "rhizome_gateway_kv_used_ratio", model="scripted")
    assert used == pytest.approx(0.5, abs=0.01)
    for name in ("queued_prompts", "running_prompts"):
        assert value(stack, f"rhizome_gateway_{name}") == 0
