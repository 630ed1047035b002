"""One worker from start to end: the engine process, the front around it, and how both stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from rhizome.common.v1 import pool_identity_pb2, worker_role_pb2
from services.common.model_files import chat_template_digest, model_revision, tokenizer_digest
from services.common.prefix_hash import HASH_VERSION
from services.common.process import freeze_what_is_there, stop_event
from services.worker.config import WorkerConfig
from services.worker.engine_link import ENGINE_COMMAND, EngineProcess, engine_link
from services.worker.replica import Replica, ReplicaFailedError, WorkerIdentity
from services.worker.service import RunningWorker, ServiceOptions, running_worker

logger = logging.getLogger(__name__)

# How long the engine gets to end by itself.
_ENGINE_GRACE_S = 3.0
# How long after the engine's end its last message may still be on its way.
_LAST_MESSAGE_S = 0.5


async def serve(config: WorkerConfig, engine_command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serve until SIGTERM or SIGINT. Raises ReplicaFailedError when the engine is gone."""
    stop = stop_event()
    options = service_options(config)
    async with engine_link() as link:
        # Started before the server: gRPC's threads and a fork do not go well together.
        engine = await EngineProcess.start(
            link,
            config.engine_options(),
            config.log_level,
            config.kernel_cache_dir,
            engine_command,
        )
        grace_s = 0.0
        try:
            async with running_worker(options, link, engine.pid) as worker:
                freeze_what_is_there()
                watch = asyncio.create_task(_watch(engine, worker.replica))
                try:
                    await _until_over(worker, stop, config.drain_timeout_s)
                finally:
                    watch.cancel()
                grace_s = _ENGINE_GRACE_S if worker.replica.ready is not None else 0.0
        finally:
            await engine.stop(link, grace_s)
    logger.info("event=stopped")


async def _until_over(worker: RunningWorker, stop: asyncio.Event, drain_timeout_s: float) -> None:
    """Wait for the order to stop and drain. Raises ReplicaFailedError."""
    failed = worker.replica.failed
    stopping = asyncio.create_task(stop.wait())
    over: set[asyncio.Future[Any]] = {stopping, failed}
    await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not failed.done():
        await worker.drain(drain_timeout_s)
    if failed.done():
        await worker.close_sessions("the engine failed")
        raise failed.result()


def service_options(config: WorkerConfig) -> ServiceOptions:
    """What the front needs of the configuration and of the model's files.

    Raises ReplicaFailedError when those cannot be read.
    """
    tokenizer_path = config.tokenizer_path or config.model_path
    try:
        pool = pool_identity_pb2.PoolIdentity(
            served_model_name=config.model_name,
            model_revision=model_revision(config.model_path),
            tokenizer_digest=tokenizer_digest(tokenizer_path),
            template_digest=chat_template_digest(tokenizer_path, config.chat_template),
            page_size=config.page_size,
            hash_version=HASH_VERSION,
        )
    except (OSError, ValueError) as error:
        raise ReplicaFailedError(str(error), permanent=True) from error
    return ServiceOptions(
        identity=WorkerIdentity(
            worker_id=config.name,
            epoch=secrets.randbits(64) or 1,
            pool=pool,
            role=worker_role_pb2.WorkerRole.Value(f"WORKER_ROLE_{config.role.upper()}"),
            model_path=str(config.model_path),
            labels=config.labels,
        ),
        listen=config.listen,
        advertise_address=config.advertise_address,
        schedulers=config.scheduler,
        max_queued_requests=config.max_queued_requests,
        metrics_port=config.metrics_port,
        telemetry=config.telemetry,
        health_port=config.health_port,
        tls=config.tls,
    )


async def _watch(engine: EngineProcess, replica: Replica) -> None:
    """Notice the engine's end, also when it could not say why."""
    status = await engine.wait()
    await asyncio.sleep(_LAST_MESSAGE_S)
    replica.fail(f"its process ended with status {status}", permanent=False)
