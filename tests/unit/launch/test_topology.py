"""What the launcher passes on is what each service understands."""

import math
from pathlib import Path
from typing import Any

import pytest

from services.cache_index.config import CacheIndexConfig
from services.common.config import parse_config
from services.common.edge_flags import EdgeFlags
from services.common.telemetry import TelemetryFlags
from services.common.tls import TlsFlags
from services.gateway.config import GatewayConfig
from services.launch.config import ServeConfig
from services.launch.hosts import HostUnreachableError
from services.launch.topology import build_topology
from services.scheduler.config import SchedulerConfig
from services.tokenizer.config import TokenizerConfig
from services.worker.config import WorkerConfig

CONFIGS: dict[str, Any] = {
    "gateway": GatewayConfig,
    "tokenizer": TokenizerConfig,
    "scheduler": SchedulerConfig,
    "cache_index": CacheIndexConfig,
    "worker": WorkerConfig,
}

# Two replicas of two GPUs on each of two hosts.
SPREAD: dict[str, Any] = {
    "dp": 4,
    "tp_size": 2,
    "nnodes": 2,
    "nccl_init_addr": "127.0.0.2:5000",
}


def parsed(config: ServeConfig) -> dict[str, Any]:
    """Each service's own configuration, by the launcher's name for it."""
    services = {}
    for spec in build_topology(config, Path("/private"), 1):
        module = spec.argv[2].removeprefix("services.")
        services[spec.name] = parse_config(CONFIGS[module], module, spec.argv[3:])
    return services


def test_every_service_takes_its_arguments() -> None:
    services = parsed(ServeConfig(dp=2))
    assert set(services) == {
        *("gateway", "tokenizer", "scheduler", "index", "worker-0", "worker-1"),
    }
    assert all(service.parent_pid == 1 for service in services.values())


def test_services_find_each_other() -> None:
    services = parsed(ServeConfig())
    assert services["gateway"].schedulers == (services["scheduler"].listen,)
    assert services["gateway"].tokenizers == (services["tokenizer"].listen,)
    assert services["scheduler"].cache_index == services["index"].listen


def test_what_the_operator_asks_reaches_the_scheduler() -> None:
    asked = ServeConfig(policy="round_robin", tenants=Path("/tenants.json"), max_queue_wait_s=9.5)
    scheduler = parsed(asked)["scheduler"]
    assert (scheduler.policy, scheduler.tenants) == ("round_robin", Path("/tenants.json"))
    assert scheduler.max_queue_wait_s == 9.5
    assert parsed(ServeConfig())["scheduler"].tenants is None
    assert parsed(ServeConfig())["scheduler"].max_queue_wait_s == 60.0
    endless = parsed(ServeConfig(max_queue_wait_s=math.inf))["scheduler"]
    assert endless.max_queue_wait_s == math.inf


def test_the_file_of_tenants_reaches_the_gateway_too() -> None:
    assert parsed(ServeConfig(tenants=Path("/t.json")))["gateway"].tenants == Path("/t.json")
    assert parsed(ServeConfig())["gateway"].tenants is None


def test_what_the_operator_asks_reaches_the_worker() -> None:
    worker = parsed(
        ServeConfig(
            served_model_name="small",
            tp_size=2,
            page_size=32,
            context_length=512,
            max_total_tokens=4096,
            chunked_prefill_size=64,
            max_running_requests=5,
            dtype="bfloat16",
            device="cpu",
            load_format="dummy",
            quantization="fp8",
            kv_cache_dtype="fp8_e5m2",
            attention_backend="torch",
            disable_flashinfer=True,
            attention_reduce_in_fp32=True,
            disable_cuda_graph=True,
            enable_torch_compile=True,
            schedule_policy="fcfs",
            kernel_cache_dir=Path("/kernels"),
            mem_fraction_static=0.7,
        )
    )["worker-0"]
    assert (worker.schedule_policy, worker.enable_torch_compile) == ("fcfs", True)
    assert (worker.kernel_cache_dir, worker.mem_fraction_static) == (Path("/kernels"), 0.7)
    assert (worker.served_model_name, worker.tp_size, worker.page_size) == ("small", 2, 32)
    assert (worker.context_length, worker.max_total_tokens) == (512, 4096)
    assert (worker.chunked_prefill_size, worker.max_running_requests) == (64, 5)
    assert (worker.dtype, worker.device, worker.load_format) == ("bfloat16", "cpu", "dummy")
    assert (worker.quantization, worker.kv_cache_dtype) == ("fp8", "fp8_e5m2")
    assert (worker.attention_backend, worker.disable_cuda_graph) == ("torch", True)
    assert (worker.disable_flashinfer, worker.attention_reduce_in_fp32) == (True, True)


