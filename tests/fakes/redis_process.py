"""A redis-server of a test's own, to be stopped and killed."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="there is no redis-server on the path"
)


class RedisProcess:
    """Listens on one port over all its restarts; keeps nothing on disk."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = int(server.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers."""
        self._process = subprocess.Popen(
            [
                *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._directory)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None, "redis-server ended"
            time.sleep(0.02)
        raise AssertionError("redis-server does not listen")

    def kill(self) -> None:
        """End it with SIGKILL; what it held is lost."""
        assert self._process is not None, "it was started"
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """It accepts connections and answers nothing."""
        assert self._process is not None, "it was started"
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None, "it was started"
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running_redis(directory: Path) -> Iterator[RedisProcess]:
    redis = RedisProcess(directory)
    redis.start()
    try:
        yield redis
    finally:
        redis.kill()
