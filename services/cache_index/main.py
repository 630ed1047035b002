"""Starts the cache index."""

from __future__ import annotations

import logging

from services.cache_index.config import CacheIndexConfig
from services.cache_index.service import running_cache_index
from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import die_with_parent, exit_for, run, stop_event

logger = logging.getLogger(__name__)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    config = parse_config(CacheIndexConfig, "cache_index")
    configure_logging("cache_index", config.log_level, config.telemetry.log_format)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    try:
        run(serve(config))
    except (OSError, ValueError) as error:
        exit_for("cache_index", error)


async def serve(config: CacheIndexConfig) -> None:
    stop = stop_event()
    async with running_cache_index(config) as service:
        logger.info("event=ready listen=%s port=%d", config.listen, service.port)
        await stop.wait()
    logger.info("event=stopped")
