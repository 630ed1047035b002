"""A worker whose engine is slowed (`bench/reality/slowed.py`); everything else is the real one.

python -m bench.reality.worker FLOOR_MS TOKEN_MS LOG_DIR [flags of a worker]
"""

from __future__ import annotations

import sys

from bench.reality.slowed import NUM_ARGUMENTS, Slowing
from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import die_with_parent, run
from services.worker.config import WorkerConfig
from services.worker.lifetime import serve


def main() -> None:
    """Run one worker until SIGTERM."""
    own, flags = sys.argv[1 : 1 + NUM_ARGUMENTS], sys.argv[1 + NUM_ARGUMENTS :]
    config = parse_config(WorkerConfig, "worker", flags)
    configure_logging("worker", config.log_level)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    engine = (sys.executable, "-m", "bench.reality.slowed", *Slowing.parse(own).arguments())
    run(serve(config, engine))


if __name__ == "__main__":
    main()
