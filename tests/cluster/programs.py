"""The programs of a Kubernetes control plane that `tools/build` made, and how they are started."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_BUILD = Path(__file__).parent / "tools" / "build"
_NEEDED = (
    *("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    *("kubectl", "helm", "kwok", "kubeconform"),
)
# Nothing of a session outlives it: the kernel ends children whose parent is gone.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")


@functools.cache
def tools_folder() -> Path:
    """Where the programs are, or would be."""
    result = subprocess.run([_BUILD, "--folder"], check=True, capture_output=True, text=True)
    return Path(result.stdout.strip())


def missing_tools() -> str:
    """Why the cluster's tests cannot run here; empty where they can."""
    missing = [name for name in _NEEDED if not os.access(tools_folder() / name, os.X_OK)]
    if missing:
        return f"no {', '.join(missing)} in {tools_folder()}: run `make cluster-tools`"
    return ""


def tool(name: str) -> str:
    """The path of one program."""
    return str(tools_folder() / name)


def free_ports(number: int) -> list[int]:
    """As many different ports that are free on the loopback device."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(server.getsockname()[1]) for server in sockets]
    for server in sockets:
        server.close()
    return ports


class Program:
    """A process that runs until `close`, its output in a file, and ends with this one."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*DIE_WITH_PARENT, *command],
                cwd=directory,
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def check(self) -> None:
        """Raise AssertionError when it has ended."""
        status = self.process.poll()
        assert status is None, f"{self.name} ended with {status}:\n{self.read_log()[-4000:]}"

    def close(self, grace_s: float = 5.0) -> int:
        """SIGTERM, then SIGKILL; its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def until(
    condition: Callable[[], object],
    timeout_s: float = 60.0,
    say: Callable[[], object] = lambda: "",
    period_s: float = 0.1,
) -> None:
    """Return once `condition()` holds; `say` tells what was seen instead."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {say()}"
        time.sleep(period_s)
