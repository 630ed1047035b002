"""An engine that starts, runs steps of every size class, and ends: its kernels are cached then.

`python -m services.worker.engine.warm_up SPEC`: SPEC is an EngineSpec, whose addresses are unused.
"""

from __future__ import annotations

import logging
import signal
import sys
import time

import msgspec

from services.common.logs import configure_logging
from services.common.process import die_with_parent
from services.worker.engine.runner.build import build_runner
from services.worker.engine.runner.profile import run_steps_of_all_sizes
from services.worker.engine.spec import (
    PERMANENT_FAILURES,
    EngineSpec,
    decode_path,
    failure_reason,
)

logger = logging.getLogger(__name__)


def main() -> None:
    """Raises nothing: a wrong model or flag is one line and status 1."""
    spec = msgspec.json.decode(sys.argv[1], type=EngineSpec, dec_hook=decode_path)
    # Ctrl-C reaches the whole group; this process ends with the one that started it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(spec.parent_pid)
    configure_logging("warm", spec.log_level, spec.options.log_format)
    started = time.monotonic()
    try:
        runner, plan = build_runner(spec.options, _ignore_progress)
    except PERMANENT_FAILURES as error:
        sys.exit(f"rhizome warm: {failure_reason(error)}")
    if plan.device == "cpu":
        logger.warning(
            "event=nothing_to_compile reason='there is no GPU, and CPUs need no kernels'"
        )
    logger.info("event=engine_built seconds=%.1f", time.monotonic() - started)
    run_steps_of_all_sizes(runner, plan)
    runner.close()
    logger.info("event=engine_warm seconds=%.1f", time.monotonic() - started)


def _ignore_progress(fraction: float, what: str) -> None:
    pass


if __name__ == "__main__":
    main()
