"""Starts the controller: `python -m services.controller`."""

from __future__ import annotations

import logging

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import die_with_parent, exit_for, run, stop_event
from services.controller.config import ControllerConfig

logger = logging.getLogger(__name__)


def main() -> None:
    """Parse flags, run until SIGTERM or SIGINT."""
    config = parse_config(ControllerConfig, "controller")
    configure_logging("controller", config.log_level, config.log_format)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    try:
        run(_serve(config))
    except (OSError, ValueError) as error:
        exit_for("controller", error)


async def _serve(config: ControllerConfig) -> None:
    from services.controller.service import running_controller

    stop = stop_event()
    async with running_controller(config):
        logger.info("event=ready release=%s lease=%s", config.release, config.lease_name)
        await stop.wait()
    logger.info("event=stopped")
