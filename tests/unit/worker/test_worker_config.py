"""The worker's flags: SGLang's names, and what the engine is told."""

from pathlib import Path

import pytest

from services.common.config import parse_config
from services.worker.config import WorkerConfig
from services.worker.engine.options import EngineOptions


def parse(*arguments: str) -> WorkerConfig:
    return parse_config(WorkerConfig, "worker", arguments)


@pytest.mark.parametrize("flag", ["--tp-size", "--tp", "--tensor-parallel-size"])
def test_sglangs_names_of_tensor_parallelism_work(flag: str) -> None:
    assert parse(flag, "2").tp_size == 2


@pytest.mark.parametrize("flag", ["--nccl-init-addr", "--nccl-init", "--dist-init-addr"])
def test_sglangs_names_of_several_nodes_work(flag: str) -> None:
    options = parse(
        *("--tp", "4", "--nnodes", "2", "--node-rank", "1", flag, "node-0:5000"),
        *("--disable-custom-all-reduce", "--base-gpu-id", "2"),
    ).engine_options()
    assert (options.nnodes, options.node_rank, options.ranks_per_node) == (2, 1, 2)
    assert options.nccl_init_addr == "node-0:5000"
    assert options.disable_custom_all_reduce
    assert options.base_gpu_id == 2


def test_flags_become_the_engines_options() -> None:
    config = parse(
        *("--model-path", "/m/llama", "--max-total-tokens", "1000", "--page-size", "32"),
        *("--max-running-requests", "7", "--context-length", "512", "--dtype", "bfloat16"),
        *("--mem-fraction-static", "0.5", "--chunked-prefill-size", "64", "--device", "cpu"),
        *("--attention-backend", "torch", "--disable-cuda-graph", "--enable-torch-compile"),
        *("--disable-flashinfer", "--attention-reduce-in-fp32", "--schedule-policy", "fcfs"),
        *("--quantization", "fp8", "--kv-cache-dtype", "fp8_e5m2"),
    )
    assert config.engine_options() == EngineOptions(
        model_path=Path("/m/llama"),
        tokenizer_path=Path("/m/llama"),
        device="cpu",
        dtype="bfloat16",
        page_size=32,
        context_length=512,
        max_running_sequences=7,
        chunked_prefill_size=64,
        attention_backend="torch",
        disable_flashinfer=True,
        attention_reduce_in_fp32=True,
        quantization="fp8",
        kv_cache_dtype="fp8_e5m2",
        disable_cuda_graph=True,
        enable_torch_compile=True,
        schedule_policy="fcfs",
        mem_fraction_static=0.5,
        num_pages=31,
    )
    assert config.model_name == "llama"


def test_repeated_flags_gather() -> None:
    config = parse("--scheduler", "a:1", "--scheduler", "b:2", "--label", "zone=x", "--label", "r=")
    assert config.scheduler == ("a:1", "b:2")
    assert config.labels == {"zone": "x", "r": ""}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tp-size", "0"),
        ("--mem-fraction-static", "1.5"),
        ("--label", "zone"),
        ("--max-total-tokens", "3"),
        ("--role", "none"),
        ("--quantization", "int4"),
        ("--kv-cache-dtype", "fp8"),
        ("--schedule-policy", "random"),
        ("--unknown", "1"),
        ("--drain-timeout-s", "-3"),
        ("--nccl-init-addr", "node-0:5000"),
        ("--enable-p2p-check",),
        ("--listen", "0.0.0.0:30040", "--scheduler", "localhost:30020"),
    ],
)
def test_bad_flags_exit_with_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(*arguments)
    assert raised.value.code == 2
