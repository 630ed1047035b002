"""What clients see when something behind the gateway fails, and what is left when they go away."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
from typing import Any

import grpc
import httpx
import pytest

from rhizome.tokenizer.v1.tokenizer_service_pb2 import GetTokenizerInfoResponse
from services.gateway.config import GatewayConfig
from services.gateway.gateway import running_gateway
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import running_scheduler
from services.tokenizer.servicer import TokenizerParts
from tests.fakes.gateway_stack import (
    ANSWER,
    GatewayStack,
    answer_ids,
    gateway_stack,
    running_tokenizer,
    scripted_worker,
    tokenizer_parts,
    until,
)
from tests.fakes.scripted_worker import running_worker

CHAT = {
    "model": "default",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "stream": True,
}


def text_of(body: str) -> str:
    text = ""
    for line in body.split("\n"):
        if line.startswith("data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                text += choice["delta"].get("content") or ""
    return text


async def chat(stack: GatewayStack, **members: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30, verify=False) as http:
        return await http.post("/v1/chat/completions", json={**CHAT, **members})


async def test_a_broken_stream_is_resumed_without_a_second_submit() -> None:
    async with gateway_stack() as stack:
        worker = stack.workers[0]
        worker.break_at = 4
        reply = await chat(stack)
        assert text_of(reply.text) == ANSWER
        assert worker.break_at is None
        assert len(worker.submits) == 1


async def test_sessions_that_a_live_worker_gave_up_are_no_deaths_of_it() -> None:
    async with gateway_stack(step_s=0.02) as stack:
        (worker,) = stack.workers
        worker.forget_on_break = True
        answer = asyncio.create_task(chat(stack))
        for position in (2, 3, 4):
            worker.break_at = position
            await until(lambda: worker.break_at is None)
        assert text_of((await answer).text) == ANSWER
        assert len(worker.submits) == 4


async def test_a_request_that_comes_while_a_stream_is_broken_is_submitted_once() -> None:
    async with gateway_stack() as stack:
        worker = stack.workers[0]
        worker.break_at = 4

        async def later() -> httpx.Response:
            await until(lambda: worker.break_at is None)
            return await chat(stack)

        replies = await asyncio.gather(chat(stack), later())
        assert [text_of(reply.text) for reply in replies] == [ANSWER, ANSWER]
        assert len(worker.submits) == 2


async def test_a_stream_that_goes_silent_is_resumed() -> None:
    async with gateway_stack(num_workers=2) as stack:
        for worker in stack.workers:
            worker.mute_at = 4
        reply = await chat(stack)
        assert text_of(reply.text) == ANSWER
        assert [worker.mute_at for worker in stack.workers].count(None) == 1
        assert sum(len(worker.submits) for worker in stack.workers) == 1


async def test_a_worker_that_stands_still_is_left() -> None:
    async with gateway_stack(num_workers=2, step_s=0.02) as stack:
        task = asyncio.create_task(chat(stack))
        await until(lambda: any(worker.submits for worker in stack.workers))
        first, second = sorted(stack.workers, key=lambda worker: -len(worker.submits))
        first.stands_still = True
        reply = await task
        assert text_of(reply.text) == ANSWER
        assert len(second.submits) == 1


async def test_a_frame_that_makes_no_sense_costs_its_session_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gateway_stack() as stack:
        worker = stack.workers[0]
        worker.garble_at = 4
        reply = await chat(stack)
        assert text_of(reply.text) == ANSWER
        assert len(worker.submits) == 2
    assert "event=worker_session_failed" in caplog.text


async def test_pain_21_s_a_request_goes_on_elsewhere_with_what_it_has() -> None:
    async with gateway_stack(num_workers=2) as stack:
        for worker in stack.workers:
            worker.forget_on_break = True
            worker.break_at = 4
        reply = await chat(stack, logprobs=True, top_logprobs=1, seed=11)
        assert text_of(reply.text) == ANSWER
        assert reply.text.count('"top_logprobs"') == len(answer_ids())
        first, second = (worker.submits for worker in stack.workers)
        if len(first[0].token_ids) > len(second[0].token_ids):
            first, second = second, first
        before, after = first[0], second[0]
        received = after.num_token_ids - after.prompt_len
        assert received >= 4
        assert list(after.token_ids[after.prompt_len :]) == answer_ids()[:received]
        assert after.prompt_len == before.prompt_len
        assert after.sampling == before.sampling
        assert after.sampling.seed == 11


async def test_a_retryable_failure_of_one_sequence_moves_it_and_leaves_the_session() -> None:
    async with gateway_stack(num_workers=2) as stack:
        code = int(grpc.StatusCode.UNAVAILABLE.value[0])
        stack.workers[0].fail_at = (3, code, "draining")
        replies = await asyncio.gather(*(chat(stack, n=2) for _ in range(4)))
        for reply in replies:
            assert len(text_of(reply.text)) == 2 * len(ANSWER)


async def test_a_final_failure_is_an_error_event_and_others_go_on() -> None:
    async with gateway_stack() as stack:
        code = int(grpc.StatusCode.INVALID_ARGUMENT.value[0])
        stack.workers[0].fail_at = (5, code, "too many top_logprobs")
        failed = await chat(stack)
        assert failed.status_code == 200
        assert '"message":"too many top_logprobs"' in failed.text
        assert "[DONE]" not in failed.text
        refused = await chat(stack, stream=False)
        assert refused.status_code == 400
        stack.workers[0].fail_at = None
        assert text_of((await chat(stack)).text) == ANSWER


async def test_a_text_that_fails_at_the_tokenizer_stops_its_sequence() -> None:
    unknown_id = 10**6
    async with gateway_stack(
        answer=lambda _: [300, unknown_id, *[300] * 400], step_s=0.02
    ) as stack:
        async with httpx.AsyncClient(base_url=stack.url) as http:
            reply = await http.post("/generate", json={"text": "x"})
        assert str(unknown_id) in reply.json()["error"]["message"]
        worker = stack.workers[0]
        await until(lambda: worker.num_cancels == 1 and worker.num_live == 0)


async def test_a_request_that_every_worker_fails_is_given_up() -> None:
    async with gateway_stack(num_workers=2) as stack:
        for code, num_attempts in ((grpc.StatusCode.ABORTED, 3), (grpc.StatusCode.UNAVAILABLE, 4)):
            for worker in stack.workers:
                worker.submits.clear()
                worker.fail_at = (1, int(code.value[0]), "engine lost")
            reply = await chat(stack, stream=False)
            assert reply.status_code == 500
            assert "engine lost" in reply.json()["error"]["message"]
            assert sum(len(worker.submits) for worker in stack.workers) == num_attempts


async def test_a_full_worker_is_a_429_when_there_is_no_other() -> None:
    async with gateway_stack() as stack:
        code = int(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        stack.workers[0].fail_at = (0, code, "the queue is full")
        reply = await chat(stack, stream=False)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1


async def test_pain_18_s_a_disconnect_cancels_the_sequences() -> None:
    async with gateway_stack(step_s=0.02) as stack:
        worker = stack.workers[0]
        for stream in (True, False):
            worker.num_cancels = 0
            task = asyncio.create_task(chat(stack, ignore_eos=True, n=2, stream=stream))
            await until(lambda: worker.num_live == 2)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await until(lambda: worker.num_cancels == 2 and worker.num_live == 0)
            await until(lambda: stack.pipeline.inflight.num_prompts == 0)


async def test_a_reader_that_stops_is_cut_off_and_others_are_not_held_up() -> None:
    async with gateway_stack(step_s=0.001, max_client_buffer_bytes=20_000) as stack:
        host, port = "127.0.0.1", int(stack.url.rsplit(":", 1)[1])
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(slow.connect, (host, port))
        body = json.dumps(
            {
                "text": "x",
                "stream": True,
                "sampling_params": {"max_new_tokens": 450, "ignore_eos": True, "n": 8},
            }
        ).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        await until(lambda: stack.workers[0].num_live == 8)
        assert text_of((await chat(stack)).text) == ANSWER
        await until(lambda: stack.workers[0].num_cancels == 8 and stack.workers[0].num_live == 0)
        slow.close()
        await until(lambda: stack.pipeline.inflight.num_prompts == 0)


async def test_pain_19_s_silent_streams_get_comments_during_a_long_prefill() -> None:
    async with gateway_stack(keepalive_s=0.2) as stack:
        stack.workers[0].paused = True
        task = asyncio.create_task(chat(stack))
        await asyncio.sleep(0.7)
        stack.workers[0].paused = False
        reply = await task
        assert reply.text.count(": keep-alive\n\n") >= 2
        assert text_of(reply.text) == ANSWER


async def test_a_request_out_of_time_is_a_504() -> None:
    async with gateway_stack(request_timeout_s=0.3) as stack:
        stack.workers[0].paused = True
        reply = await chat(stack, stream=False)
        assert reply.status_code == 504
        stack.workers[0].paused = False
        await until(lambda: stack.workers[0].num_live == 0)


async def test_too_many_requests_are_refused_with_a_hint() -> None:
    async with gateway_stack(max_inflight_requests=1) as stack:
        stack.workers[0].paused = True
        first = asyncio.create_task(chat(stack))
        await until(lambda: stack.workers[0].num_live == 1)
        refused = await chat(stack)
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        stack.workers[0].paused = False
        assert text_of((await first).text) == ANSWER


async def test_a_refused_stream_with_log_probabilities_leaves_nothing_unawaited() -> None:
    async with gateway_stack(max_inflight_requests=1) as stack:
        body = {"prompt": ["x", "y"], "stream": True, "logprobs": 1}
        async with httpx.AsyncClient(base_url=stack.url) as http:
            assert (await http.post("/v1/completions", json=body)).status_code == 429
        gc.collect()
        assert stack.pipeline.inflight.num_prompts == 0


async def test_requests_flow_without_a_scheduler() -> None:
    async with contextlib.AsyncExitStack() as outer:
        tokenizer = await outer.enter_async_context(running_tokenizer())
        inner = await outer.enter_async_context(contextlib.AsyncExitStack())
        scheduler = await inner.enter_async_context(
            running_scheduler(SchedulerConfig(listen="localhost:0"), grace_s=0)
        )
        address = f"localhost:{scheduler.server.port}"
        worker = await outer.enter_async_context(running_worker(scripted_worker("w0"), address))
        config = GatewayConfig(
            schedulers=("localhost:1", address),
            tokenizers=(tokenizer,),
            port=0,
            grpc_listen="localhost:0",
            shutdown_grace_s=0.5,
        )
        gateway = await outer.enter_async_context(running_gateway(config))
        await until(lambda: gateway.pipeline.ready)
        stack = GatewayStack(
            f"http://127.0.0.1:{gateway.http_port}", "", gateway.pipeline, [worker]
        )
        assert text_of((await chat(stack)).text) == ANSWER
        assert worker.submits[-1].reservation_id != 0
        await inner.aclose()
        assert text_of((await chat(stack)).text) == ANSWER
        assert worker.submits[-1].reservation_id == 0


async def test_text_goes_on_at_another_tokenizer() -> None:
    async with contextlib.AsyncExitStack() as outer:
        scheduler = await outer.enter_async_context(
            running_scheduler(SchedulerConfig(listen="localhost:0"), grace_s=0)
        )
        address = f"localhost:{scheduler.server.port}"
        worker = await outer.enter_async_context(
            running_worker(scripted_worker("w0", step_s=0.02), address)
        )
        first = await outer.enter_async_context(contextlib.AsyncExitStack())
        second = await outer.enter_async_context(contextlib.AsyncExitStack())
        tokenizers = [
            await first.enter_async_context(running_tokenizer()),
            await second.enter_async_context(running_tokenizer()),
        ]
        config = GatewayConfig(
            schedulers=(address,),
            tokenizers=tuple(tokenizers),
            port=0,
            grpc_listen="localhost:0",
            shutdown_grace_s=0.5,
        )
        gateway = await outer.enter_async_context(running_gateway(config))
        await until(lambda: gateway.pipeline.ready)
        stack = GatewayStack(
            f"http://127.0.0.1:{gateway.http_port}", "", gateway.pipeline, [worker]
        )
        tasks = [asyncio.create_task(chat(stack, stop=["The end"])) for _ in range(3)]
        await until(lambda: worker.num_live == 3)
        await first.aclose()
        for reply in await asyncio.gather(*tasks):
            assert text_of(reply.text) == ANSWER.split("The end")[0]
        assert len(worker.submits) == 3


async def test_pain_16_s_a_tokenizer_with_other_digests_is_not_used_and_the_error_says_why() -> (
    None
):
    parts = tokenizer_parts()
    info = GetTokenizerInfoResponse()
    info.CopyFrom(parts.info)
    info.template_digest = "another"
    odd = TokenizerParts(
        encoder=parts.encoder, tables=parts.tables, chat_template=parts.chat_template, info=info
    )
    async with running_tokenizer(odd) as address, gateway_stack() as stack:
        pool = stack.pipeline.tokenizers
        await until(lambda: pool.usable)
        async with running_gateway(
            GatewayConfig(
                schedulers=stack.pipeline.control.addresses,
                tokenizers=(address,),
                port=0,
                grpc_listen="localhost:0",
                shutdown_grace_s=0.5,
            )
        ) as gateway:
            await until(lambda: gateway.pipeline.control.table.workers())
            await until(lambda: "template_digest" in gateway.pipeline.tokenizers.why_unusable())
            other = GatewayStack(
                f"http://127.0.0.1:{gateway.http_port}",
                "",
                gateway.pipeline,
                stack.workers,
                stack.scheduler,
            )
            reply = await chat(other)
            assert reply.status_code == 503
            assert "template_digest is 'another'" in reply.text


async def test_without_workers_the_answer_is_a_503_at_once() -> None:
    async with running_tokenizer() as tokenizer:
        config = GatewayConfig(
            schedulers=("localhost:1",),
            tokenizers=(tokenizer,),
            port=0,
            grpc_listen="localhost:0",
            shutdown_grace_s=0.5,
        )
        async with running_gateway(config) as gateway:
            stack = GatewayStack(f"http://127.0.0.1:{gateway.http_port}", "", gateway.pipeline, [])
            assert (await chat(stack)).status_code == 503
            async with httpx.AsyncClient(base_url=stack.url) as http:
                assert (await http.get("/health")).status_code == 503
                assert (await http.get("/v1/models")).json()["data"] == []


async def test_many_streams_half_of_them_cut_leave_nothing() -> None:
    async with gateway_stack(num_workers=2, step_s=0.01) as stack:
        tasks = [asyncio.create_task(chat(stack)) for _ in range(64)]
        await until(lambda: sum(w.num_live for w in stack.workers) > 32)
        cut = tasks[:32]
        for task in cut:
            task.cancel()
        await asyncio.gather(*cut, return_exceptions=True)
        for reply in await asyncio.gather(*tasks[len(cut) :]):
            assert text_of(reply.text) == ANSWER
        await until(lambda: sum(w.num_live for w in stack.workers) == 0)
        await until(lambda: stack.pipeline.inflight.num_prompts == 0)
