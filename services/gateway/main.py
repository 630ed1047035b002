"""The gateway's process."""

from __future__ import annotations

import logging

from services.common import process
from services.common.config import parse_config
from services.common.logs import configure_logging
from services.gateway.config import GatewayConfig

logger = logging.getLogger(__name__)


def main() -> None:
    """Run a gateway until SIGINT or SIGTERM."""
    config = parse_config(GatewayConfig, "gateway")
    if config.parent_pid is not None:
        process.die_with_parent(config.parent_pid)
    configure_logging("gateway", config.log_level, config.telemetry.log_format)
    try:
        process.run(_serve(config))
    except (OSError, ValueError) as error:
        process.exit_for("gateway", error)


async def _serve(config: GatewayConfig) -> None:
    from services.gateway.gateway import running_gateway

    stop = process.stop_event()
    async with running_gateway(config) as gateway:
        process.freeze_what_is_there()
        logger.info(
            "event=ready http=%s:%d grpc=%s grpc_port=%d",
            *(config.host, gateway.http_port, config.grpc_listen, gateway.grpc_port),
        )
        await stop.wait()
        logger.info("event=stopping inflight=%d", gateway.pipeline.inflight.num_prompts)
