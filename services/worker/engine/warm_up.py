"""An engine that starts, runs steps of every size class, and ends: its kernels are cached then.

`python -m services.worker.engine.warm_up SPEC`: SPEC is an EngineSpec, whose addresses are unused.
"""

from __future__ import annotations

import logging
import sys
import time

from services.common.logs import configure_logging
from services.worker.engine.process import decode_spec
from services.worker.engine.runner.build import build_runner
from services.worker.engine.runner.profile import run_steps_of_all_sizes

logger = logging.getLogger(__name__)


def main() -> None:
    """Raises nothing: a wrong model or flag is one line and status 1."""
    spec = decode_spec(sys.argv[1])
    configure_logging("warm", spec.log_level)
    started = time.monotonic()
    try:
        runner, plan = build_runner(spec.options, _ignore_progress)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rhizome warm: {error}")
    logger.info("event=engine_built seconds=%.1f", time.monotonic() - started)
    run_steps_of_all_sizes(runner, plan)
    runner.close()
    logger.info("event=engine_warm seconds=%.1f", time.monotonic() - started)


def _ignore_progress(fraction: float, what: str) -> None:
    pass


if __name__ == "__main__":
    main()
