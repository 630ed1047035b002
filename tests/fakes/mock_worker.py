"""A worker without an engine process: the whole WorkerService, with tokens from a timer.

In a test: `async with running_mock_worker(MockWorkerConfig(...)) as worker`. As a process:
`python -m tests.fakes.mock_worker --listen localhost:30020 --scheduler localhost:30010`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from rhizome.common.v1 import pool_identity_pb2, worker_role_pb2
from rhizome.scheduler.v1 import scheduler_service_pb2 as scheduler_pb
from rhizome.worker.v1 import worker_service_pb2 as pb
from rhizome.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from services.common import model_files
from services.common.config import parse_config
from services.common.errors import UnavailableError
from services.common.logs import configure_logging
from services.common.prefix_hash import HASH_VERSION
from services.common.process import die_with_parent, run, stop_event
from services.common.rpc import MAX_PROTOCOL_REVISION, MIN_PROTOCOL_REVISION, running_server
from tests.fakes.mock_cache import MockCache
from tests.fakes.mock_engine import MockEngine, TokenCycle
from tests.fakes.mock_registration import MockRegistration
from tests.fakes.mock_servicer import MockServicer
from tests.fakes.mock_sessions import MockSessions

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 0.1
PROTOCOL = pool_identity_pb2.ProtocolRange(
    min_revision=MIN_PROTOCOL_REVISION, max_revision=MAX_PROTOCOL_REVISION
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MockWorkerConfig:
    """Serve WorkerService with made-up tokens, one for each sequence and step."""

    listen: str = "localhost:0"
    """gRPC target to bind: `host:port` (port 0 picks one) or `unix:/path`."""

    advertise_address: str | None = None
    """gRPC target others reach it by. Default: what it listens on."""

    scheduler: tuple[str, ...] = ()
    """gRPC target of a scheduler to register with; give it once for each replica."""

    worker_id: str = "mock-0"
    """Stable name, unique in the pool."""

    model_path: Path | None = None
    """Take identity, vocabulary and end-of-sequence ids from this model directory."""

    served_model_name: str | None = None
    """Name clients use as `model`. Default: the model directory's name, or "mock"."""

    text: str | None = None
    """Answer with this text over and over; needs a model path for its tokenizer."""

    token_id: tuple[int, ...] = ()
    """Answer with these ids over and over. Default: ids 1 to 255."""

    step_ms: float = 10.0
    """Time of one step. 0 makes steps as fast as it can."""

    prefill_tokens_per_s: float = 1e6
    """Speed of prefilling what the cache does not hold."""

    max_running: int = 1024
    """Sequences that run at once; more wait."""

    num_pages: int = 65_536
    """Pages of the made-up cache."""

    page_size: int = 16
    """Tokens a page."""

    vocab_size: int = 32_000
    """Ids run from 0 to this, exclusive, where there is no model path."""

    context_length: int = 131_072
    """Longest sequence in tokens."""

    eos_token_id: tuple[int, ...] = ()
    """Ids that end a sequence, beside the model path's."""

    session_hold_s: float = 2.0
    """How long sequences outlive their connection."""

    stall_s: float = 5.0
    """A reader without progress for this long loses its session."""

    die_after_tokens: int | None = None
    """Fault: die after this many output tokens in all."""

    hang_after_tokens: int | None = None
    """Fault: make no more steps after this many output tokens."""

    drop_connections_after_tokens: int | None = None
    """Fault: break every session's connection once after this many output tokens."""

    fail_every_nth: int | None = None
    """Fault: every nth sequence ends with INTERNAL halfway."""

    log_level: str = "info"
    """Least severe log messages to print: debug, info, warning or error."""

    parent_pid: int | None = None
    """End when this process, the parent, dies."""

    def __post_init__(self) -> None:
        if self.text is not None and self.model_path is None:
            raise ValueError("text needs model_path")
        if self.step_ms < 0 or self.prefill_tokens_per_s <= 0:
            raise ValueError("step_ms must be >= 0 and prefill_tokens_per_s > 0")


