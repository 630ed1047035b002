"""All services on this machine under the published workloads.

    python -m bench.services --presets bs1 poisson16 --out DIR -- --model-path MODEL

Starts `rhizome serve` with the flags after `--`, measures each preset with `rhizome bench serving`
(three runs, cache flushed before each), stops the server, and prints a Markdown table. DIR gets
every report and the server's log. Exit code 1 when a request failed or the server did not start.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, get_args

from services.bench.presets import PresetName

_FIGURES = ("requests/s", "output tokens/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT mean ms")
_START_LIMIT_S = 300.0


def main() -> int:
    """Measure and print."""
    own, flags = _split(sys.argv[1:])
    arguments = _parser().parse_args(own)
    arguments.out.mkdir(parents=True, exist_ok=True)
    port = arguments.port
    command = [sys.executable, "-m", "services.launch", "serve", "--port", str(port), *flags]
    started = time.monotonic()
    with (arguments.out / "serve.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _await_ready(server, port)
            ready_s = time.monotonic() - started
            reports = {name: _measure(name, port, arguments) for name in arguments.presets}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    print(_table(reports, ready_s, flags))
    return int(any(run["num_failed"] for report in reports.values() for run in report["runs"]))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    index = arguments.index("--")
    return arguments[:index], arguments[index + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = get_args(PresetName)
    parser.add_argument("--presets", nargs="+", choices=names, default=list(names))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, help="of models below 127,000 ids")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def _await_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}; see its log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit("the server was not ready in time; see its log")


def _measure(name: str, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    report = arguments.out / f"{name}.json"
    command = [
        *(sys.executable, "-m", "services.bench", "serving"),
        *("--base-url", f"http://127.0.0.1:{port}", "--preset", name, "--flush-cache"),
        *("--repeat", str(arguments.repeat), "--disable-progress", "--output-file", str(report)),
    ]
    if arguments.vocab_size is not None:
        command += ["--vocab-size", str(arguments.vocab_size)]
    # A failed request makes the client's exit code 1; the report says it, too.
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    return dict(json.loads(report.read_text()))


def _table(reports: dict[str, dict[str, Any]], ready_s: float, flags: list[str]) -> str:
    lines = [
        f"`rhizome serve {' '.join(flags)}`: ready after {ready_s:.1f} s. Python "
        f"{platform.python_version()}. Median of the runs, then the runs.",
        "",
        "| workload | figure | median | runs |",
        "|---|---|---|---|",
    ]
    for name, report in reports.items():
        for figure in _FIGURES:
            line = report["headlines"].get(figure)
            if line is not None:
                runs = ", ".join(f"{value:.4g}" for value in line["runs"])
                lines.append(f"| {name} | {figure} | {line['median']:.4g} | {runs} |")
        failed = sum(run["num_failed"] for run in report["runs"])
        if failed:
            lines.append(f"| {name} | failed requests | {failed} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
