"""One replica of a model on two machines, whose network is cut: namespaces stand for the machines.

Rank 1 is alone on its machine; everything else, a second worker too, is on the other. Services
find each other by names, as they do in the chart's pods, and have the chart's environment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai import OpenAI

from tests.cluster.containers import Container, ContainerSpec
from tests.cluster.network import Machine, missing_rights, running_network
from tests.cluster.programs import until
from tests.faults.streams import assert_same, longest_gap_s, run_streams

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing_rights()), reason=missing_rights()),
]

NUM_STREAMS = 8
# Longest times (docs/tensor-parallelism.md) that a lost machine and a silent collective may go
# unnoticed, and some to end.
NOTICED_S = 40.0


@dataclass
class Machines:
    """The services, by name, on `first` and `second`."""

    first: Machine
    second: Machine
    directory: Path
    containers: dict[str, Container] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.first.address}:30000"

    def start(self, name: str, machine: Machine, module: str, **fields: object) -> None:
        environment = {
            f"RHIZOME__{module.upper()}__{key.upper()}": str(value) for key, value in fields.items()
        }
        spec = ContainerSpec(
            name=name,
            machine=machine,
            command=("python", "-m", f"services.{module}"),
            environment={"HOME": "/tmp", **environment},
            hosts=self.directory / "hosts",
            mounts={"/tmp": None, "/kernels": None},
        )
        self.containers[name] = Container(spec, self.directory)

    def start_all(self) -> None:
        names = f"{self.first.address} first pair-0.pair\n{self.second.address} second\n"
        (self.directory / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        schedulers = {"scheduler": "first:30020"}
        ranks = {
            "tp_size": 2,
            "nnodes": 2,
            "nccl_init_addr": "pair-0.pair:30043",
            "device": "cpu",
            "max_total_tokens": 16384,
        }
        # In turn, so that both workers have work.
        self.start("scheduler", self.first, "scheduler", listen="0.0.0.0:30020",
                   cache_index="first:30030", policy="round_robin")  # fmt: skip
        self.start("cache-index", self.first, "cache_index", listen="0.0.0.0:30030", **schedulers)
        self.start("tokenizer", self.first, "tokenizer", listen="0.0.0.0:30010")
        self.start("pair-0", self.first, "worker", listen="0.0.0.0:30040", node_rank=0,
                   advertise_address="first:30040", worker_id="pair",
                   **ranks, **schedulers)  # fmt: skip
        self.start("pair-1", self.second, "worker", listen="0.0.0.0:30040", node_rank=1, **ranks)
        self.start("single", self.first, "worker", listen="0.0.0.0:30050", device="cpu",
                   max_total_tokens=16384, advertise_address="first:30050", worker_id="single",
                   **schedulers)  # fmt: skip
        self.start("gateway", self.first, "gateway", host="0.0.0.0", port=30000,
                   grpc_listen="0.0.0.0:30001", tokenizers="first:30010",
                   schedulers="first:30020")  # fmt: skip

    def log(self, name: str) -> str:
        return self.containers[name].read_log()

    def serves(self, name: str, port: int) -> bool:
        """Whether a service's health says so."""
        target = f"{self.containers[name].spec.machine.address}:{port}"
        with grpc.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                response = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
            except grpc.RpcError:
                return False
            return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def until_all_serve(self) -> None:
        ports = {"gateway": 30001, "pair-0": 30040, "pair-1": 30040, "single": 30050}
        until(
            lambda: all(self.serves(name, port) for name, port in ports.items()),
            120,
            lambda: {name: self.log(name)[-1500:] for name in self.containers},
        )
        until(lambda: self.num_workers() == 2)

    def num_workers(self) -> int:
        """Workers that the gateway may use."""
        info = httpx.get(f"{self.url}/get_server_info", timeout=10).json()
        return len(info["internal_states"])

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with running_network() as network:
        running = Machines(
            network.add("first"), network.add("second"), tmp_path_factory.mktemp("machines")
        )
        try:
            running.start_all()
            running.until_all_serve()
            yield running
        finally:
            for container in running.containers.values():
                container.close()


@pytest.fixture
def whole(machines: Machines) -> Iterator[Machines]:
    """With a network that is whole, before and after."""
    machines.until_all_serve()
    yield machines
    machines.second.mend()


@pytest.fixture(scope="module")
def client(machines: Machines) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{machines.url}/v1", api_key="none", max_retries=0, timeout=90) as made:
        yield made


def seconds_until_ended(machines: Machines, since: float) -> dict[str, float]:
    """How long after `since` each rank's process ended; each must, with status 4."""
    ended: dict[str, float] = {}
    before = {name: len(machines.containers[name].statuses) for name in ("pair-0", "pair-1")}

    def all_have() -> bool:
        for name, number in before.items():
            if len(machines.containers[name].statuses) > number:
                ended.setdefault(name, time.monotonic() - since)
        return len(ended) == len(before)

    until(all_have, NOTICED_S, lambda: {name: machines.log(name)[-2000:] for name in before})
    assert {machines.containers[name].statuses[-1] for name in before} == {4}
    return ended


def test_a_cut_network_ends_the_group_and_its_requests_go_on_elsewhere(
    whole: Machines, client: OpenAI
) -> None:
    undisturbed = run_streams([client], NUM_STREAMS, lambda: None)
    migrations = whole.metric("rhizome_gateway_migrations_total")
    cut_at: list[float] = []

    def cut() -> None:
        whole.second.cut()
        cut_at.append(time.monotonic())

    disturbed = run_streams([client], NUM_STREAMS, cut)
    print(f"streams: longest gap {longest_gap_s(disturbed):.1f} s")
    assert_same(disturbed, undisturbed)
    assert whole.metric("rhizome_gateway_migrations_total") > migrations
    print(f"under load, seconds to the ranks' ends: {seconds_until_ended(whole, cut_at[0])}")
    # Requests do not wait for the group.
    assert_same(run_streams([client], NUM_STREAMS, lambda: None), undisturbed)
    whole.second.mend()
    whole.until_all_serve()
    assert_same(run_streams([client], NUM_STREAMS, lambda: None), undisturbed)


def test_a_cut_network_ends_an_idle_group(whole: Machines) -> None:
    whole.second.cut()
    print(f"idle, seconds to the ranks' ends: {seconds_until_ended(whole, time.monotonic())}")
    whole.second.mend()
    whole.until_all_serve()