def test_services_behind_the_gateway_get_ports_for_their_metrics_in_order() -> None:
    services = parsed(ServeConfig(dp=2, metrics_port=29000))
    ports = {name: services[name].metrics_port for name in sorted(services) if name != "gateway"}
    assert ports == {
        "scheduler": 29000,
        "index": 29001,
        "tokenizer": 29002,
        "worker-0": 29003,
        "worker-1": 29004,
    }
    assert parsed(ServeConfig())["scheduler"].metrics_port is None


def test_every_service_traces_and_logs_as_the_operator_asks() -> None:
    telemetry = TelemetryFlags(
        otlp_traces_endpoint="tempo:4317", trace_sample_ratio=0.01, log_format="json"
    )
    services = parsed(ServeConfig(dp=2, telemetry=telemetry))
    assert {name: service.telemetry for name, service in services.items()} == dict.fromkeys(
        services, telemetry
    )


def test_the_grpc_port_follows_the_http_port() -> None:
    assert parsed(ServeConfig(port=8000))["gateway"].grpc_listen == "127.0.0.1:8001"
    assert parsed(ServeConfig(port=8000, grpc_port=9))["gateway"].grpc_listen == "127.0.0.1:9"


def test_every_replica_has_gpus_of_its_own() -> None:
    services = parsed(ServeConfig(tp_size=2, dp=2, base_gpu_id=1))
    assert [services[f"worker-{index}"].base_gpu_id for index in range(2)] == [1, 3]


def test_a_node_above_0_runs_its_ranks_and_nothing_else() -> None:
    asked: dict[str, Any] = {"tp_size": 4, "nnodes": 2, "nccl_init_addr": "node-0:5000"}
    first = parsed(ServeConfig(node_rank=0, **asked))
    assert len(first) == 5
    (node,) = parsed(ServeConfig(node_rank=1, disable_custom_all_reduce=True, **asked)).values()
    assert first["worker-0"].nccl_init_addr == node.nccl_init_addr == "node-0:5000"
    assert (first["worker-0"].node_rank, node.node_rank) == (0, 1)
    assert (first["worker-0"].nnodes, node.nnodes, node.tp_size) == (2, 2, 4)
    assert (first["worker-0"].disable_custom_all_reduce, node.disable_custom_all_reduce) == (
        False,
        True,
    )


def test_replicas_on_other_hosts_register_with_host_0() -> None:
    first = parsed(ServeConfig(node_rank=0, node_addr="127.0.0.2", **SPREAD))
    assert set(first) == {*("gateway", "tokenizer", "scheduler", "index", "worker-0", "worker-1")}
    assert first["scheduler"].listen == "127.0.0.2:5000"
    assert first["gateway"].schedulers == (first["scheduler"].listen,)
    assert (
        first["worker-0"].listen
        == first["worker-0"].advertise_address
        == ("unix:/private/worker-0.sock")
    )
    other = parsed(ServeConfig(node_rank=1, node_addr="127.0.0.3", **SPREAD))
    addresses = [
        (worker.name, worker.listen, worker.advertise_address) for worker in other.values()
    ]
    assert addresses == [
        ("worker-2", "127.0.0.3:5002", "127.0.0.3:5002"),
        ("worker-3", "127.0.0.3:5003", "127.0.0.3:5003"),
    ]
    for worker in (*other.values(), first["worker-1"]):
        assert worker.scheduler == ("127.0.0.2:5000",)
        # Each is on one host, whatever the number of hosts.
        assert (worker.nnodes, worker.node_rank, worker.nccl_init_addr) == (1, 0, None)
    assert [worker.base_gpu_id for worker in other.values()] == [0, 2]


