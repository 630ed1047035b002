import os
from pathlib import Path

import pytest

from services.bench.engine.config import LatencyConfig, OfflineConfig
from services.bench.engine.startup import build_engine
from services.bench.serving.config import ServingConfig
from services.common.config import engine_environment, parse_config
from services.common.model_files import builtin_model_path
from services.worker.config import WorkerConfig


def test_sglangs_latency_arguments_are_taken():
    config = parse_config(
        LatencyConfig,
        "bench",
        [
            *("--model-path", str(builtin_model_path()), "--batch-size", "1", "8"),
            *("--input-len", "256", "--output-len", "32", "--load-format", "dummy", "--tp", "2"),
        ],
    )
    assert (config.batch_size, config.input_len, config.output_len) == ((1, 8), (256,), (32,))
    options = config.engine.engine_options()
    assert (options.load_format, options.tp_size) == ("dummy", 2)


@pytest.mark.parametrize("config_type", [LatencyConfig, OfflineConfig])
@pytest.mark.parametrize(
    "flag", ["--listen=localhost:1", "--scheduler=x:1", "--profile-dir=/tmp", "--role=decode"]
)
def test_flags_of_the_workers_front_are_refused(config_type, flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_config(config_type, "bench", [flag])
    assert exit_.value.code == 2
    assert "has no meaning here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch-size", "0"], "batch_size takes numbers >= 1"),
        (["--output-len", "1"], "output_len takes numbers >= 2"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--output-file", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--output-file", "/"], "/ is a directory"),
        (
            ["--tp=2", "--nnodes=2", "--node-rank=1", "--nccl-init-addr=h:1"],
            "node_rank must be 0",
        ),
    ],
)
def test_a_static_batch_that_cannot_be_is_refused(arguments, reason, capsys):
    with pytest.raises(SystemExit):
        parse_config(LatencyConfig, "bench", arguments)
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"base_url": "localhost:1"}, "http://"),
        ({"base_url": "http://"}, "must name a host"),
        ({"base_url": "http://h:99999"}, "must name a host and may name a port"),
        ({"base_url": "http://h:1/v1/"}, "without /v1"),
        ({"output_details": True}, "output_file, which is not given"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"repeat": 0}, "repeat"),
        ({"warmup_requests": -1}, "warmup_requests"),
        ({"backend": "chat", "prompt_format": "ids"}, "chat"),
        ({"plot_file": Path("x.png")}, "must end in .svg"),
        ({"output_file": Path("/nowhere/x.json")}, "no directory"),
    ],
)
def test_a_load_that_cannot_be_is_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        ServingConfig(**values)


def test_a_presets_arrivals_can_be_changed():
    config = parse_config(
        ServingConfig, "bench", ["--preset", "poisson16", "--request-rate", "8", "--seed", "11"]
    )
    assert config.arrival.request_rate == 8.0
    assert config.arrival.num_processes == 4
    assert config.flags.resolve().seed == 11


def test_chat_sends_text_and_the_others_ids_unless_told():
    assert not ServingConfig(backend="chat").sends_ids
    assert ServingConfig(backend="generate").sends_ids
    assert not ServingConfig(prompt_format="text").sends_ids


def test_the_folder_of_compiled_kernels_is_the_measured_engines(tmp_path, monkeypatch):
    for name in engine_environment(tmp_path):
        monkeypatch.setenv(name, "elsewhere")
    config = WorkerConfig(
        kernel_cache_dir=tmp_path, load_format="dummy", device="cpu", max_total_tokens=64
    )
    build_engine(config, config.engine_options()).runner.close()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
