from pathlib import Path

import pytest

from services.bench.engine.config import LatencyConfig, OfflineConfig
from services.bench.serving.config import ServingConfig
from services.common.config import parse_config
from services.common.model_files import builtin_model_path


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