def test_a_host_without_a_given_address_listens_on_all_and_names_the_one_towards_host_0() -> None:
    other = parsed(ServeConfig(node_rank=1, **SPREAD))["worker-2"]
    assert (other.listen, other.advertise_address) == ("0.0.0.0:5002", "127.0.0.1:5002")
    first = parsed(ServeConfig(node_rank=0, **SPREAD))
    assert first["scheduler"].listen == "0.0.0.0:5000"
    assert first["worker-0"].scheduler == ("127.0.0.1:5000",)


def test_a_host_0_that_no_address_leads_to_is_named() -> None:
    asked = SPREAD | {"nccl_init_addr": "no-such-host.invalid:5000"}
    with pytest.raises(HostUnreachableError, match=r"host 0, no-such-host\.invalid"):
        parsed(ServeConfig(node_rank=1, **asked))


def test_requests_get_the_time_that_was_asked_to_end() -> None:
    asked = ServeConfig(node_rank=0, shutdown_grace_s=42, **SPREAD)
    assert parsed(asked)["gateway"].shutdown_grace_s == 42
    # Host 0's gateway drains before its workers; the others' workers hear of it alone.
    assert parsed(asked)["worker-0"].drain_timeout_s == 1
    other = ServeConfig(node_rank=1, shutdown_grace_s=42, **SPREAD)
    assert parsed(other)["worker-2"].drain_timeout_s == 42
    assert all(spec.grace_s > 42 for spec in build_topology(other, Path("/private"), 1))


def test_every_host_with_replicas_has_ports_for_their_metrics() -> None:
    other = parsed(ServeConfig(node_rank=1, metrics_port=29000, **SPREAD))
    assert [worker.metrics_port for worker in other.values()] == [29003, 29004]


