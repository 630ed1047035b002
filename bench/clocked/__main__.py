"""`rhizome serve` on H100s that are clocks: for load tests of the services without a GPU.

    python -m bench.clocked --model-path models/builtin --max-running-requests 512 \\
        --max-total-tokens 501136 --chunked-prefill-size 4096 [other flags of rhizome serve]

Steps take what those of an 8-billion-parameter model take on one H100 (`bench/clocked/engine.py`);
these three flags are what `rhizome serve` gives itself there.
"""

from __future__ import annotations

import os
import sys

from bench.other_engine import with_engine
from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import run, stop_event
from services.launch.config import ServeConfig
from services.launch.supervisor import Supervisor, private_directory
from services.launch.topology import build_topology


def main() -> None:
    """Serve until SIGTERM."""
    config = parse_config(ServeConfig, "serve", sys.argv[1:])
    configure_logging("launch", config.log_level, config.telemetry.log_format)
    run(_serve(config))


async def _serve(config: ServeConfig) -> None:
    stop = stop_event()
    async with private_directory() as directory:
        specs = with_engine(build_topology(config, directory, os.getpid()), "bench.clocked.engine")
        supervisor = Supervisor(specs, directory, lambda line: print(line, flush=True))
        await supervisor.run(
            lambda: print(f"ready: http://{config.host}:{config.port}", flush=True), stop
        )


if __name__ == "__main__":
    main()
