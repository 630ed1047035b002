"""A whole system as its user starts it: `rhizome serve` with the built-in model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class System:
    """A running `rhizome serve`."""

    process: subprocess.Popen[str]
    port: int
    log: list[str]
    openai: OpenAI

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port(num_ports: int = 2) -> int:
    """The first of so many free ports in a row; the gRPC API listens on a system's second."""
    while True:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError, OverflowError):
            port = 0
            for i in range(num_ports):
                listener = held.enter_context(socket.socket())
                listener.bind(("127.0.0.1", port + i if i else 0))
                port = port or int(listener.getsockname()[1])
            return port


@contextlib.contextmanager
def running_system(*flags: str, environment: Mapping[str, str] | None = None) -> Iterator[System]:
    """Start `rhizome serve`, wait until it says that it is ready, stop it with SIGTERM."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.launch", "serve", "--port", str(port), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    log: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if line.startswith("Rhizome is ready"):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(90), f"not ready:\n{''.join(log)}"
        assert process.poll() is None, f"ended with {process.returncode}:\n{''.join(log)}"
        url = f"http://127.0.0.1:{port}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield System(process, port, log, client)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()
