"""A gateway with a real tokenizer, a real scheduler and scripted workers, in one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from grpc import aio
from tokenizers import Tokenizer

from rhizome.common.v1.pool_identity_pb2 import PoolIdentity
from rhizome.tokenizer.v1 import tokenizer_service_pb2
from rhizome.tokenizer.v1.tokenizer_service_pb2_grpc import add_TokenizerServiceServicer_to_server
from services.common.model_files import builtin_model_path
from services.common.rpc import running_server
from services.gateway.config import GatewayConfig
from services.gateway.gateway import running_gateway
from services.gateway.pipeline import Pipeline
from services.scheduler.config import SchedulerConfig
from services.scheduler.service import RunningScheduler, running_scheduler
from services.tokenizer.load import load_parts
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.servicer import TokenizerParts, TokenizerServicer
from tests.fakes.scripted_worker import PAGE_SIZE, ScriptedWorker, running_worker

ANSWER = "Paris is the capital of France, and its river is the Seine.\n\nThe end"


@cache
def tokenizer_parts() -> TokenizerParts:
    return load_parts()


@cache
def reference_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(builtin_model_path() / "tokenizer.json"))


def eos_ids() -> list[int]:
    return list(tokenizer_parts().info.eos_token_ids)


def answer_ids(text: str = ANSWER) -> list[int]:
    """Ids of `text`, then the end of the sequence."""
    ids = reference_tokenizer().encode(text, add_special_tokens=False).ids
    return [*ids, eos_ids()[0]]


def pool_identity() -> PoolIdentity:
    info = tokenizer_parts().info
    return PoolIdentity(
        served_model_name="scripted",
        model_revision="revision-0",
        tokenizer_digest=info.tokenizer_digest,
        template_digest=info.template_digest,
        page_size=PAGE_SIZE,
        hash_version=info.hash_version,
    )


@dataclass
class GatewayStack:
    url: str
    grpc_address: str
    pipeline: Pipeline
    workers: list[ScriptedWorker]
    # None where the test has its own.
    scheduler: RunningScheduler | None = None


@contextlib.asynccontextmanager
async def running_tokenizer(
    parts: TokenizerParts | None = None, listen: str = "localhost:0"
) -> AsyncIterator[str]:
    """Gives its address, which is `listen` for a Unix socket."""
    with ThreadPoolExecutor(2) as pool:
        servicer = TokenizerServicer(parts or tokenizer_parts(), pool, TokenizerMetrics())

        def add(server: aio.Server) -> None:
            add_TokenizerServiceServicer_to_server(servicer, server)

        async with running_server(
            add,
            [tokenizer_service_pb2.DESCRIPTOR.services_by_name["TokenizerService"]],
            listen,
            grace_s=0.1,
        ) as server:
            yield listen if listen.startswith("unix:") else f"localhost:{server.port}"


def scripted_worker(
    name: str, answer: Callable[[Sequence[int]], list[int]] | None = None, step_s: float = 0.002
) -> ScriptedWorker:
    return ScriptedWorker(
        name,
        pool_identity(),
        answer or (lambda _: answer_ids()),
        eos_ids(),
        tokenizer_parts().info.vocab_size,
        step_s=step_s,
    )


@contextlib.asynccontextmanager
async def gateway_stack(
    *,
    num_workers: int = 1,
    num_tokenizers: int = 1,
    answer: Callable[[Sequence[int]], list[int]] | None = None,
    step_s: float = 0.002,
    scheduling: Mapping[str, Any] | None = None,
    **config: object,
) -> AsyncIterator[GatewayStack]:
    """Everything up and ready; `config` goes into the gateway's configuration, `scheduling` into
    the scheduler's."""
    async with contextlib.AsyncExitStack() as stack:
        tokenizers = [
            await stack.enter_async_context(running_tokenizer()) for _ in range(num_tokenizers)
        ]
        scheduler = await stack.enter_async_context(
            running_scheduler(
                SchedulerConfig(
                    **{"listen": "localhost:0", "worker_wait_s": 0.5, **(scheduling or {})}
                ),
                grace_s=0.1,
            )
        )
        scheduler_address = f"localhost:{scheduler.server.port}"
        workers = [
            await stack.enter_async_context(
                running_worker(scripted_worker(f"w{i}", answer, step_s), scheduler_address)
            )
            for i in range(num_workers)
        ]
        settings: dict[str, object] = {
            "schedulers": (scheduler_address,),
            "tokenizers": tuple(tokenizers),
            "port": 0,
            "grpc_listen": "localhost:0",
            "shutdown_grace_s": 0.5,
            **config,
        }
        gateway = await stack.enter_async_context(
            running_gateway(GatewayConfig(**settings))  # type: ignore[arg-type]
        )
        await until(
            lambda: (
                gateway.pipeline.ready
                and len(gateway.pipeline.control.table.workers()) == num_workers
            )
        )
        yield GatewayStack(
            f"http://127.0.0.1:{gateway.http_port}",
            f"localhost:{gateway.grpc_port}",
            gateway.pipeline,
            workers,
            scheduler,
        )


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for something that other tasks bring about. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
