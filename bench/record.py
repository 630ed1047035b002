"""Runs a benchmark several times and stores what it printed beside what it ran on.

usage: python -m bench.record NAME MODULE [ARGUMENT ...]

Writes bench/results/NAME.json: command, commit, machine, versions, and what each run printed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NUM_RUNS = 3
PACKAGES = ("grpcio", "protobuf", "tokenizers", "torch", "uvicorn", "uvloop")


def main(name: str, module: str, *arguments: str) -> None:
    runs = [_run(module, arguments) for _ in range(NUM_RUNS)]
    record = {
        "command": " ".join(["python -m", module, *arguments]),
        "commit": commit(),
        "machine": machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def _run(module: str, arguments: tuple[str, ...]) -> Any:
    printed = _output(sys.executable, "-m", module, *arguments)
    try:
        return json.loads(printed)
    except json.JSONDecodeError:
        return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """The checked-out one."""
    return _output("git", "rev-parse", "--short", "HEAD")


def machine() -> str:
    """Processor, memory and Python."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = cpuinfo.split("model name\t: ", 1)[-1].split("\n", 1)[0]
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return f"{os.cpu_count()} x {model}, {memory_gib} GiB, Python {platform.python_version()}"


if __name__ == "__main__":
    main(*sys.argv[1:])