class MockWorker:
    """One life of a mock worker, from its epoch on; `engine` and `sessions` are open to tests."""

    def __init__(self, config: MockWorkerConfig, on_death: Callable[[], None]) -> None:
        self.config = config
        self.epoch = secrets.randbits(63) | 1
        self.address = ""
        self.draining = False
        self.identity = _identity(config)
        self.eos_token_ids = list(config.eos_token_id)
        self.vocab_size = config.vocab_size
        if config.model_path is not None:
            self.eos_token_ids += model_files.eos_token_ids(config.model_path, config.model_path)
            model_config = model_files.read_json(config.model_path / "config.json")
            self.vocab_size = model_config.get("vocab_size", config.vocab_size)
        self.cycle = TokenCycle(_token_ids(config))
        self.cache = MockCache(self.epoch, config.num_pages)
        self.engine = MockEngine(
            cycle=self.cycle,
            cache=self.cache,
            vocab_size=self.vocab_size,
            context_length=config.context_length,
            page_size=config.page_size,
            eos_token_ids=self.eos_token_ids,
            step_s=config.step_ms / 1000,
            prefill_tokens_per_s=config.prefill_tokens_per_s,
            max_running=config.max_running,
            fail_every_nth=config.fail_every_nth,
            on_tokens=self._inject_faults,
        )
        self.sessions = MockSessions(
            self.engine, self.epoch, self.heartbeat, config.session_hold_s, config.stall_s
        )
        self.registrations: list[MockRegistration] = []
        self._on_death = on_death
        self._dropped = False

    def heartbeat(self) -> pb.Heartbeat:
        """What sessions hear every 100 ms."""
        return pb.Heartbeat(
            engine_step_number=self.engine.step_number,
            engine_busy=self.engine.busy,
            predicted_step_ns=int(self.engine.step_s * 1e9),
            draining=self.draining,
        )

    def drop_connections(self) -> None:
        """Break every session's connection; gateways may resume."""
        self.sessions.drop_connections(UnavailableError("injected fault: connection dropped"))

    def load(self) -> pb.WorkerLoad:
        """Counters for GetWorkerInfo and leak checks."""
        engine = self.engine
        return pb.WorkerLoad(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_free_pages=self.cache.num_pages - len(self.cache),
            num_evictable_pages=len(self.cache),
            engine_step_number=engine.step_number,
            num_prompt_tokens=engine.num_prompt_tokens,
            num_cached_tokens=engine.num_cached_tokens,
            num_output_tokens=engine.num_output_tokens,
            num_sessions=len(self.sessions),
            num_handles=self.sessions.num_handles,
        )

    def info(self) -> pb.GetWorkerInfoResponse:
        """What GetWorkerInfo answers."""
        config = self.config
        return pb.GetWorkerInfoResponse(
            worker_id=config.worker_id,
            epoch=self.epoch,
            identity=self.identity,
            protocol=PROTOCOL,
            role=worker_role_pb2.WORKER_ROLE_MIXED,
            model_path=str(config.model_path or ""),
            context_length=config.context_length,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            num_pages=config.num_pages,
            max_running_sequences=config.max_running,
            tp_size=1,
            device="mock",
            attention_backend="mock",
            dtype="mock",
            load=self.load(),
            max_top_logprobs=64,
        )

    def description(self) -> scheduler_pb.WorkerDescription:
        """What it tells schedulers."""
        config = self.config
        return scheduler_pb.WorkerDescription(
            worker_id=config.worker_id,
            address=self.address,
            epoch=self.epoch,
            identity=self.identity,
            protocol=PROTOCOL,
            role=worker_role_pb2.WORKER_ROLE_MIXED,
            num_pages=config.num_pages,
            max_running_sequences=config.max_running,
            context_length=config.context_length,
            tp_size=1,
            vocab_size=self.vocab_size,
        )

    def register(self, scheduler: str) -> MockRegistration:
        """A registration with one scheduler, to be run."""
        registration = MockRegistration(
            scheduler, self.description(), self.engine, lambda: self.draining, self.drain
        )
        self.registrations.append(registration)
        return registration

    def die(self) -> None:
        """End this life abruptly."""
        self._on_death()

    def drain(self) -> None:
        """Say so in heartbeats and load reports, and finish what there is."""
        self.draining = True

    async def beat(self) -> None:
        """Heartbeats until cancelled."""
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            self.sessions.beat()

    def _inject_faults(self, num_tokens: int) -> None:
        config = self.config
        if config.hang_after_tokens is not None and num_tokens >= config.hang_after_tokens:
            self.engine.hang()
        drop_after = config.drop_connections_after_tokens
        if drop_after is not None and num_tokens >= drop_after and not self._dropped:
            self._dropped = True
            self.drop_connections()
        if config.die_after_tokens is not None and num_tokens >= config.die_after_tokens:
            self.die()


