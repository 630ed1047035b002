"""A node above 0 of a replica across hosts: runs its ranks, which mirror rank 0, until they end.

It serves no requests. Its gRPC port answers health checks: SERVING while its ranks take part in
steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator

from services.common.metrics import metrics_server
from services.common.peer_tls import expiry_metrics, peer_tls, server_credentials
from services.common.process import EXIT_CANNOT_START, stop_event
from services.common.rpc import RunningServer, running_server
from services.worker.config import WorkerConfig
from services.worker.engine.options import EngineOptions
from services.worker.engine.spec import FOLLOWER_MODULE, FollowerSpec, encode_message
from services.worker.replica import ReplicaFailedError

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0


class NodeRank:
    """Owns the process of one rank. It dies with this process."""

    def __init__(
        self, rank: int, process: asyncio.subprocess.Process, is_ready: asyncio.Event
    ) -> None:
        self.rank = rank
        self.is_ready = is_ready
        self._process = process

    @classmethod
    async def start(cls, rank: int, options: EngineOptions) -> NodeRank:
        """Start the rank, which then looks for rank 0."""
        reading, writing = os.pipe()
        spec = FollowerSpec(
            rank=rank,
            parent_pid=os.getpid(),
            log_format=options.log_format,
            options=options,
            ready_fd=writing,
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", FOLLOWER_MODULE, encode_message(spec).decode()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(writing,),
            )
        finally:
            os.close(writing)
        is_ready = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_word() -> None:
            # One byte when it takes steps; the end of the file when it ended before.
            if os.read(reading, 1):
                is_ready.set()
            loop.remove_reader(reading)
            os.close(reading)

        loop.add_reader(reading, on_word)
        return cls(rank, process, is_ready)

    async def wait(self) -> int:
        """Its exit status once it ended; negative for a signal."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Terminate it; kill it when that takes long."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


async def serve_node(config: WorkerConfig) -> None:
    """Run until SIGTERM or SIGINT. Raises ReplicaFailedError when the group has ended."""
    stop = stop_event()
    options = config.engine_options()
    async with _node_ranks(options) as ranks:
        async with _probed(config) as server:
            logger.info(
                "event=node_started node_rank=%s rank_0=%s ranks=%s",
                *(options.node_rank, options.nccl_init_addr, [each.rank for each in ranks]),
            )
            readiness = asyncio.create_task(_announce(ranks, server))
            try:
                await _until_over(ranks, stop)
            finally:
                readiness.cancel()
    logger.info("event=stopped")


@contextlib.asynccontextmanager
async def _probed(config: WorkerConfig) -> AsyncIterator[RunningServer]:
    """Health, and metrics of this process: what probes and scrapers expect of every host alike."""
    async with (
        peer_tls(config.tls) as tls,
        metrics_server(config.metrics_port, *expiry_metrics(tls)),
        running_server(
            lambda server: None,
            [],
            config.listen,
            ready=False,
            credentials=server_credentials(tls),
            health_port=config.health_port,
        ) as server,
    ):
        yield server


@contextlib.asynccontextmanager
async def _node_ranks(options: EngineOptions) -> AsyncIterator[list[NodeRank]]:
    """This node's ranks, all ended after the block."""
    first = options.node_rank * options.ranks_per_node
    ranks: list[NodeRank] = []
    try:
        for rank in range(first, first + options.ranks_per_node):
            ranks.append(await NodeRank.start(rank, options))
        yield ranks
    finally:
        await asyncio.gather(*(rank.stop() for rank in ranks))


async def _announce(ranks: list[NodeRank], server: RunningServer) -> None:
    for rank in ranks:
        await rank.is_ready.wait()
    await server.set_ready(True)
    logger.info("event=ready port=%s", server.port)


async def _until_over(ranks: list[NodeRank], stop: asyncio.Event) -> None:
    stopping = asyncio.create_task(stop.wait())
    ends = {asyncio.create_task(rank.wait()): rank for rank in ranks}
    await asyncio.wait([stopping, *ends], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    ended = [(rank, task.result()) for task, rank in ends.items() if task.done()]
    for task in ends:
        task.cancel()
    if not stop.is_set():
        rank, status = ended[0]
        raise ReplicaFailedError(
            f"the group has ended: rank {rank.rank} exited with status {status}",
            permanent=status == EXIT_CANNOT_START,
        )
