"""A whole worker as a process: front and engine, with the built-in model unless told otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.config import child_environment

# One thread, so that a test does not take the machine.
_PATH = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": _PATH}


class WorkerProcess:
    """Owns the process; `close` ends it and gives its exit status."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.address = f"unix:{directory}/worker.sock"
        self.log = directory / "worker.log"
        # What a killed worker leaves behind goes with `close`; socket paths must stay short.
        self._temporary = tempfile.TemporaryDirectory(prefix="rz-")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "services.worker", "--listen", self.address),
                    *("--parent-pid", str(os.getpid()), *arguments),
                ],
                env=child_environment({**_ENVIRONMENT, "TMPDIR": self._temporary.name}),
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def engine(self) -> psutil.Process:
        """The engine's process."""
        while True:
            for child in psutil.Process(self.pid).children():
                if "services.worker.engine.process" in child.cmdline():
                    return child
            time.sleep(0.02)

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return once its health says SERVING."""
        deadline = time.monotonic() + timeout_s
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    break
                try:
                    response = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                except grpc.RpcError:
                    continue
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                time.sleep(0.05)
        raise AssertionError(f"the worker did not become ready:\n{self.log.read_text()}")

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, timeout_s: float = 30.0) -> int:
        """Its exit status."""
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._temporary.cleanup()
