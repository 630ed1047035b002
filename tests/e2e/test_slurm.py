"""deploy/slurm: a system of two nodes, here two processes, from SLURM launchers' variables."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from tests.e2e.system import ROOT, free_port

pytestmark = pytest.mark.timeout(240)

SCRIPTS = ROOT / "deploy" / "slurm"
LAUNCH = SCRIPTS / "launch.sh"
# madengine's: a number, perhaps with a unit, and what it counts.
PERFORMANCE = re.compile(
    r"performance:\s+([+\-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+\-]?[0-9]+)?)\s+([^\s,]+)"
)
WORKLOAD = (
    *("--num-prompts", "8", "--input-len", "32", "--output-len", "8", "--vocab-size", "1536"),
    *("--warmup-requests", "1", "--num-processes", "1", "--disable-progress"),
)


def environment(**changes: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for name in ("NODE_RANK", "SGLANG_MODEL_PATH", "SGLANG_TENSOR_PARALLEL_SIZE"):
        kept.pop(name, None)
    # Threads of several engines on few cores wait for each other.
    given = {"OMP_NUM_THREADS": "1", "RHIZOME_PYTHON": sys.executable, **changes}
    return kept | {name: str(value) for name, value in given.items()}


def ports_between_hosts() -> int:
    """The first of three that are free on every loopback address."""
    while True:
        first = free_port()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + 3):
                stack.enter_context(socket.socket()).bind(("", port))
            return first


class Nodes:
    """Two nodes of a system, each a `launch.sh`, with their output."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self._variables: dict[str, object] = {
            "NNODES": 2,
            "NPROC_PER_NODE": 1,
            "MASTER_ADDR": "127.0.0.2",
            "MASTER_PORT": ports_between_hosts(),
        }

    def start(self, mode: str, *flags: str) -> None:
        for rank in range(2):
            variables = {**self._variables, "NODE_RANK": rank, "SGLANG_EXECUTION_MODE": mode}
            spread = [] if "--one-group" in flags else ["--node-addr", f"127.0.0.{2 + rank}"]
            common = ("--device", "cpu", "--host", "127.0.0.1", "--port", str(self.port))
            with (self._directory / f"node-{rank}.log").open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        ["bash", str(LAUNCH), *common, *spread, *flags],
                        cwd=self._directory,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment(PYTHONPATH=ROOT, **variables),
                    )
                )

    def log(self, rank: int) -> str:
        return (self._directory / f"node-{rank}.log").read_text(errors="replace")

    def statuses(self) -> list[int]:
        """Of both, once they have ended."""
        return [process.wait(120) for process in self.processes]

    def descendants(self, rank: int) -> list[psutil.Process]:
        return psutil.Process(self.processes[rank].pid).children(recursive=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    try:
        yield nodes
    finally:
        for process in nodes.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def until(condition: Callable[[], bool], nodes: Nodes) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, nodes.log(0) + nodes.log(1)
        time.sleep(0.1)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def answer(client: OpenAI) -> str:
    """Of one request, which a worker that went away may have had."""
    reply = client.chat.completions.create(
        model="default",
        temperature=0,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    return reply.choices[0].message.content or ""


def runs_worker(process: psutil.Process) -> bool:
    return "services.worker" in process.cmdline()


def num_ready(log: str) -> int:
    return log.count("event=worker_registered")


def test_offline_mode_measures_a_group_across_nodes_and_ends(nodes: Nodes, tmp_path: Path) -> None:
    nodes.start("offline", "--one-group", "--", *WORKLOAD)
    assert nodes.statuses() == [0, 0], nodes.log(0) + nodes.log(1)
    found = PERFORMANCE.findall(nodes.log(0))
    assert [metric for _, metric in found] == ["requests_per_second"]
    # madengine adds up what nodes print.
    assert not PERFORMANCE.search(nodes.log(1))
    for line in ("model: builtin", "tp_size: 2", "nnodes: 2"):
        assert re.search(f"^{line}$", nodes.log(0), re.MULTILINE), line
    assert re.search(r"^tokens_per_second: [\d.]+$", nodes.log(0), re.MULTILINE)
    (row,) = rows(tmp_path / "perf.csv")
    assert float(row["performance"]) == float(found[0][0]) > 0
    assert (row["status"], row["n_gpus"], row["gpus_per_node"]) == ("SUCCESS", "2", "1")


def test_a_benchmark_whose_requests_fail_fails_the_job(nodes: Nodes, tmp_path: Path) -> None:
    nodes.start("offline", "--", *WORKLOAD, "--model", "no-such-model")
    assert nodes.statuses() == [1, 0], nodes.log(0) + nodes.log(1)
    assert "rhizome offline: " in nodes.log(0)
    assert not PERFORMANCE.search(nodes.log(0))
    (row,) = rows(tmp_path / "perf.csv")
    assert (row["status"], row["performance"]) == ("FAILURE", "")


def test_a_server_outlives_a_worker_and_all_nodes_end_with_the_first(nodes: Nodes) -> None:
    nodes.start("server")
    until(lambda: num_ready(nodes.log(0)) == 2, nodes)
    url = f"http://127.0.0.1:{nodes.port}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        assert "Paris" in answer(client)
        (worker,) = (child for child in nodes.descendants(1) if runs_worker(child))
        worker.kill()
        for _ in range(4):
            assert "Paris" in answer(client)
        # Started again by its node, it joins under a new epoch.
        until(lambda: num_ready(nodes.log(0)) == 3, nodes)
        assert "Paris" in answer(client)
    assert [process.poll() for process in nodes.processes] == [None, None]
    everything = [*nodes.descendants(0), *nodes.descendants(1)]
    assert len(everything) > 6
    nodes.processes[0].send_signal(signal.SIGTERM)
    assert nodes.statuses() == [0, 0], nodes.log(0) + nodes.log(1)
    until(lambda: not any(process.is_running() for process in everything), nodes)


def test_a_node_that_is_asked_to_end_leaves_the_others_serving(nodes: Nodes) -> None:
    nodes.start("server")
    until(lambda: num_ready(nodes.log(0)) == 2, nodes)
    nodes.processes[1].send_signal(signal.SIGTERM)
    assert nodes.processes[1].wait(60) == 0
    url = f"http://127.0.0.1:{nodes.port}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        assert "Paris" in answer(client)
    nodes.processes[0].send_signal(signal.SIGTERM)
    assert nodes.processes[0].wait(60) == 0


def test_the_batch_script_starts_a_task_a_node_and_ends_with_their_status(tmp_path: Path) -> None:
    """SLURM's own commands are stood in for: srun here starts all tasks on this host."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    write_program(stand_ins / "scontrol", 'echo "$3" | tr , "\\n"')
    write_program(stand_ins / "srun", SRUN)
    job = {
        "SLURM_JOB_ID": 7,
        "SLURM_NNODES": 2,
        "SLURM_JOB_NODELIST": "127.0.0.1,node-1",
        "SLURM_SUBMIT_DIR": ROOT,
        "MASTER_PORT": ports_between_hosts(),
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "PYTHONPATH": ROOT,
    }
    flags = ("--device", "cpu", "--host", "127.0.0.1", "--port", str(free_port()))
    batch = subprocess.run(
        ["bash", str(SCRIPTS / "rhizome.sbatch"), *flags, "--", *WORKLOAD],
        cwd=tmp_path,
        env=environment(**job),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert batch.returncode == 0, batch.stdout + batch.stderr
    assert "--kill-on-bad-exit=1" in batch.stdout
    for line in ("model: builtin", "tp_size: 1", "nnodes: 2"):
        assert re.search(f"^{line}$", batch.stdout, re.MULTILINE), line
    (row,) = rows(tmp_path / "perf.csv")
    assert (row["deployment_type"], row["n_gpus"], row["nnodes"]) == ("slurm", "2", "2")


SRUN = """
echo "srun $*"
while [ "$1" != bash ]; do shift; done
SLURM_PROCID=1 "$@" & other=$!
SLURM_PROCID=0 "$@"; status=$?
wait $other && exit $status
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("variables", "flags", "named"),
    [
        ({"SGLANG_EXECUTION_MODE": "batch"}, (), "SGLANG_EXECUTION_MODE must be server or offline"),
        ({"NNODES": "two"}, (), "NNODES must be a number"),
        ({"NNODES": "08"}, (), "NNODES must be a number"),
        ({"NNODES": 2, "NODE_RANK": 2}, (), "NODE_RANK must be a number within 0..1"),
        ({"MASTER_PORT": 70000}, (), "MASTER_PORT must be a number within 1..65535"),
        ({"SGLANG_TENSOR_PARALLEL_SIZE": 2}, (), "SGLANG_TENSOR_PARALLEL_SIZE is 2"),
        ({"SGLANG_EXECUTION_MODE": "server"}, ("--", "--preset", "bs1"), "for the benchmark"),
        ({"SGLANG_EXECUTION_MODE": "server"}, ("--perf-csv", "x.csv"), "--perf-csv"),
        ({}, ("--tp", "2"), "--tp"),
        ({}, ("--", "--base-url", "http://h"), "--base-url is given to the benchmark"),
        ({"SGLANG_MODEL_PATH": "/nowhere"}, (), "/nowhere is not a model"),
    ],
)
def test_what_cannot_be_started_is_one_line_and_status_2(
    variables: dict[str, Any], flags: Sequence[str], named: str, tmp_path: Path
) -> None:
    given = environment(PYTHONPATH=ROOT, **variables)
    launch = subprocess.run(
        ["bash", str(LAUNCH), *flags],
        cwd=tmp_path,
        env=given,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert launch.returncode == 2, launch.stdout + launch.stderr
    assert named in launch.stdout + launch.stderr
    assert "Traceback" not in launch.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean() -> None:
    scripts = [str(path) for path in sorted(SCRIPTS.iterdir())]
    check = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert check.returncode == 0, check.stdout