def test_a_check_between_gpus_reaches_the_worker() -> None:
    assert parsed(ServeConfig(tp_size=2, enable_p2p_check=True))["worker-0"].enable_p2p_check
    assert not parsed(ServeConfig(tp_size=2))["worker-0"].enable_p2p_check


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"tp_size": 2, "nnodes": 2}, "nnodes > 1 needs --nccl-init-addr"),
        ({"dp": 3, "nnodes": 2, "nccl_init_addr": "h:1"}, "nnodes 2 does not divide the 3 of --dp"),
        ({"dp": 2, "nnodes": 2}, "nnodes > 1 needs --nccl-init-addr"),
        ({"dp": 2, "nnodes": 2, "nccl_init_addr": "h"}, "nccl-init-addr must be host:port"),
        (
            {"dp": 2, "nnodes": 2, "node_rank": 2, "nccl_init_addr": "h:1"},
            r"node-rank must be within 0\.\.1, got 2",
        ),
        ({"dp": 2, "tp_size": 2, "nccl_init_addr": "h:1"}, "nccl-init-addr is where hosts meet"),
        ({"dp": 2, "node_addr": "10.0.0.1"}, "node-addr is for replicas on several hosts"),
        ({"end_with_node_0": True}, "end-with-node-0 is for several hosts"),
        ({"nccl_init_addr": "h:1"}, "nccl-init-addr is where several ranks meet"),
        ({"tp_size": 2, "device": "cpu", "enable_p2p_check": True}, "enable-p2p-check needs GPUs"),
        ({"enable_p2p_check": True}, "enable-p2p-check needs several GPUs"),
        ({"base_gpu_id": -1}, "base_gpu_id must be >= 0"),
    ],
)
def test_replicas_that_cannot_be_are_refused(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ServeConfig(**asked)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"context_length": 0}, "context_length must be >= 1"),
        ({"chunked_prefill_size": -1}, "chunked_prefill_size must be >= 1"),
        ({"max_running_requests": 0}, "max_running_requests must be >= 1"),
        ({"max_total_tokens": 3}, "max_total_tokens must hold a page of 16"),
        ({"mem_fraction_static": 1.5}, "mem_fraction_static must be within"),
        ({"port": 0}, "port must be within 1..65535"),
        ({"port": 65535}, "leaves none for gRPC"),
        ({"port": 8000, "grpc_port": 8000}, "grpc-port must differ from port"),
        ({"shutdown_grace_s": -1}, "shutdown_grace_s must be >= 0"),
        ({**SPREAD, "port": 5001}, "takes ports up to 5003; port is 5001"),
        ({**SPREAD, "port": 5004, "grpc_port": 5003}, "up to 5003; grpc-port is 5003"),
        ({**SPREAD, "metrics_port": 4998}, "up to 5003; metrics-port is 4998"),
        ({**SPREAD, "nccl_init_addr": "h:65533"}, "h:65533 takes 4 ports, all within 1..65535"),
        ({"metrics_port": 0}, "metrics-port 0 takes 4 ports, all within 1..65535"),
        ({"metrics_port": 65533, "dp": 2}, "metrics-port 65533 takes 5 ports"),
        ({"metrics_port": 29998}, "ports up to 30001; port is 30000"),
        ({"metrics_port": 30001}, "ports up to 30004; grpc-port is 30001"),
        (
            {
                "tp_size": 2,
                "nnodes": 2,
                "node_rank": 1,
                "nccl_init_addr": "h:1",
                "metrics_port": 29000,
            },
            "metrics-port is for host 0",
        ),
    ],
)
def test_what_no_service_can_work_with_is_refused_before_any_starts(
    asked: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        ServeConfig(**asked)


def test_a_policy_that_the_scheduler_lacks_is_a_bad_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_config(ServeConfig, "serve", ["--policy", "bogus"])
    assert raised.value.code == 2


def test_the_edge_reaches_the_gateway_and_keys_are_on_no_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edge = EdgeFlags(
        ssl_certfile=Path("c"),
        ssl_keyfile=Path("k"),
        api_key="s3cret-1",
        admin_api_key="s3cret-2",
        api_keys=Path("keys.json"),
    )
    specs = build_topology(ServeConfig(edge=edge), Path("/private"), 1)
    assert not any("s3cret" in argument for spec in specs for argument in spec.argv)
    gateway = next(spec for spec in specs if spec.name == "gateway")
    assert [spec.name for spec in specs if spec.environment] == ["gateway"]
    assert gateway.health_target == "https://127.0.0.1:30000/health"
    for name, value in gateway.environment.items():
        monkeypatch.setenv(name, value)
    assert parse_config(GatewayConfig, "gateway", gateway.argv[3:]).edge == edge


def test_certificates_reach_every_service_on_every_host() -> None:
    tls = TlsFlags(
        tls_cert_file=Path("c"),
        tls_key_file=Path("k"),
        tls_ca_file=Path("a"),
        tls_server_name="rhizome.internal",
    )
    hosts = {"dp": 2, "nnodes": 2, "nccl_init_addr": "127.0.0.1:5000"}
    for more in ({}, {**hosts}, {**hosts, "node_rank": 1}):
        config = ServeConfig(tls=tls, **more)  # type: ignore[arg-type]
        assert {service.tls for service in parsed(config).values()} == {tls}
    # The gateway's port is for clients, and asks for no certificate.
    specs = build_topology(ServeConfig(tls=tls), Path("/private"), 1)
    assert [spec.name for spec in specs if spec.is_public] == ["gateway"]
