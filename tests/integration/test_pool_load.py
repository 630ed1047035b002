"""What a scheduler says of its pools' load, over real gRPC."""

from __future__ import annotations

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.rpc import open_channel
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import running_scheduler
from tests.fakes.scheduler_peers import make_description, registered_worker


async def test_a_pools_load_is_told_and_what_is_unknown_is_unset() -> None:
    async with running_scheduler(SchedulerConfig(listen="localhost:0")) as scheduler:
        address = f"localhost:{scheduler.server.port}"
        async with open_channel(address) as channel:
            stub = pb_grpc.SchedulerServiceStub(channel)

            async def load() -> pb.PoolLoad:
                (pool,) = (await stub.GetPoolLoad(pb.GetPoolLoadRequest())).pools
                return pool

            assert not (await stub.GetPoolLoad(pb.GetPoolLoadRequest())).pools
            description = make_description("w0", max_running_sequences=4)
            async with registered_worker(address, description) as worker:
                await worker.report(num_running=1, num_waiting=1, num_free_pages=7_500)
                while not (told := await load()).workers[0].num_running:
                    pass
                assert (told.model, told.num_queued) == ("model", 0)
                assert (told.saturation, told.kv_used_ratio) == (0.5, 0.25)
                assert told.oldest_queued.ToTimedelta().total_seconds() == 0
                (one,) = told.workers
                assert (one.worker_id, one.state) == ("w0", pb.WORKER_STATE_READY)
                assert (one.num_running, one.num_waiting, one.num_promised) == (1, 1, 0)
                await stub.DrainWorker(pb.DrainWorkerRequest(worker_id="w0", reason="test"))
                told = await load()
                assert told.workers[0].state == pb.WORKER_STATE_DRAINING
                assert not told.HasField("saturation")
                assert not told.HasField("kv_used_ratio")
