"""`rhizome serve`: this host's share of the system, from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator

from services.common.peer_tls import PeerTls, peer_tls
from services.common.process import stop_event
from services.launch.config import ServeConfig
from services.launch.hosts import (
    EVERYWHERE,
    HostUnreachableError,
    host_and_port,
    lifetime_shown,
    until_node_0_ends,
)
from services.launch.supervisor import Supervisor, private_directory
from services.launch.topology import build_topology

logger = logging.getLogger(__name__)

# What host 0 needs beyond its requests' time to end.
_LAST_WORD_S = 5.0


async def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, or where asked until host 0 ends.

    Raises ServiceGaveUpError, HostUnreachableError, and ValueError for bad certificates.
    """
    stop = stop_event()
    async with (
        peer_tls(config.tls) as tls,
        private_directory() as directory,
        lifetime(config, tls),
        _end(config, stop, tls) as end,
    ):
        specs = build_topology(config, directory, os.getpid())
        logger.info("event=starting model=%s", config.model_path)
        supervisor = Supervisor(specs, directory, echo, tls)
        await supervisor.run(lambda: print(ready_message(config), flush=True), end)
    logger.info("event=stopped")


@contextlib.asynccontextmanager
async def lifetime(config: ServeConfig, tls: PeerTls | None) -> AsyncIterator[None]:
    """On host 0, where the others are to end with it: let them see it. Raises
    HostUnreachableError when the port is taken.
    """
    if not config.end_with_node_0 or config.node_rank > 0:
        yield
        return
    address = host_and_port(config.node_addr or EVERYWHERE, _lifetime_port(config))
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(lifetime_shown(address, tls))
        except OSError as error:
            raise HostUnreachableError(f"host 0: {error}") from error
        yield


@contextlib.asynccontextmanager
async def _end(
    config: ServeConfig, stop: asyncio.Event, tls: PeerTls | None
) -> AsyncIterator[asyncio.Event]:
    """The event that ends this host's services: a signal, or what becomes of host 0."""
    if not config.end_with_node_0 or config.node_rank == 0:
        yield stop
        return
    end = asyncio.Event()
    following = asyncio.create_task(_follow(config, stop, end, tls))
    try:
        yield end
        if following.done():
            following.result()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _follow(
    config: ServeConfig, stop: asyncio.Event, end: asyncio.Event, tls: PeerTls | None
) -> None:
    """Set `end` when this host's part is over. Raises HostUnreachableError when host 0 is lost."""
    target = host_and_port(config.meeting_point.host, _lifetime_port(config))
    node_0 = asyncio.create_task(until_node_0_ends(target, tls=tls))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([node_0, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not node_0.done() and not config.spreads_replicas:
            # All hosts may have had the signal, and host 0's requests need these ranks to end.
            await asyncio.wait([node_0], timeout=config.shutdown_grace_s + _LAST_WORD_S)
        end.set()
        if node_0.done():
            node_0.result()
            logger.info("event=node_0_ended")
    finally:
        end.set()
        node_0.cancel()
        stopping.cancel()


def ready_message(config: ServeConfig) -> str:
    """What a newcomer needs next: where it listens, and a request to paste."""
    if config.node_rank > 0:
        return f"\nNode {config.node_rank} has joined; node 0 serves.\n"
    host = config.host
    if config.nccl_init_addr is not None and host == EVERYWHERE:
        # The reader may be on another host.
        host = config.meeting_point.host
    scheme = "http" if config.edge.ssl_files is None else "https"
    base = f"{scheme}://{host_and_port(host, config.port)}"
    key = "    -H 'Authorization: Bearer YOUR_KEY' \\\n" if config.edge.asks_for_keys else ""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
    }
    return (
        f"\nRhizome is ready: {base} (OpenAI API: {base}/v1)\n\nTry:\n"
        f"  curl -N {base}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"{key}    -d '{json.dumps(body)}'\n"
    )


def echo(line: str) -> None:
    """A service's line, as it said it."""
    print(line, file=sys.stderr, flush=True)


def _lifetime_port(config: ServeConfig) -> int:
    return config.host_ports[1]
