"""A Prometheus of a test's own, as Debian packages it, that scrapes and evaluates every second."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import subprocess
import textwrap
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BINARY = shutil.which("prometheus")
WHY_NOT = "no prometheus on the path (Debian: apt-get install prometheus)"
# What the chart's monitors put on every target.
LABELS = {"namespace": "somewhere", "release": "demo"}


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server."""

    url: str
    log: Path

    def api(self, path: str, **parameters: object) -> Any:
        """The data of an answer. Raises AssertionError with Prometheus's words for an error."""
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            raise AssertionError(f"{parameters}: {json.loads(text)['error']}") from error

    def query(self, expr: str) -> list[float]:
        """The values of an expression now."""
        data = self.api("query", query=expr)
        if data["resultType"] == "scalar":
            return [float(data["result"][1])]
        return [float(series["value"][1]) for series in data["result"]]

    def has_data(self, expr: str) -> bool:
        """Whether it has a value now that is a number."""
        return any(not math.isnan(value) for value in self.query(expr))


@contextlib.contextmanager
def running_prometheus(
    directory: Path,
    targets: Mapping[str, str],
    rules: Path | None = None,
    relabelling: str = "",
) -> Iterator[Prometheus]:
    """Scrape `targets` (address of each instance's name) and evaluate the rules of a folder.

    `relabelling` is YAML of more members of the scrape's configuration.
    """
    assert BINARY is not None, WHY_NOT
    scrape = {
        "job_name": "rhizome",
        "static_configs": [
            {"targets": [address], "labels": {"instance": name, **LABELS}}
            for name, address in targets.items()
        ],
        **(yaml.safe_load(textwrap.dedent(relabelling)) or {}),
    }
    config = directory / "prometheus.yml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [] if rules is None else [f"{rules}/*.yaml"],
                "scrape_configs": [scrape],
            }
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = directory / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                BINARY,
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    prometheus = Prometheus(f"http://127.0.0.1:{port}", log)
    try:
        _await_ready(prometheus, process)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(prometheus: Prometheus, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{prometheus.url}/-/ready", timeout=5).close()
            return
        assert process.poll() is None, prometheus.log.read_text()
        assert time.monotonic() < deadline, prometheus.log.read_text()
        time.sleep(0.1)
