"""A request that crashes its worker among others, and engines that hang: what clients see."""

from __future__ import annotations

import asyncio
import time

import httpx

from tests.fakes.gateway_stack import GatewayStack, gateway_stack, until

POISON_ID = 777
NUM_TOKENS = 150


async def _generate(http: httpx.AsyncClient, first_id: int) -> httpx.Response:
    body = {
        "input_ids": [first_id, *range(10, 60)],
        "sampling_params": {"max_new_tokens": NUM_TOKENS, "ignore_eos": True},
    }
    return await http.post("/generate", json=body)


def _client(stack: GatewayStack) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=stack.url, timeout=60, verify=False, limits=limits)


async def test_a_poison_request_among_64_streams_costs_at_most_3_crashes_and_only_itself() -> None:
    async with (
        gateway_stack(num_workers=4, step_s=0.01, scheduling={"worker_wait_s": 5.0}) as stack,
        _client(stack) as http,
    ):
        alone = (await _generate(http, 100)).json()["text"]
        others = [asyncio.create_task(_generate(http, 200 + index)) for index in range(63)]
        await until(lambda: sum(worker.num_live for worker in stack.workers) == 63)
        for worker in stack.workers:
            worker.poison = (POISON_ID, 3)
        poisoned = await _generate(http, POISON_ID)
        assert poisoned.status_code == 500
        assert "3 workers in turn died" in poisoned.json()["error"]["message"]
        replies = await asyncio.gather(*others)
        assert [reply.status_code for reply in replies] == [200] * 63
        assert {reply.json()["text"] for reply in replies} == {alone}
        assert sum(worker.num_crashes for worker in stack.workers) == 3
        assert max(worker.num_crashes for worker in stack.workers) == 1


async def test_what_a_hung_engine_runs_goes_on_elsewhere_and_it_gets_nothing_new() -> None:
    async with gateway_stack(num_workers=2, step_s=0.01) as stack, _client(stack) as http:
        running = [asyncio.create_task(_generate(http, 200 + index)) for index in range(8)]
        await until(lambda: all(worker.num_live == 4 for worker in stack.workers))
        hung, fine = stack.workers
        hung.hangs = True
        hung_at = time.monotonic()
        replies = await asyncio.gather(*running)
        assert [reply.status_code for reply in replies] == [200] * 8
        # A generous bound: it takes two seconds of the same step to leave it.
        assert time.monotonic() - hung_at < 20
        before = len(hung.submits)
        assert len(fine.submits) == 8
        for index in range(4):
            assert (await _generate(http, 300 + index)).status_code == 200
        assert len(hung.submits) == before
