"""`rhizome warm`: compiles a model's kernels ahead of serving; the worker's own program does it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from services.launch.config import ServeConfig
from services.launch.topology import worker_arguments


def warm(config: ServeConfig) -> NoReturn:
    """Become the process that compiles; it says what it did."""
    command = [sys.executable, "-m", "services.worker.warm", *worker_arguments(config)]
    logs = ("--log-level", config.log_level, "--log-format", config.telemetry.log_format)
    os.execv(sys.executable, [*command, *logs])
