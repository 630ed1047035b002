"""What probes see of a gateway: its workers' state, and its own end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.rpc import open_channel
from services.gateway.config import GatewayConfig
from services.gateway.gateway import RunningGateway, running_gateway
from tests.fakes.gateway_stack import GatewayStack, gateway_stack, running_tokenizer, until

LONG = {"text": "x", "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=30, verify=False)


async def _status(http: httpx.AsyncClient, path: str = "/health") -> int:
    return (await http.get(path)).status_code


async def test_pain_22_h_health_fails_while_the_only_engine_makes_no_steps() -> None:
    async with gateway_stack(step_s=0.01) as stack, _client(stack.url) as http:
        (worker,) = stack.workers
        running = asyncio.create_task(http.post("/generate", json=LONG))
        await until(lambda: worker.num_live == 1)
        assert await _status(http) == 200
        worker.hangs = True
        async with asyncio.timeout(20):
            while await _status(http) != 503:
                await asyncio.sleep(0.05)
        worker.hangs = False
        async with asyncio.timeout(20):
            while await _status(http) != 200:
                await asyncio.sleep(0.05)
        assert (await running).status_code == 200


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL])
async def test_pain_22_h_health_generate_wants_a_token(code: grpc.StatusCode) -> None:
    async with gateway_stack() as stack, _client(stack.url) as http:
        assert await _status(http, "/health_generate") == 200
        stack.workers[0].fail_at = (0, int(code.value[0]), "the device is lost")
        assert await _status(http, "/health_generate") >= 500
        stack.workers[0].fail_at = None
        assert await _status(http, "/health_generate") == 200


@dataclass
class Leaving:
    """A gateway that ends when told to, before what it needs."""

    gateway: RunningGateway
    stack: GatewayStack
    told: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.http_port}"


@contextlib.asynccontextmanager
async def _leaving(**changes: Any) -> AsyncIterator[Leaving]:
    async with gateway_stack(step_s=0.02) as stack, running_tokenizer() as tokenizer:
        config = GatewayConfig(
            schedulers=stack.pipeline.control.addresses,
            tokenizers=(tokenizer,),
            port=0,
            grpc_listen="localhost:0",
            **{"shutdown_grace_s": 10.0, **changes},
        )
        serving: asyncio.Future[Leaving] = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            async with running_gateway(config) as gateway:
                await until(lambda: gateway.pipeline.ready)
                leaving = Leaving(gateway, stack)
                serving.set_result(leaving)
                await leaving.told.wait()
            leaving.ended.set()

        task = asyncio.create_task(serve())
        try:
            yield await serving
        finally:
            (await serving).told.set()
            await task


async def _grpc_health(leaving: Leaving) -> int:
    async with open_channel(f"localhost:{leaving.gateway.grpc_port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest())
        return int(reply.status)


async def test_pain_24_h_probes_fail_before_a_gateway_takes_nothing_new() -> None:
    async with _leaving(drain_delay_s=3.0) as leaving, _client(leaving.url) as http:
        (worker,) = leaving.stack.workers
        before = asyncio.create_task(http.post("/generate", json=LONG))
        await until(lambda: worker.num_live == 1)
        assert await _status(http) == 200
        leaving.told.set()
        await until(lambda: not leaving.gateway.pipeline.ready)
        # Longer than servers take to close.
        await asyncio.sleep(0.5)
        # Whoever has not heard of it yet is still served, on new connections too.
        async with _client(leaving.url) as late:
            refused = await late.get("/health")
            assert (refused.status_code, "stopping" in refused.text) == (503, True)
            assert await _grpc_health(leaving) == health_pb2.HealthCheckResponse.NOT_SERVING
            short = {"text": "x", "sampling_params": {"max_new_tokens": 2}}
            assert (await late.post("/generate", json=short)).status_code == 200
        assert not leaving.ended.is_set()
        assert (await before).status_code == 200


async def test_pain_24_h_what_runs_when_a_gateway_closes_is_finished() -> None:
    async with _leaving() as leaving, _client(leaving.url) as http:
        (worker,) = leaving.stack.workers
        running = asyncio.create_task(http.post("/generate", json=LONG))
        await until(lambda: worker.num_live == 1)
        leaving.told.set()
        reply = await running
        assert reply.status_code == 200
        assert reply.json()["meta_info"]["completion_tokens"] == 100
        async with asyncio.timeout(20):
            await leaving.ended.wait()
        async with _client(leaving.url) as late:
            with pytest.raises(httpx.ConnectError):
                await late.get("/health")
