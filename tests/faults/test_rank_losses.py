"""A rank that is killed or stopped ends its worker within seconds, idle or in a step."""

import asyncio
import signal
import socket
from pathlib import Path

import grpc
import psutil
import pytest

from services.common.rpc import open_channel
from tests.fakes.session_client import SessionClient, make_submit
from tests.fakes.worker_bench import until
from tests.fakes.worker_process import WorkerProcess

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

PROMPT = list(range(10, 60))
# A collective waits 20 s for a rank that lives but is silent; all else is faster.
END_S = 40.0


def other_rank(worker: WorkerProcess) -> psutil.Process:
    (rank,) = worker.engine().children()
    return rank


def start_pair(directory: Path) -> WorkerProcess:
    worker = WorkerProcess(directory, "--max-total-tokens", "4096", "--tp", "2", "--device", "cpu")
    worker.wait_until_ready()
    return worker


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_while_idle_ends_the_worker(tmp_path: Path, number: signal.Signals) -> None:
    worker = start_pair(tmp_path)
    try:
        rank = other_rank(worker)
        rank.send_signal(number)
        assert worker.wait(END_S) == 4
        assert "event=rank_lost" in worker.log.read_text()
        psutil.wait_procs([rank], timeout=5)
        assert not rank.is_running()
    finally:
        worker.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_rank_lost_in_a_step_fails_requests_with_a_retryable_status(
    tmp_path: Path, number: signal.Signals
) -> None:
    worker = await asyncio.to_thread(start_pair, tmp_path)
    try:
        async with open_channel(worker.address) as channel:
            client = SessionClient(channel)
            await client.open()
            (received,) = await client.submit(make_submit(1, PROMPT, max_new_tokens=3000))
            await until(lambda: bool(received.ids))
            other_rank(worker).send_signal(number)
            await client.ended()
            assert received.error is not None
            assert received.error.code == grpc.StatusCode.ABORTED.value[0]
        assert await asyncio.to_thread(worker.wait, END_S) == 4
    finally:
        worker.close()


def start_node(directory: Path, node_rank: int, address: str) -> WorkerProcess:
    directory.mkdir()
    return WorkerProcess(
        directory,
        *("--max-total-tokens", "4096", "--tp", "2", "--device", "cpu", "--nnodes", "2"),
        *("--node-rank", str(node_rank), "--nccl-init-addr", address),
    )


def test_the_end_of_rank_0_ends_the_workers_of_all_nodes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    nodes = [start_node(tmp_path / str(rank), rank, address) for rank in range(2)]
    try:
        for node in nodes:
            node.wait_until_ready()
        nodes[0].engine().kill()
        assert [node.wait(END_S) for node in nodes] == [4, 4]
        assert "the group has ended: rank 1" in nodes[1].log.read_text()
    finally:
        for node in nodes:
            node.close()
