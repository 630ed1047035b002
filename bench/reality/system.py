"""`rhizome serve` with slowed engines: its services, launcher and flags, but for the workers'.

python -m bench.reality.system FLOOR_MS TOKEN_MS LOG_DIR [flags of rhizome serve]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from bench.other_engine import with_engine
from bench.reality.slowed import NUM_ARGUMENTS, Slowing
from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import die_with_parent, run, stop_event
from services.launch.config import ServeConfig
from services.launch.supervisor import Supervisor, private_directory
from services.launch.topology import build_topology

_START_LIMIT_S = 240.0
_STOP_LIMIT_S = 60.0
# Made in the log directory when every service is ready.
_READY = "ready"


@contextlib.asynccontextmanager
async def running_system(slowing: Slowing, port: int, *flags: str) -> AsyncIterator[str]:
    """Start the system, wait until it serves, stop it after the block. Gives its URL.

    Its log goes to `slowing.log`. Raises RuntimeError when it ends or is not ready in time.
    """
    slowing.log.mkdir(parents=True)
    command = [sys.executable, "-m", "bench.reality.system", *slowing.arguments()]
    with (slowing.log / "serve.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *command, "--port", str(port), *flags, stdout=log, stderr=log
        )
        try:
            await _await_ready(process, slowing.log / _READY)
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), _STOP_LIMIT_S)


async def _await_ready(process: asyncio.subprocess.Process, ready: Path) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _START_LIMIT_S
    while loop.time() < deadline:
        if process.returncode is not None:
            raise RuntimeError(f"the system ended with {process.returncode}; see serve.log")
        if ready.exists():
            return
        await asyncio.sleep(0.1)
    raise RuntimeError("the system was not ready in time; see serve.log")


def main() -> None:
    """Serve until SIGTERM."""
    own, flags = sys.argv[1 : 1 + NUM_ARGUMENTS], sys.argv[1 + NUM_ARGUMENTS :]
    config = parse_config(ServeConfig, "serve", flags)
    configure_logging("launch", config.log_level, config.telemetry.log_format)
    die_with_parent(os.getppid())
    run(_serve(config, Slowing.parse(own)))


async def _serve(config: ServeConfig, slowing: Slowing) -> None:
    stop = stop_event()
    async with private_directory() as directory:
        specs = build_topology(config, directory, os.getpid())
        slowed = with_engine(specs, "bench.reality.slowed", *slowing.arguments())
        supervisor = Supervisor(slowed, directory, lambda line: print(line, flush=True))
        await supervisor.run(lambda: (slowing.log / _READY).touch(), stop)


if __name__ == "__main__":
    main()
