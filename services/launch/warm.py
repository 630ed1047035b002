"""`rhizome warm`: compiles a model's kernels ahead of serving, in a worker's own process."""

from __future__ import annotations

import subprocess
import sys

from services.launch.config import ServeConfig
from services.launch.topology import worker_arguments


def warm(config: ServeConfig) -> int:
    """The exit status of the process that compiles; it says what it did."""
    command = [sys.executable, "-m", "services.worker.warm", *worker_arguments(config)]
    return subprocess.run([*command, "--log-level", config.log_level], check=False).returncode
