"""Traces of the real engine with the built-in model, recorded while requests run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from rhizome.worker.v1 import worker_service_pb2 as pb, worker_service_pb2_grpc as pb_grpc
from services.common.rpc import open_channel
from tests.fakes.session_client import make_submit
from tests.fakes.worker_process import WorkerProcess

PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    directory = tmp_path_factory.mktemp("worker")
    process = WorkerProcess(
        directory, "--max-total-tokens", "4096", "--profile-dir", str(directory / "traces" / "new")
    )
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.close()


async def generate(stub: Any, num_tokens: int) -> int:
    submit = make_submit(0, PROMPT, max_new_tokens=num_tokens)
    submit.sampling.ignore_eos = True
    responses = stub.Generate(pb.GenerateRequest(submit=submit))
    return sum([len(response.token_ids) async for response in responses])


def names_in(path: str) -> set[str]:
    return {event.get("name", "") for event in json.loads(Path(path).read_text())["traceEvents"]}


async def refusal(call: Any) -> str:
    with pytest.raises(aio.AioRpcError) as raised:
        await call
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return raised.value.details() or ""


async def test_a_recording_names_the_models_parts_and_its_steps(worker: WorkerProcess) -> None:
    async with open_channel(worker.address) as channel:
        stub: Any = pb_grpc.WorkerServiceStub(channel)
        await stub.StartProfile(pb.StartProfileRequest())
        assert "recorded already" in await refusal(stub.StartProfile(pb.StartProfileRequest()))
        assert await generate(stub, 6) == 6
        stopped = await stub.StopProfile(pb.StopProfileRequest())
    names = names_in(stopped.trace_path)
    assert any("models/decoder.py" in name for name in names)
    assert any("sampling/sampler.py" in name for name in names)
    assert any(name.endswith(": 1 rows, 30 tokens") for name in names)
    assert sum(name.endswith(": 1 rows, 1 tokens") for name in names) == 5


async def test_a_recording_ends_after_its_steps_and_is_named_once(worker: WorkerProcess) -> None:
    async with open_channel(worker.address) as channel:
        stub: Any = pb_grpc.WorkerServiceStub(channel)
        request = pb.StartProfileRequest(num_steps=3, with_stack=False, record_shapes=True)
        await stub.StartProfile(request)
        assert await generate(stub, 20) == 20
        stopped = await stub.StopProfile(pb.StopProfileRequest())
        assert "no profile" in await refusal(stub.StopProfile(pb.StopProfileRequest()))
    names = names_in(stopped.trace_path)
    assert sum(name.startswith("step ") for name in names) == 3
    assert not any("decoder.py" in name for name in names)
