"""The telemetry flags as each service has them."""

from __future__ import annotations

import importlib

import pytest

from services.common.config import parse_config
from services.common.telemetry import TelemetryFlags, telemetry_arguments
from services.scheduler.config import SchedulerConfig

# cyclopts parses dataclasses otherwise where pydantic is loaded, as it is beside the openai client.
importlib.import_module("pydantic")


def flags(*arguments: str) -> TelemetryFlags:
    return parse_config(SchedulerConfig, "scheduler", arguments).telemetry


def test_nothing_is_traced_unless_asked_for() -> None:
    assert flags() == TelemetryFlags()
    assert flags().otlp_traces_endpoint is None
    assert flags().log_format == "text"


def test_flags_beat_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHIZOME__SCHEDULER__OTLP_TRACES_ENDPOINT", "tempo:4317")
    monkeypatch.setenv("RHIZOME__SCHEDULER__TRACE_SAMPLE_RATIO", "0.5")
    monkeypatch.setenv("RHIZOME__SCHEDULER__LOG_FORMAT", "json")
    given = flags("--trace-sample-ratio", "1")
    assert given == TelemetryFlags(
        otlp_traces_endpoint="tempo:4317", trace_sample_ratio=1.0, log_format="json"
    )


@pytest.mark.parametrize(
    "given",
    [
        TelemetryFlags(),
        TelemetryFlags(
            otlp_traces_endpoint="https://tempo:4317", trace_sample_ratio=0.01, log_format="json"
        ),
    ],
)
def test_what_the_launcher_passes_on_is_what_it_was_given(given: TelemetryFlags) -> None:
    assert flags(*telemetry_arguments(given)) == given


@pytest.mark.parametrize(
    "endpoint",
    ["tempo:4317", "[::1]:4317", "http://tempo:4317", "https://tempo", "http://tempo:4317/"],
)
def test_endpoints_are_accepted(endpoint: str) -> None:
    assert flags("--otlp-traces-endpoint", endpoint).otlp_traces_endpoint == endpoint


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--otlp-traces-endpoint", "tempo"),
        ("--otlp-traces-endpoint", ":4317"),
        ("--otlp-traces-endpoint", "tempo:port"),
        ("--otlp-traces-endpoint", "grpc://tempo:4317"),
        ("--otlp-traces-endpoint", "http://tempo:4318/v1/traces"),
        ("--trace-sample-ratio", "1.5"),
        ("--trace-sample-ratio", "nan"),
        ("--log-format", "xml"),
    ],
)
def test_bad_flags_are_refused_with_their_name(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        flags(flag, value)
    assert exit_status.value.code == 2
    assert flag.strip("-") in capsys.readouterr().err.replace("_", "-")
