"""One replica on two nodes, both of this host: rank 0 here, node 1 as a worker process."""

import shutil
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.worker.engine.batch import Runner
from services.worker.engine.distributed.channel import RankLostError
from services.worker.engine.messages import SamplingParams
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.engines import PAGE_SIZE, open_driver, open_runner
from tests.fakes.step_driver import GREEDY, StepDriver
from tests.fakes.worker_process import WorkerProcess

PROMPT = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(37)]
SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=0.9, seed=3, top_p=0.9),
    SamplingParams(temperature=0.0, logit_bias=((3, 1.0),)),
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, "Qwen3", vocab_size=VOCAB_SIZE + 1)
    return path


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def health_address() -> str:
    return free_address()


@pytest.fixture
def metrics_address() -> str:
    return free_address()


@pytest.fixture
def node(
    model_path: Path, address: str, health_address: str, metrics_address: str, tmp_path: Path
) -> Iterator[WorkerProcess]:
    ports = [each.rpartition(":")[2] for each in (health_address, metrics_address)]
    flags = ("--health-port", ports[0], "--metrics-port", ports[1])
    process = start_node(tmp_path, model_path, address, *flags)
    yield process
    process.close()


def start_node(directory: Path, model_path: Path, address: str, *more: str) -> WorkerProcess:
    """Node 1, told what `open_leader` tells node 0."""
    return WorkerProcess(
        directory,
        *("--model-path", str(model_path), "--device", "cpu", "--page-size", str(PAGE_SIZE)),
        *("--max-total-tokens", str(1024 * PAGE_SIZE), "--max-running-requests", "64"),
        *("--tp", "2", "--nnodes", "2", "--node-rank", "1", "--nccl-init-addr", address),
        *more,
    )


def open_leader(model_path: Path, address: str, **changes: Any) -> Runner:
    return open_runner(model_path, tp_size=2, nnodes=2, nccl_init_addr=address, **changes)


def generate(driver: StepDriver) -> list[list[int]]:
    sequences = [driver.start(PROMPT[i:], kind) for i, kind in enumerate(SAMPLINGS)]
    return driver.generate(sequences, 16, chunk=20)


def test_two_nodes_give_the_tokens_of_one(
    model_path: Path, address: str, health_address: str, node: WorkerProcess
) -> None:
    runner = open_leader(model_path, address)
    node.wait_until_ready()
    # Probes speak no TLS, so each node has a port for them.
    with grpc.insecure_channel(health_address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert generate(StepDriver(runner, page_size=PAGE_SIZE)) == generate(open_driver(model_path))
    runner.close()
    # The group has ended: who keeps the node running shall start it again.
    assert node.wait() == 4


def test_a_node_above_0_tells_of_its_process(
    model_path: Path, address: str, metrics_address: str, node: WorkerProcess
) -> None:
    runner = open_leader(model_path, address)
    node.wait_until_ready()
    with urllib.request.urlopen(f"http://{metrics_address}/metrics") as response:
        said = response.read().decode()
    assert "process_resident_memory_bytes" in said
    # The replica's own are rank 0's to tell: twice, they would count twice.
    assert "rhizome_worker_" not in said
    runner.close()


def test_a_node_that_dies_is_an_error_at_the_next_step(
    model_path: Path, address: str, node: WorkerProcess
) -> None:
    runner = open_leader(model_path, address)
    driver = StepDriver(runner, page_size=PAGE_SIZE)
    sequence = driver.start(PROMPT)
    driver.generate([sequence], 2)
    node.kill()
    with pytest.raises(RankLostError):
        driver.generate([sequence], 50)
    runner.close()


def test_nodes_that_were_told_different_things_do_not_start(
    model_path: Path, address: str, tmp_path: Path
) -> None:
    node = start_node(tmp_path, model_path, address, "--chunked-prefill-size", "64")
    with pytest.raises(ValueError, match="node 1 and node 0 differ in: chunked_prefill_size"):
        open_leader(model_path, address)
    assert node.wait() == 3
    assert "Traceback" not in node.log.read_text()
    node.close()


def test_a_checkpoint_that_is_wrong_on_another_node_is_not_tried_again(
    model_path: Path, address: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_path, broken)
    (broken / "model.safetensors").write_bytes(b"")
    node = start_node(tmp_path, broken, address)
    with pytest.raises(ValueError, match=r"rank 1 failed: cannot read .*model\.safetensors"):
        open_leader(model_path, address)
    assert node.wait() == 3
    assert "Traceback" not in node.log.read_text()
    node.close()


def test_a_node_that_is_told_to_stop_ends_well(node: WorkerProcess) -> None:
    while "event=node_started" not in node.log.read_text():
        pass
    node.terminate()
    assert node.wait() == 0
