"""Client processes that send a workload's conversations at their times.

Conversation i belongs to process i modulo their number, and process k draws its arrivals from
seed + k: arrivals are part of the workload's definition, as its prompts are.

An interrupt is the benchmark's alone: client processes start with it blocked, and end when the
benchmark's end of their connection is closed, for whatever reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

from services.bench.presets import Arrival
from services.bench.serving.client import RequestRecord, open_session, send
from services.bench.serving.config import Backend
from services.bench.serving.protocol import make_api
from services.bench.workloads import Conversation

_PROGRESS_INTERVAL_S = 0.25
# Time that the order to start takes to reach every process.
_START_DELAY_S = 0.1
_STOP_TIMEOUT_S = 5.0


class ClientLostError(Exception):
    """A client process ended before it reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how requests are sent."""

    base_url: str
    backend: Backend
    model: str
    sends_ids: bool
    api_key: str
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One process's part."""

    target: Target
    conversations: list[Conversation]
    # Of this process; None for everything at once, or for no limit.
    request_rate: float | None
    max_concurrency: int | None
    seed: int


def run_load(
    target: Target,
    conversations: list[Conversation],
    arrival: Arrival,
    seed: int,
    on_progress: Callable[[int], None],
) -> list[RequestRecord]:
    """Send everything; `on_progress` gets the number of requests that ended, now and then.

    Raises ClientLostError when a process died.
    """
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for job in _jobs(target, conversations, arrival, seed):
            ours, theirs = context.Pipe()
            connections.append(ours)
            process = context.Process(target=_run_process, args=(theirs, job), daemon=True)
            with _interrupts_blocked():
                process.start()
                processes.append(process)
                theirs.close()
        for connection in connections:
            _receive(connection)
        start_s = time.monotonic() + _START_DELAY_S
        for connection in connections:
            connection.send(start_s)
        return _collect(connections, on_progress)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(_STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """SIGINT waits until the end; processes started here never get it."""
    # Starting a first process starts this one too, which would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _jobs(
    target: Target, conversations: list[Conversation], arrival: Arrival, seed: int
) -> list[_Job]:
    count = arrival.num_processes
    rate, limit = arrival.request_rate, arrival.max_concurrency
    return [
        _Job(
            target=target,
            conversations=conversations[index::count],
            request_rate=None if rate is None else rate / count,
            max_concurrency=None if limit is None else limit // count + (index < limit % count),
            seed=seed + index,
        )
        for index in range(count)
    ]


def _collect(
    connections: list[Connection], on_progress: Callable[[int], None]
) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    ended = dict.fromkeys(connections, 0)
    running = list(connections)
    while running:
        for connection in wait(running):
            assert isinstance(connection, Connection)
            message = _receive(connection)
            if isinstance(message, int):
                ended[connection] = message
                on_progress(sum(ended.values()))
            else:
                records += message
                running.remove(connection)
    on_progress(len(records))
    return records


def _receive(connection: Connection) -> int | list[RequestRecord]:
    try:
        message: int | list[RequestRecord] = connection.recv()
    except EOFError:
        raise ClientLostError("a client process died; its error is above") from None
    return message


def _run_process(connection: Connection, job: _Job) -> None:
    """A client process: says that it is up, waits for the time to start, reports."""
    # All of these say that nobody waits for the report any more.
    with contextlib.suppress(asyncio.CancelledError, EOFError, ConnectionError):
        connection.send(0)
        start_s = connection.recv()
        connection.send(asyncio.run(_run_job(connection, job, start_s)))


async def _run_job(connection: Connection, job: _Job, start_s: float) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    target = job.target
    api = make_api(target.backend, target.model, target.sends_ids)
    places = asyncio.Semaphore(job.max_concurrency or len(job.conversations) or 1)

    async def converse(conversation: Conversation) -> None:
        async with places:
            for turn in conversation:
                records.append(await send(session, target.base_url, api, turn))

    async with (
        _ending_with(connection),
        open_session(target.api_key, target.timeout_s) as session,
        _reporting(connection, records),
        asyncio.TaskGroup() as group,
    ):
        arrivals = random.Random(job.seed)
        due_s = start_s
        for conversation in job.conversations:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            group.create_task(converse(conversation))
            if job.request_rate is not None:
                due_s += arrivals.expovariate(job.request_rate)
    return records


@contextlib.asynccontextmanager
async def _ending_with(connection: Connection) -> AsyncIterator[None]:
    """Cancel the task when the other end is closed; it sends nothing, so that alone is read."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"

    def end() -> None:
        loop.remove_reader(connection.fileno())
        task.cancel()

    loop.add_reader(connection.fileno(), end)
    try:
        yield
    finally:
        loop.remove_reader(connection.fileno())


@contextlib.asynccontextmanager
async def _reporting(connection: Connection, records: list[RequestRecord]) -> AsyncIterator[None]:
    async def report() -> None:
        told = 0
        while True:
            await asyncio.sleep(_PROGRESS_INTERVAL_S)
            if len(records) > told:
                told = len(records)
                # Where the other end is closed, the task that awaits the load is told as well.
                with contextlib.suppress(ConnectionError):
                    connection.send(told)

    task = asyncio.create_task(report())
    try:
        yield
    finally:
        task.cancel()