@contextlib.asynccontextmanager
async def running_mock_worker(config: MockWorkerConfig) -> AsyncIterator[MockWorker]:
    """One life of a worker on `config.listen`; death by fault injection ends it early.

    Its end is abrupt, as a killed process's is: calls in flight fail with UNAVAILABLE or
    CANCELLED, and what it held is gone. Start another on the same address for a restart.
    """
    died = asyncio.Event()
    worker = MockWorker(config, died.set)
    ended = asyncio.Event()
    serving: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def live() -> None:
        try:
            async with _serving(worker):
                serving.set_result(None)
                await _first_of(died, ended)
        except BaseException as error:
            if serving.done():
                raise
            serving.set_exception(error)

    life = asyncio.create_task(live())
    try:
        await serving
        yield worker
    finally:
        ended.set()
        await life


@contextlib.asynccontextmanager
async def _serving(worker: MockWorker) -> AsyncIterator[None]:
    config = worker.config
    tasks: list[asyncio.Task[None]] = []
    async with running_server(
        lambda server: add_WorkerServiceServicer_to_server(MockServicer(worker), server),
        [pb.DESCRIPTOR.services_by_name["WorkerService"]],
        config.listen,
        grace_s=0,
    ) as server:
        host = config.listen.rpartition(":")[0]
        bound = f"{host}:{server.port}" if server.port else config.listen
        worker.address = config.advertise_address or bound
        tasks += [asyncio.create_task(worker.engine.run()), asyncio.create_task(worker.beat())]
        tasks += [asyncio.create_task(worker.register(each).run()) for each in config.scheduler]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    logger.error("event=task_failed", exc_info=result)
    worker.sessions.close()


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _identity(config: MockWorkerConfig) -> pool_identity_pb2.PoolIdentity:
    path = config.model_path
    return pool_identity_pb2.PoolIdentity(
        served_model_name=config.served_model_name or (path.resolve().name if path else "mock"),
        model_revision=model_files.model_revision(path) if path else "mock",
        tokenizer_digest=model_files.tokenizer_digest(path) if path else "mock",
        template_digest=model_files.chat_template_digest(path, None) if path else "",
        page_size=config.page_size,
        hash_version=HASH_VERSION,
    )


def _token_ids(config: MockWorkerConfig) -> list[int]:
    if config.token_id:
        return list(config.token_id)
    if config.text is not None and config.model_path is not None:
        tokenizer = Tokenizer.from_file(str(config.model_path / "tokenizer.json"))
        return list(tokenizer.encode(config.text, add_special_tokens=False).ids)
    return list(range(1, 256))


def main() -> None:
    """Serve until SIGINT, SIGTERM or the injected death."""
    config = parse_config(MockWorkerConfig, "mock_worker")
    configure_logging("mock_worker", config.log_level)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    run(_serve(config))


async def _serve(config: MockWorkerConfig) -> None:
    stop = stop_event()
    async with _serving(worker := MockWorker(config, lambda: os._exit(1))):
        logger.info("event=ready address=%s worker=%s", worker.address, config.worker_id)
        await stop.wait()


if __name__ == "__main__":
    main()
