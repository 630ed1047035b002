"""A whole worker, the real engine with the built-in model included, as its own processes."""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from rhizome.common.v1 import finish_reason_pb2, logprobs_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb, worker_service_pb2_grpc as pb_grpc
from services.common.model_files import builtin_model_path
from services.common.prefix_hash import cache_namespace, prefix_hashes
from services.common.rpc import open_channel
from tests.fakes.session_client import Received, SessionClient, make_submit
from tests.fakes.worker_bench import until
from tests.fakes.worker_process import WorkerProcess

NUM_PAGES = 1024
PROMPT = list(range(10, 60))
LOGPROBS = logprobs_pb2.LogprobOptions(output=True, num_top=3, prompt_start=0)

pytestmark = pytest.mark.skipif(
    not (builtin_model_path() / "config.json").is_file(), reason="the built-in model is not made"
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    directory = tmp_path_factory.mktemp("worker")
    process = WorkerProcess(
        directory, "--max-total-tokens", str(16 * NUM_PAGES), "--metrics-port", "0"
    )
    try:
        process.wait_until_ready()
        yield process
        process.terminate()
        assert process.wait() == 0, process.log.read_text()
    finally:
        process.close()


@pytest.fixture
async def channel(worker: WorkerProcess) -> AsyncIterator[aio.Channel]:
    async with open_channel(worker.address) as opened:
        yield opened
        await until_idle(opened)


def stub_of(channel: aio.Channel) -> Any:
    return pb_grpc.WorkerServiceStub(channel)


async def until_idle(channel: aio.Channel) -> None:
    """Wait until nothing is left: no session, handle, sequence, or page in use."""
    while True:
        response = await stub_of(channel).GetWorkerInfo(pb.GetWorkerInfoRequest())
        load = response.load
        if not (load.num_sessions or load.num_handles or load.num_running or load.num_waiting):
            assert load.num_free_pages + load.num_evictable_pages == NUM_PAGES
            return
        await asyncio.sleep(0.05)


async def run_alone(channel: aio.Channel, session_id: str, *submits: pb.Submit) -> list[Received]:
    client = SessionClient(channel, session_id)
    await client.open()
    received = await client.submit(*submits)
    await client.ended()
    await client.send(closes=[submit.handle for submit in submits])
    await client.call.done_writing()
    assert await client.call.code() is grpc.StatusCode.OK
    return received


async def test_a_continuation_elsewhere_says_the_same(channel: aio.Channel) -> None:
    (whole,) = await run_alone(channel, "whole", make_submit(1, PROMPT, max_new_tokens=30))
    rest = make_submit(1, PROMPT, output=whole.ids[:12], max_new_tokens=30)
    (resumed,) = await run_alone(channel, "rest", rest)
    assert whole.ids[12:] == resumed.ids
    assert len(whole.ids) == 30


async def test_prometheus_sees_what_the_engine_did(
    worker: WorkerProcess, channel: aio.Channel
) -> None:
    await run_alone(channel, "counted", make_submit(1, PROMPT, max_new_tokens=30))
    load = (await stub_of(channel).GetWorkerInfo(pb.GetWorkerInfoRequest())).load
    (port,) = re.findall(r"event=metrics_served port=(\d+)", worker.log.read_text())
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://localhost:{port}/metrics")).text
    values = dict(re.findall(r"^rhizome_worker_(\S+) (\S+)$", text, re.MULTILINE))
    assert float(values["serving"]) == 1
    assert float(values["pages"]) == NUM_PAGES
    assert float(values["prompt_tokens_total"]) == load.num_prompt_tokens >= len(PROMPT)
    assert float(values["output_tokens_total"]) == load.num_output_tokens >= 30
    assert float(values['ended_sequences_total{reason="length"}']) >= 1
    assert float(values["step_seconds_count"]) >= 30
    assert float(values["step_seconds_sum"]) > 0


async def test_a_broken_call_resumes_byte_identical(channel: aio.Channel) -> None:
    submit = make_submit(1, PROMPT, max_new_tokens=150, logprobs=LOGPROBS)
    submit.sampling.temperature = 1.0
    (whole,) = await run_alone(channel, "whole", submit)
    client = SessionClient(channel, "broken")
    await client.open()
    (received,) = await client.submit(submit)
    for target in (5, 60):
        await until(lambda target=target: len(received.ids) > target)  # type: ignore[misc]
        await client.break_off()
        assert (await client.resume([1])).resumed
    await client.ended()
    assert received.ids == whole.ids
    assert received.logprob_positions == list(range(len(PROMPT) + 150))
    assert received.logprobs[1:] == pytest.approx(whole.logprobs[1:], abs=1e-4)
    await client.send(closes=[1])
    await client.call.done_writing()


async def test_cancelling_half_of_many_leaves_nothing(channel: aio.Channel) -> None:
    client = SessionClient(channel, "many")
    await client.open()
    handles = range(64)
    await client.submit(
        *(make_submit(handle, [handle + 4, *PROMPT], max_new_tokens=60) for handle in handles)
    )
    await until(lambda: all(client.handles[handle].ids for handle in handles))
    await client.send(cancels=handles[::2])
    await client.ended()
    for handle in handles:
        finish = client.handles[handle].finish
        assert finish is not None
        cancelled = finish.reason == finish_reason_pb2.FINISH_REASON_CANCELLED
        assert cancelled == (handle % 2 == 0)
    await client.send(closes=handles)
    await client.call.done_writing()


async def test_pain_18_s_a_disconnect_without_resume_frees_everything(channel: aio.Channel) -> None:
    client = SessionClient(channel, "gone")
    await client.open()
    (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=3000))
    await until(lambda: bool(received.ids))
    await client.break_off()


