"""A burst with one new prefix through a real scheduler: what its workers really compute."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from rhizome.worker.v1 import worker_service_pb2 as worker_pb
from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from services.cache_index.config import CacheIndexConfig
from services.cache_index.service import running_cache_index
from services.common.prefix_hash import prefix_hashes
from services.common.rpc import open_channel
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import running_scheduler
from tests.fakes.mock_worker import MockWorker, MockWorkerConfig, running_mock_worker

NUM_WORKERS = 4
PREFIX = list(range(1, 4097))
OWN_TOKENS = 8
PAGE_SIZE = 16


async def _one(schedulers: Any, channels: dict[str, Any], index: int, output_len: int) -> str:
    """Schedule one request and run it where it was placed."""
    token_ids = [*PREFIX, *range(10_000 + index * 20, 10_000 + index * 20 + OWN_TOKENS)]
    request = pb.ScheduleRequest(
        request_id=f"r{index}",
        model="mock",
        prefix_hashes=prefix_hashes(token_ids, PAGE_SIZE, ""),
        num_prompt_tokens=len(token_ids),
        max_new_tokens=output_len,
        num_choices=1,
        remaining=Duration(seconds=60),
    )
    async for response in schedulers.Schedule(request):
        placed = response.placed
    submit = worker_pb.Submit(
        handle=1,
        request_id=f"r{index}",
        prompt_len=len(token_ids),
        num_token_ids=len(token_ids),
        token_ids=token_ids,
        sampling=SamplingParams(max_new_tokens=output_len),
        reservation_id=placed.reservation_id,
    )
    stub: Any = WorkerServiceStub(channels[placed.address])
    async for _ in stub.Generate(worker_pb.GenerateRequest(submit=submit)):
        pass
    outcome = pb.RequestOutcome(
        request_id=f"r{index}",
        reservation_id=placed.reservation_id,
        worker_id=placed.worker_id,
        num_prompt_tokens=len(token_ids),
        output_tokens=output_len,
    )
    await schedulers.ReportRequests(pb.ReportRequestsRequest(outcomes=[outcome]))
    return str(placed.worker_id)


def _computed(workers: list[MockWorker]) -> int:
    """Prompt tokens that no cache held."""
    return sum(
        worker.engine.num_prompt_tokens - worker.engine.num_cached_tokens for worker in workers
    )


@pytest.mark.parametrize("with_index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize(
    ("prefill_tokens_per_s", "output_len"),
    [(40_000.0, 16), (4_000.0, 16), (40_000.0, 128)],
    ids=["prefill of 0.1 s", "prefill of 1 s", "prefill of 0.1 s, long answers"],
)
async def test_64_requests_with_one_new_prefix_cost_at_most_2_prefills_of_it(
    prefill_tokens_per_s: float, output_len: int, with_index: bool
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        index_target = None
        if with_index:
            # The index learns of workers from the scheduler, which has to be there first.
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            index_target = f"unix:{directory}/index"
        config = SchedulerConfig(listen="localhost:0", cache_index=index_target)
        scheduler = await enter(running_scheduler(config, grace_s=0.1))
        address = f"localhost:{scheduler.server.port}"
        if index_target is not None:
            await enter(
                running_cache_index(CacheIndexConfig(listen=index_target, scheduler=(address,)))
            )
        workers = [
            await enter(
                running_mock_worker(
                    MockWorkerConfig(
                        worker_id=f"w{number}",
                        scheduler=(address,),
                        prefill_tokens_per_s=prefill_tokens_per_s,
                        step_ms=5.0,
                        page_size=PAGE_SIZE,
                    )
                )
            )
            for number in range(NUM_WORKERS)
        ]
        channels = {worker.address: await enter(open_channel(worker.address)) for worker in workers}
        schedulers: Any = SchedulerServiceStub(await enter(open_channel(address)))
        async for table in schedulers.WatchWorkers(pb.WatchWorkersRequest()):
            if sum(len(pool.workers) for pool in table.pools) == NUM_WORKERS:
                break
        chosen = await asyncio.gather(
            *(_one(schedulers, channels, i, output_len) for i in range(64))
        )
        assert len(chosen) == 64
        # Beside the prefix, each computes its own tokens and what a match leaves at its end.
        assert _computed(workers) <= 2 * len(PREFIX) + 64 * (OWN_TOKENS + PAGE_SIZE)
