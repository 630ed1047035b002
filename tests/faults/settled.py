"""What workers run and hold: something during a drill, nothing once its streams are over."""

from __future__ import annotations

import time

import grpc

from rhizome.scheduler.v1 import (
    scheduler_service_pb2 as scheduler_pb,
    scheduler_service_pb2_grpc as scheduler_grpc,
)
from rhizome.worker.v1 import worker_service_pb2 as pb, worker_service_pb2_grpc as pb_grpc
from tests.fakes.cluster import Cluster

_PATIENCE_S = 30.0


def worker_info(cluster: Cluster, number: int) -> pb.GetWorkerInfoResponse:
    with grpc.insecure_channel(f"unix:{cluster.directory}/worker-{number}.sock") as channel:
        stub = pb_grpc.WorkerServiceStub(channel)
        response: pb.GetWorkerInfoResponse = stub.GetWorkerInfo(
            pb.GetWorkerInfoRequest(), timeout=_PATIENCE_S, wait_for_ready=True
        )
        return response


def busiest_worker(cluster: Cluster, num_workers: int = 2) -> int:
    """The number of the worker that runs most: a fault of an idle one shows nothing."""
    loads = [worker_info(cluster, number).load for number in range(num_workers)]
    return max(range(num_workers), key=lambda number: loads[number].num_handles)


def assert_nothing_is_left(cluster: Cluster, num_workers: int = 2) -> None:
    """No worker runs or holds anything for anybody, and each can use all of its pages."""
    for number in range(num_workers):
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            info = worker_info(cluster, number)
            load = info.load
            if not (load.num_running or load.num_waiting or load.num_handles):
                break
            assert time.monotonic() < deadline, f"left on worker {number}: {load}"
            time.sleep(0.1)
        assert load.num_free_pages + load.num_evictable_pages == info.num_pages
    assert cluster.metric(0, "rhizome_gateway_inflight_prompts") == 0


def until_ready(cluster: Cluster, number: int) -> None:
    """Until the first scheduler gives new requests to so many workers."""
    deadline = time.monotonic() + _PATIENCE_S
    while (ready := _num_ready(cluster)) != number:
        assert time.monotonic() < deadline, f"{ready} workers are ready, not {number}"
        time.sleep(0.1)


def _num_ready(cluster: Cluster) -> int:
    with grpc.insecure_channel(f"unix:{cluster.directory}/scheduler-0.sock") as channel:
        call = scheduler_grpc.SchedulerServiceStub(channel).WatchWorkers(
            scheduler_pb.WatchWorkersRequest(), timeout=_PATIENCE_S, wait_for_ready=True
        )
        table = next(iter(call))
        call.cancel()
    return sum(
        entry.state == scheduler_pb.WORKER_STATE_READY
        for pool in table.pools
        for entry in pool.workers
    )
