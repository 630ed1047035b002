"""`rhizome bench` as its user runs it, with the built-in model."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import httpx
import pytest

from tests.e2e.system import ROOT, System, running_system

SMALL = ("--vocab-size", "1536", "--input-len", "20", "40", "--output-len", "4", "8")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.launch", "bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def serving(system: System, *arguments: str) -> subprocess.CompletedProcess[str]:
    return bench("serving", "--base-url", system.url, "--warmup-requests", "2", *arguments)


def test_a_server_is_measured_table_json_and_plot(system: System, tmp_path: Path) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    result = serving(
        system,
        *(*SMALL, "--num-prompts", "8", "--num-processes", "2", "--repeat", "2", "--flush-cache"),
        *("--output-file", str(report), "--plot-file", str(plot), "--output-details"),
        *("--server-name", "rhizome test"),
    )
    assert result.returncode == 0, result.stderr
    assert "succeeded 16, failed 0" in result.stdout
    assert "TTFT p99 ms" in result.stdout
    loaded = json.loads(report.read_text())
    assert loaded["server"]["name"] == "rhizome test"
    assert loaded["protocol"] == {"runs": 2, "warmup_requests": 2, "cache_flushed": True}
    assert [run["num_succeeded"] for run in loaded["runs"]] == [8, 8]
    assert [run["num_wrong_length"] for run in loaded["runs"]] == [0, 0]
    # Flushed before each: the second run does not find the first one's prompts.
    assert all(run["cached_share"] < 0.5 for run in loaded["runs"])
    assert all(request["error"] is None for request in loaded["requests"][0])
    ElementTree.fromstring(plot.read_text())


@pytest.mark.parametrize("backend", ["chat", "generate"])
def test_other_apis_are_measured_with_conversations(system: System, backend: str) -> None:
    result = serving(
        system,
        *("--backend", backend, "--workload", "multiturn", "--num-groups", "2", *SMALL),
        *("--prompts-per-group", "2", "--prefix-len", "32", "--request-rate", "50"),
    )
    assert result.returncode == 0, result.stderr
    assert "succeeded 4, failed 0" in result.stdout


def test_requests_that_a_server_refuses_are_failures(system: System) -> None:
    result = bench(
        *("serving", "--base-url", system.url, "--warmup-requests", "0", "--num-prompts", "3"),
        *("--vocab-size", "120000", "--input-len", "8", "--output-len", "4"),
    )
    assert result.returncode == 1
    assert "succeeded 0, failed 3" in result.stdout
    assert "HTTP 400" in result.stdout


def test_an_unknown_benchmark_prints_the_usage() -> None:
    for arguments in ((), ("nothing",)):
        result = bench(*arguments)
        assert result.returncode == 2
        assert "usage: rhizome bench COMMAND" in result.stderr


def test_a_server_that_is_not_there_is_named() -> None:
    result = bench("serving", "--base-url", "http://127.0.0.1:1")
    assert result.returncode == 1
    assert "http://127.0.0.1:1 does not answer" in result.stderr


def test_latency_prints_what_sglang_prints(tmp_path: Path) -> None:
    report = tmp_path / "latency.json"
    result = bench(
        *("latency", "--batch-size", "1", "3", "--input-len", "40", "--output-len", "6"),
        *("--chunked-prefill-size", "16", "--max-total-tokens", "2048", "--breakdown"),
        *("--output-file", str(report), "--device", "cpu"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Prefill. latency:") == 2
    assert result.stdout.count("Decode.  median latency:") == 2
    loaded = json.loads(report.read_text())
    assert [case["batch_size"] for case in loaded["cases"]] == [1, 3]
    breakdown = loaded["cases"][1]["breakdown"]
    assert breakdown["device_busy_ms"] is None
    assert breakdown["loop_ms"] > 0
    parts = ("forward_ms", "sample_ms", "result_ms", "loop_ms", "wait_ms")
    assert sum(breakdown[name] for name in parts) == pytest.approx(breakdown["step_ms"], abs=0.01)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    result = bench("latency", "--batch-size", "64", "--max-total-tokens", "2048")
    assert result.returncode == 1
    assert "needs 4160 pages, the key/value cache has 128" in result.stderr


def test_offline_runs_each_workload(tmp_path: Path) -> None:
    report = tmp_path / "offline.json"
    result = bench(
        *("offline", "--workload", "shared", "--num-groups", "2", "--prompts-per-group", "3"),
        *("--prefix-len", "64", "--input-len", "20", "40", "--output-len", "4", "8"),
        *("--repeat", "2", "--output-file", str(report), "--device", "cpu"),
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(report.read_text())
    assert [run["num_requests"] for run in loaded["runs"]] == [6, 6]
    # Four of six requests find their prefix, in every run as in the first.
    shares = [run["cached_share"] for run in loaded["runs"]]
    assert shares[0] == shares[1] > 0.3


def test_profiling_is_refused_without_a_directory(system: System) -> None:
    reply = httpx.post(f"{system.url}/start_profile")
    assert reply.status_code == 400
    assert "--profile-dir" in reply.json()["error"]["message"]


def test_a_server_records_traces_over_http(tmp_path: Path) -> None:
    with (
        running_system("--profile-dir", str(tmp_path)) as system,
        httpx.Client(base_url=system.url, timeout=60) as http,
    ):
        assert http.post("/stop_profile").status_code == 400
        unknown = http.post("/start_profile", json={"output_dir": "/tmp"})
        assert unknown.json()["error"]["param"] == "output_dir"
        assert http.post("/start_profile", json={"num_steps": 0}).status_code == 400
        assert http.post("/start_profile", json={"num_steps": 4}).status_code == 200
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        reply = http.post("/generate", json={"text": "The", "sampling_params": sampling})
        assert len(reply.json()["output_ids"]) == 8
        stopped = http.get("/stop_profile")
    assert stopped.status_code == 200
    (trace,) = tmp_path.glob("*.json")
    assert stopped.text.splitlines()[1:] == [str(trace)]
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("decoder.py" in event.get("name", "") for event in events)
