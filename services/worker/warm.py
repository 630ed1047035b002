"""Compiles every kernel that a model and its flags need into a folder, for images.

`python -m services.worker.warm` takes a worker's flags; `rhizome warm` starts it. Kernels are
compiled for the GPU at hand, so it runs where there is one of the kind that will serve.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from services.common.config import child_environment, engine_environment, parse_config
from services.common.logs import configure_logging
from services.common.process import EXIT_INTERRUPTED
from services.worker.config import WorkerConfig
from services.worker.engine.spec import EngineSpec, encode_message

logger = logging.getLogger(__name__)


def main() -> None:
    """Warm up once; the status is 1 where the engine cannot be built."""
    config = parse_config(WorkerConfig, "worker", program="rhizome warm")
    configure_logging("warm", config.log_level, config.telemetry.log_format)
    if config.kernel_cache_dir is None:
        sys.exit("rhizome warm: --kernel-cache-dir says where the kernels go, and is missing")
    if config.nnodes > 1:
        sys.exit("rhizome warm: --nnodes has no meaning here: kernels are compiled on one host")
    try:
        status = warm(config, config.kernel_cache_dir)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    sys.exit(status)


def warm(config: WorkerConfig, directory: Path) -> int:
    """Fill `directory`; the status of the process that did."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"rhizome warm: --kernel-cache-dir {directory} cannot be made: {error}")
    started = time.monotonic()
    spec = EngineSpec(
        input_address="",
        output_address="",
        parent_pid=os.getpid(),
        log_level=config.log_level,
        # Kernels depend on shapes, not on weights.
        options=replace(config.engine_options(), load_format="dummy"),
    )
    # A process of its own: caches are found by the environment it starts with.
    status = subprocess.run(
        [sys.executable, "-m", "services.worker.engine.warm_up", encode_message(spec).decode()],
        env=child_environment(engine_environment(directory)),
        check=False,
    ).returncode
    if status == 0:
        files = [path for path in directory.rglob("*") if path.is_file()]
        report = {
            "kernel_cache_dir": str(directory),
            "files": len(files),
            "mib": round(sum(path.stat().st_size for path in files) / 1024**2, 1),
            "seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(report), flush=True)
    return status


if __name__ == "__main__":
    main()
