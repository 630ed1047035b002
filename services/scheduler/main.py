"""Start a scheduler: `python -m services.scheduler`."""

from __future__ import annotations

import logging

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import (
    die_with_parent,
    exit_for,
    freeze_what_is_there,
    run,
    stop_event,
)
from services.scheduler.config import SchedulerConfig

logger = logging.getLogger(__name__)


def main() -> None:
    """Parse flags, serve until SIGTERM or SIGINT."""
    config = parse_config(SchedulerConfig, "scheduler")
    configure_logging("scheduler", config.log_level, config.telemetry.log_format)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    try:
        run(_serve(config))
    except (OSError, ValueError) as error:
        exit_for("scheduler", error)


async def _serve(config: SchedulerConfig) -> None:
    from services.common.metrics import metrics_server
    from services.common.peer_tls import expiry_metrics
    from services.scheduler.service import running_scheduler

    stop = stop_event()
    async with running_scheduler(config) as scheduler:
        async with metrics_server(
            config.metrics_port, scheduler.metrics.registry, *expiry_metrics(scheduler.tls)
        ):
            freeze_what_is_there()
            logger.info("event=ready listen=%s port=%s", config.listen, scheduler.server.port)
            await stop.wait()
    logger.info("event=stopped")
