"""The load client against servers that answer well, badly, or not to the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from services.bench.serving.client import RequestRecord, open_session, send
from services.bench.serving.protocol import Api, ChatApi, CompletionsApi, GenerateApi
from services.bench.workloads import Turn

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

TURN = Turn([1001, 1002], 2)
TOKEN = {"choices": [{"text": "a", "finish_reason": None}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}


@contextlib.asynccontextmanager
async def server(handler: Handler, path: str) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post(path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def streaming(*events: object, ends: bool = True, breaks: bool = False) -> Handler:
    """Sends JSON events (bytes as they are), then [DONE] unless it does not end."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            data = event if isinstance(event, bytes) else json.dumps(event).encode()
            await response.write(b"data: " + data + b"\n\n")
        if ends:
            await response.write(b"data: [DONE]\n\n")
        if breaks:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handle


async def answer(handler: Handler, api: Api | None = None, timeout_s: float = 5.0) -> RequestRecord:
    api = api or CompletionsApi("m", sends_ids=True)
    async with server(handler, api.path) as url, open_session("key", timeout_s) as session:
        return await send(session, url, api, TURN)


async def test_a_whole_stream_is_a_success_with_the_servers_counts() -> None:
    usage = {"prompt_tokens_details": {"cached_tokens": 3}, **USAGE["usage"]}  # type: ignore[dict-item]
    record = await answer(streaming(TOKEN, TOKEN, {"choices": [], "usage": usage}))
    assert record.error is None
    assert (record.num_output_tokens, record.num_input_tokens) == (2, 7)
    assert record.num_cached_tokens == 3
    assert len(record.event_s) == 2
    assert 0 < record.ttft_s <= record.e2e_s <= record.end_s - record.start_s


async def test_without_usage_events_are_counted() -> None:
    record = await answer(streaming(TOKEN, TOKEN, TOKEN))
    assert (record.error, record.num_output_tokens, record.num_input_tokens) == (None, 3, 2)


async def test_the_body_asks_for_exactly_the_tokens() -> None:
    bodies = []

    async def handle(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        assert request.headers["Authorization"] == "Bearer key"
        return await streaming(TOKEN)(request)

    await answer(handle)
    body = bodies[0]
    assert body["prompt"] == [1001, 1002]
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (2, True, 0.0)


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (streaming(TOKEN, USAGE, ends=False), "without [DONE]"),
        (streaming(TOKEN, ends=False, breaks=True), "Error"),
        (streaming(), "without a token"),
        (streaming(TOKEN, {"error": {"message": "the engine failed"}}), "the engine failed"),
        (streaming({"choices": [{"text": "", "finish_reason": "abort"}]}), "abort"),
        (streaming(TOKEN, b"{broken"), "malformed event"),
        (streaming([1, 2]), "malformed event"),
    ],
)
async def test_streams_that_fail_are_failures(handler: Handler, reason: str) -> None:
    record = await answer(handler)
    assert record.error is not None
    assert reason in record.error


async def test_a_status_is_a_failure_that_quotes_the_answer() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=429, text="too many")

    assert (await answer(refuse)).error == "HTTP 429 too many"


async def test_a_server_that_is_not_there_is_a_failure() -> None:
    async with open_session("", 5.0) as session:
        record = await send(session, "http://127.0.0.1:1", CompletionsApi("m", True), TURN)
    assert record.error is not None
    assert "Connect" in record.error


async def test_a_request_beyond_its_time_is_a_failure() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    record = await answer(hang, timeout_s=0.2)
    assert record.error is not None
    assert "Timeout" in record.error


async def test_chats_first_event_without_text_is_not_the_first_token() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    text = {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}
    end = {"choices": [{"delta": {}, "finish_reason": "length"}]}
    record = await answer(streaming(role, text, end, USAGE), ChatApi("m"))
    assert record.error is None
    assert len(record.event_s) == 1
    assert record.num_output_tokens == 2


async def test_the_native_apis_counts_come_with_every_event() -> None:
    def event(count: int, reason: object = None) -> dict[str, object]:
        meta = {"completion_tokens": count, "prompt_tokens": 2, "finish_reason": reason}
        return {"text": "a", "meta_info": meta}

    record = await answer(
        streaming(event(1), event(2, {"type": "length"})), GenerateApi(sends_ids=True)
    )
    assert (record.error, record.num_output_tokens) == (None, 2)
    aborted = event(1, {"type": "abort", "message": "no room"})
    failed = await answer(streaming(aborted), GenerateApi(sends_ids=False))
    assert failed.error == "error in the stream: no room"


async def test_a_server_that_breaks_off_when_the_cache_is_flushed_is_one_sentence() -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async with server(break_off, "/flush_cache") as url:
        command = (
            *("bench", "serving", "--base-url", url, "--model", "m", "--flush-cache"),
            *("--num-prompts", "1", "--warmup-requests", "0"),
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.launch", *command), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().startswith(f"rhizome bench serving: {url} does not answer: ")
    assert "Traceback" not in errors.decode()


@contextlib.asynccontextmanager
async def benchmark(url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`rhizome bench serving` in a process group of its own, all of which is gone at the end."""
    command = ("bench", "serving", "--base-url", url, "--model", "m", "--num-prompts", "1")
    # Tests in a shell's background ignore SIGINT, and what they start would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.launch", *command),
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


def hanging() -> tuple[Handler, asyncio.Event]:
    """A handler that does not answer, and whether a request has come."""
    arrived = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        arrived.set()
        await asyncio.sleep(600)
        return web.Response()

    return hang, arrived


async def client_starts(process: asyncio.subprocess.Process) -> None:
    """Wait until a client process runs Python, which takes it long to import what it needs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while True:
        for child in children.read_text().split():
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{child}/status").read_text())
            assert caught is not None
            if b"spawn_main" in command and int(caught[1], 16) >> signal.SIGINT - 1 & 1:
                return
        await asyncio.sleep(0.001)


async def test_an_interrupt_ends_the_benchmark_quietly() -> None:
    handler, arrived = hanging()
    async with server(handler, "/v1/completions") as url, benchmark(url) as process:
        async with asyncio.timeout(60):
            await arrived.wait()
            os.killpg(process.pid, signal.SIGINT)
            _, errors = await process.communicate()
        assert process.returncode == 130
        assert errors == b""


async def test_an_interrupt_while_clients_start_ends_the_benchmark_quietly() -> None:
    async with server(hanging()[0], "/v1/completions") as url, benchmark(url) as process:
        async with asyncio.timeout(60):
            await client_starts(process)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = await process.communicate()
        assert process.returncode == 130
        assert errors == b""


async def test_clients_end_when_the_benchmark_is_killed() -> None:
    handler, arrived = hanging()
    async with server(handler, "/v1/completions") as url, benchmark(url) as process:
        async with asyncio.timeout(60):
            await arrived.wait()
            process.kill()
            # Read to the end, which comes when no process of the group is left to write.
            _, errors = await process.communicate()
        assert errors == b""
