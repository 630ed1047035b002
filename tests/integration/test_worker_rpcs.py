"""The worker's ordinary rpcs over real gRPC, with a fake engine behind real sockets."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rhizome.common.v1 import finish_reason_pb2, logprobs_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.prefix_hash import prefix_hashes
from tests.fakes.fake_engine import PAGE_SIZE, VOCAB_SIZE, expected_output
from tests.fakes.session_client import make_submit
from tests.fakes.worker_bench import EPOCH, Bench, running_bench, until, until_idle

PROMPT = [5, 6, 7]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_bench() as running:
        yield running


async def health(bench: Bench) -> int:
    stub: Any = health_pb2_grpc.HealthStub(bench.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest())).status)


async def test_generate_streams_one_sequence(bench: Bench) -> None:
    options = logprobs_pb2.LogprobOptions(output=True, num_top=2, prompt_start=1)
    submit = make_submit(0, PROMPT, max_new_tokens=20, logprobs=options)
    responses = [r async for r in bench.stub.Generate(pb.GenerateRequest(submit=submit))]
    assert responses[0].HasField("admission")
    assert [i for r in responses for i in r.token_ids] == expected_output(PROMPT, 20)
    assert [r.HasField("finish") for r in responses] == [False] * (len(responses) - 1) + [True]
    positions = [
        r.logprobs.start_position + i for r in responses for i in range(len(r.logprobs.logprobs))
    ]
    assert positions == list(range(1, 23))
    await until_idle(bench)


async def test_cancelling_generate_frees_its_pages(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    call = bench.stub.Generate(
        pb.GenerateRequest(submit=make_submit(0, PROMPT, max_new_tokens=4000))
    )
    await call.read()
    assert (await bench.info()).load.num_handles == 1
    call.cancel()
    await until_idle(bench)


async def test_generate_refuses_and_expires_by_status(bench: Bench) -> None:
    bench.engine.step_s = 0.005
    for submit, code in (
        (make_submit(0, []), grpc.StatusCode.INVALID_ARGUMENT),
        (make_submit(0, [VOCAB_SIZE]), grpc.StatusCode.INVALID_ARGUMENT),
        (
            make_submit(0, PROMPT, max_new_tokens=4000, remaining=Duration(nanos=50_000_000)),
            grpc.StatusCode.DEADLINE_EXCEEDED,
        ),
    ):
        with pytest.raises(aio.AioRpcError) as raised:
            await _read_all(bench.stub.Generate(pb.GenerateRequest(submit=submit)))
        assert raised.value.code() is code
    await until_idle(bench)


async def test_a_full_queue_is_resource_exhausted() -> None:
    async with running_bench(max_running=2, max_queued_requests=3) as bench:
        bench.engine.pause()
        client = bench.client()
        await client.open()
        await client.submit(*(make_submit(handle, PROMPT) for handle in range(6)))
        bench.engine.resume()
        await client.ended()
        errors = {h: r.error.code for h, r in client.handles.items() if r.error is not None}
        assert errors == {5: grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}


async def test_worker_info_says_who_and_how(bench: Bench) -> None:
    info = await bench.info()
    assert (info.worker_id, info.epoch, info.identity.served_model_name) == (
        "worker",
        EPOCH,
        "fake",
    )
    assert (info.vocab_size, info.context_length, info.num_pages) == (VOCAB_SIZE, 4096, 4096)
    assert list(info.eos_token_ids) == [0]
    assert info.max_top_logprobs == 64
    assert info.load.num_free_pages == 4096


async def test_readiness_follows_the_engine() -> None:
    async with running_bench(ready=False) as bench:
        serving = health_pb2.HealthCheckResponse.SERVING
        assert await health(bench) != serving
        client = bench.client()
        await client.open()
        (early,) = await client.submit(make_submit(1, PROMPT))
        await client.ended()
        assert early.error is not None
        assert early.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        bench.engine.say(bench.engine.ready_message())
        while await health(bench) != serving:
            await asyncio.sleep(0.01)
        bench.worker.replica.drain("test")
        while await health(bench) == serving:
            await asyncio.sleep(0.01)


async def test_cache_events_follow_a_snapshot(bench: Bench) -> None:
    client = bench.client()
    await client.open()
    prompts = [[number] * (2 * PAGE_SIZE + 3) for number in range(2)]
    await client.submit(make_submit(1, prompts[0], namespace="n"))
    await client.ended()
    watch = bench.stub.WatchCacheEvents(pb.WatchCacheEventsRequest(snapshot=True))
    chunk = (await watch.read()).snapshot_chunk
    assert chunk.last
    assert list(chunk.prefix_hashes) == prefix_hashes(prompts[0], PAGE_SIZE, "n")
    await client.submit(make_submit(2, prompts[1], namespace="n"))
    batch = (await watch.read()).events
    assert batch.first_sequence_number == chunk.sequence_number + 1
    (event,) = batch.events
    assert list(event.stored.prefix_hashes) == prefix_hashes(prompts[1], PAGE_SIZE, "n")
    await client.ended()
    assert (await bench.stub.FlushCache(pb.FlushCacheRequest())).num_freed_pages == 4
    (event,) = (await watch.read()).events.events
    assert event.HasField("cleared")


async def test_cache_events_are_fenced(bench: Bench) -> None:
    for request, code in (
        (
            pb.WatchCacheEventsRequest(after_sequence_number=0, epoch=EPOCH + 1),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (
            pb.WatchCacheEventsRequest(after_sequence_number=9, epoch=EPOCH),
            grpc.StatusCode.OUT_OF_RANGE,
        ),
        (pb.WatchCacheEventsRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(aio.AioRpcError) as raised:
            await bench.stub.WatchCacheEvents(request).read()
        assert raised.value.code() is code


async def test_overlapping_flushes_and_a_cancelled_one_all_settle(bench: Bench) -> None:
    bench.engine.pause()
    calls = [bench.stub.FlushCache(pb.FlushCacheRequest()) for _ in range(3)]
    await asyncio.sleep(0.05)
    calls[0].cancel()
    bench.engine.resume()
    assert [(await call).num_freed_pages for call in calls[1:]] == [0, 0]
    assert (await bench.stub.FlushCache(pb.FlushCacheRequest())).num_freed_pages == 0


async def test_later_releases_rpcs_are_unimplemented(bench: Bench) -> None:
    async def transfer() -> Any:
        return await bench.stub.TransferPages(iter([pb.TransferPagesRequest()])).read()

    for call in (
        bench.stub.Embed(pb.EmbedRequest()),
        transfer(),
    ):
        with pytest.raises(aio.AioRpcError) as raised:
            await call
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_failure_with_a_long_reason_keeps_its_status(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    call = bench.stub.Generate(
        pb.GenerateRequest(submit=make_submit(0, PROMPT, max_new_tokens=4000))
    )
    responses = aiter(call)
    await anext(responses)
    bench.engine.fail("out of luck: " + "\u00e9" * 50_000)
    with pytest.raises(aio.AioRpcError) as raised:
        async for _ in responses:
            pass
    assert raised.value.code() is grpc.StatusCode.ABORTED
    assert "out of luck" in (raised.value.details() or "")


async def test_a_failed_engine_fails_generate_retryably(bench: Bench) -> None:
    bench.engine.step_s = 0.002
    call = bench.stub.Generate(
        pb.GenerateRequest(submit=make_submit(0, PROMPT, max_new_tokens=4000))
    )
    responses = aiter(call)
    await anext(responses)
    bench.engine.fail("gone", permanent=True)
    with pytest.raises(aio.AioRpcError) as raised:
        await _read_all(responses)
    assert raised.value.code() is grpc.StatusCode.ABORTED
    await until(bench.worker.replica.failed.done)
    assert bench.worker.replica.failed.result().permanent


async def test_generate_ends_at_a_stop_id(bench: Bench) -> None:
    stop = expected_output(PROMPT, 5)[-1]
    submit = make_submit(0, PROMPT, max_new_tokens=40)
    submit.sampling.stop_token_ids.append(stop)
    responses = await _read_all(bench.stub.Generate(pb.GenerateRequest(submit=submit)))
    finish = responses[-1].finish
    assert finish.reason == finish_reason_pb2.FINISH_REASON_STOP
    assert finish.matched_token_id == stop


async def _read_all(call: Any) -> list[Any]:
    return [response async for response in call]