async def test_failing_handles_leave_their_stream_alone(channel: aio.Channel) -> None:
    late = make_submit(2, PROMPT, max_new_tokens=3000, remaining=Duration(nanos=200_000_000))
    bad = make_submit(3, PROMPT)
    bad.sampling.top_p = 7
    good = make_submit(4, PROMPT, max_new_tokens=40)
    received = await run_alone(channel, "failing", late, bad, good)
    codes = [entry.error.code if entry.error else 0 for entry in received]
    assert codes == [
        grpc.StatusCode.DEADLINE_EXCEEDED.value[0],
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        0,
    ]
    assert len(received[2].ids) == 40


async def test_cancelling_generate_frees_its_pages(channel: aio.Channel) -> None:
    submit = make_submit(0, PROMPT, max_new_tokens=3000)
    call = stub_of(channel).Generate(pb.GenerateRequest(submit=submit))
    await call.read()
    call.cancel()


async def test_events_announce_the_pages_that_requests_leave(channel: aio.Channel) -> None:
    stub = stub_of(channel)
    info = await stub.GetWorkerInfo(pb.GetWorkerInfoRequest())
    await stub.FlushCache(pb.FlushCacheRequest())
    await run_alone(channel, "cold", make_submit(1, PROMPT))
    (warm,) = await run_alone(channel, "warm", make_submit(1, PROMPT))
    assert warm.finish is not None
    assert warm.finish.cached_tokens == 48
    watch = stub.WatchCacheEvents(pb.WatchCacheEventsRequest(snapshot=True))
    chunk = (await watch.read()).snapshot_chunk
    watch.cancel()
    namespace = cache_namespace(info.identity.model_revision)
    assert list(chunk.prefix_hashes)[:3] == prefix_hashes(PROMPT, 16, namespace)
    assert (await stub.FlushCache(pb.FlushCacheRequest())).num_freed_pages == len(
        chunk.prefix_hashes
    )


async def test_a_dead_engine_ends_its_worker(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, "--max-total-tokens", "4096")
    try:
        await asyncio.to_thread(worker.wait_until_ready)
        async with open_channel(worker.address) as channel:
            client = SessionClient(channel)
            await client.open()
            (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=3000))
            await until(lambda: bool(received.ids))
            worker.engine().kill()
            await client.ended()
            assert received.error is not None
            assert received.error.code == grpc.StatusCode.ABORTED.value[0]
        assert await asyncio.to_thread(worker.wait) == 4
    finally:
        worker.close()


def test_a_model_that_cannot_load_ends_the_worker_for_good(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"architectures": ["NoSuchModel"], "model_type": "none"}')
    worker = WorkerProcess(tmp_path, "--model-path", str(tmp_path))
    try:
        assert worker.wait() == 3
    finally:
        worker.close()
    assert "NoSuchModel" in worker.log.read_text()


def test_a_missing_model_ends_the_worker_for_good(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path, "--model-path", str(tmp_path / "nowhere"))
    try:
        assert worker.wait() == 3
    finally:
        worker.close()
    assert "nowhere" in worker.log.read_text()


def test_an_address_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    worker = subprocess.run(
        [sys.executable, "-m", "services.worker", "--listen", "localhost:99999"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert worker.returncode == 3
    last = "worker: cannot listen on localhost:99999: ports go up to 65535"
    assert worker.stderr.splitlines()[-1] == last
    assert "Traceback" not in worker.stderr


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (("--enable-torch-compile", "--tp", "2", "--device", "cpu"), "enable_torch_compile needs"),
        (("--max-running-requests", "1000000000000"), "this host has too little memory"),
    ],
)
def test_a_wish_that_cannot_be_met_ends_the_worker_without_a_traceback(
    tmp_path: Path, flag: tuple[str, ...], said: str
) -> None:
    worker = WorkerProcess(tmp_path, *flag)
    assert worker.wait(60) == 3
    log = worker.log.read_text()
    assert said in log.splitlines()[-1]
    assert "Traceback" not in log
    worker.close()


def test_the_engine_dies_with_its_front(tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path)
    try:
        engine = worker.engine()
        worker.kill()
        worker.wait()
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)
    finally:
        worker.close()
