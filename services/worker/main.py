"""Parses the configuration, starts the worker, and turns its failure into an exit status.

Status 3 (EXIT_CANNOT_START): the engine cannot load, and starting again cannot help. 4: the engine
died; the launcher starts the worker again, under a new epoch. On a node above 0, 4 is also how the
group's end shows.
"""

from __future__ import annotations

import logging
import sys

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.worker.config import WorkerConfig

logger = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 4


def main() -> None:
    """Run one worker until SIGTERM, SIGINT, or the end of its engine."""
    config = parse_config(WorkerConfig, "worker")
    configure_logging("worker", config.log_level, config.telemetry.log_format)
    # Imported late: --help and bad flags need none of it.
    from services.common.process import EXIT_CANNOT_START, die_with_parent, exit_for, run
    from services.worker.lifetime import serve
    from services.worker.node import serve_node
    from services.worker.replica import ReplicaFailedError

    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    try:
        run(serve(config) if config.node_rank == 0 else serve_node(config))
    except (OSError, ValueError) as error:
        exit_for("worker", error)
    except ReplicaFailedError as error:
        logger.error("event=worker_failed permanent=%s reason=%s", error.permanent, error.reason)
        # The last line, for whoever reads only that.
        print(error.reason, file=sys.stderr, flush=True)
        sys.exit(EXIT_CANNOT_START if error.permanent else EXIT_ENGINE_DIED)
