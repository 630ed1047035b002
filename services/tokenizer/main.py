"""Starts the tokenizer service."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import (
    die_with_parent,
    exit_for,
    freeze_what_is_there,
    run,
    stop_event,
)
from services.tokenizer.config import TokenizerConfig

logger = logging.getLogger(__name__)

# The longest that the event loop waits for a thread that is running Python code.
_SWITCH_INTERVAL_S = 0.0005


def main() -> None:
    config = parse_config(TokenizerConfig, "tokenizer")
    configure_logging("tokenizer", config.log_level, config.telemetry.log_format)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    try:
        run(serve(config))
    except (ValueError, OSError) as error:
        exit_for("tokenizer", error)


async def serve(config: TokenizerConfig) -> None:
    """Load and serve until SIGINT or SIGTERM."""
    # Late, so that --help and bad flags answer at once.
    from rhizome.tokenizer.v1 import tokenizer_service_pb2, tokenizer_service_pb2_grpc
    from services.common.metrics import metrics_server
    from services.common.peer_tls import expiry_metrics, peer_tls, server_credentials
    from services.common.rpc import running_server
    from services.common.telemetry import running_tracer
    from services.tokenizer.load import load_parts
    from services.tokenizer.metrics import TokenizerMetrics
    from services.tokenizer.servicer import TokenizerServicer

    parts = load_parts(config.model_path, config.tokenizer_path, config.chat_template)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    freeze_what_is_there()
    stop = stop_event()
    async with AsyncExitStack() as stack:
        pool = stack.enter_context(
            ThreadPoolExecutor(config.num_encode_threads, thread_name_prefix="encode")
        )
        metrics = TokenizerMetrics()
        tracer = await stack.enter_async_context(running_tracer(config.telemetry, "tokenizer"))
        servicer = TokenizerServicer(parts, pool, metrics, tracer)
        tls = await stack.enter_async_context(peer_tls(config.tls))
        await stack.enter_async_context(
            metrics_server(config.metrics_port, metrics.registry, *expiry_metrics(tls))
        )
        server = await stack.enter_async_context(
            running_server(
                lambda server: tokenizer_service_pb2_grpc.add_TokenizerServiceServicer_to_server(
                    servicer, server
                ),
                [tokenizer_service_pb2.DESCRIPTOR.services_by_name["TokenizerService"]],
                config.listen,
                credentials=server_credentials(tls),
                health_port=config.health_port,
            )
        )
        logger.info(
            "event=ready listen=%s port=%d tokenizer=%s vocab_size=%d",
            config.listen,
            server.port,
            parts.info.tokenizer_path,
            parts.info.vocab_size,
        )
        await stop.wait()
        logger.info("event=stopping")
