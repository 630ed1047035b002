"""Asks the cache index who holds a prefix, in batches, without ever being held up by it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from grpc import aio

from rhizome.cache_index.v1.cache_index_service_pb2 import (
    ChainMatch,
    HashChain,
    MatchPrefixRequest,
)
from rhizome.cache_index.v1.cache_index_service_pb2_grpc import CacheIndexServiceStub
from services.scheduler.metrics import SchedulerMetrics

logger = logging.getLogger(__name__)

MATCH_DEADLINE_S = 0.02
# While an answer is under way, chains collect for the next question: until it comes, or this long.
_WINDOW_S = 0.004
_FAILURES_TO_SKIP = 3
_PROBE_INTERVAL_S = 1.0
_MAX_CHAINS = 256


class WorkerMatch(NamedTuple):
    """Leading pages that a worker's epoch holds in GPU or host memory."""

    worker_id: str
    epoch: int
    num_pages: int


class _Question(NamedTuple):
    prefix_hashes: Sequence[int]
    answer: asyncio.Future[tuple[WorkerMatch, ...]]


class IndexClient:
    """`match` answers within about `deadline_s`, with nothing when the index does not.

    After three failures in a row nobody asks any more, until a probe, sent once a second, is
    answered in time.
    """

    def __init__(
        self, channel: aio.Channel, metrics: SchedulerMetrics, deadline_s: float = MATCH_DEADLINE_S
    ) -> None:
        self._stub = CacheIndexServiceStub(channel)
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._questions: list[_Question] = []
        self._collecting_since = 0.0
        self._timer: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_asking = 0
        self._num_failures = 0
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_skipped(self) -> bool:
        return self._num_failures >= _FAILURES_TO_SKIP

    async def match(self, prefix_hashes: Sequence[int]) -> tuple[WorkerMatch, ...]:
        """Who holds how many leading pages of the chain."""
        if not prefix_hashes:
            return ()
        if self.is_skipped:
            self._metrics.index_skipped.inc()
            return ()
        loop = asyncio.get_running_loop()
        question = _Question(prefix_hashes, loop.create_future())
        if not self._questions:
            self._collecting_since = loop.time()
        self._questions.append(question)
        if len(self._questions) >= _MAX_CHAINS:
            self._ask()
        elif self._timer is None:
            if self._num_asking:
                self._timer = loop.call_later(_WINDOW_S, self._ask)
            else:
                self._timer = loop.call_soon(self._ask)
        return await question.answer

    async def close(self) -> None:
        """Stop what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._tasks, *([] if self._probe is None else [self._probe])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ask(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        questions = [question for question in self._questions if not question.answer.done()]
        self._questions = []
        if questions:
            waited_s = asyncio.get_running_loop().time() - self._collecting_since
            timeout_s = max(0.0, self._deadline_s - waited_s)
            task = asyncio.create_task(self._answer(questions, timeout_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, questions: list[_Question], timeout_s: float) -> None:
        request = MatchPrefixRequest(
            chains=[HashChain(prefix_hashes=question.prefix_hashes) for question in questions]
        )
        answers: list[tuple[WorkerMatch, ...]] = []
        self._num_asking += 1
        try:
            response = await self._stub.MatchPrefix(request, timeout=timeout_s)
            answers = [_worker_matches(match) for match in response.matches]
            self._num_failures = 0
        except aio.AioRpcError as error:
            self._note_failure(error)
        finally:
            self._num_asking -= 1
            answers += [()] * (len(questions) - len(answers))
            for question, answer in zip(questions, answers, strict=False):
                if not question.answer.done():
                    question.answer.set_result(answer)
        if self._questions and not self._num_asking:
            self._ask()

    def _note_failure(self, error: aio.AioRpcError) -> None:
        self._metrics.index_failures.inc()
        self._num_failures += 1
        if self.is_skipped and self._probe is None:
            logger.warning(
                "event=index_skipped code=%s detail=%r", error.code().name, error.details()
            )
            self._probe = asyncio.create_task(self._probe_until_answered())

    async def _probe_until_answered(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            with contextlib.suppress(aio.AioRpcError):
                await self._stub.MatchPrefix(MatchPrefixRequest(), timeout=self._deadline_s)
                break
        self._num_failures = 0
        self._probe = None
        logger.info("event=index_back")


@contextlib.asynccontextmanager
async def index_client(
    channel: aio.Channel | None, metrics: SchedulerMetrics, deadline_s: float = MATCH_DEADLINE_S
) -> AsyncIterator[IndexClient | None]:
    """A client that is closed, with its channel, at the block's end; None without a channel."""
    if channel is None:
        yield None
        return
    client = IndexClient(channel, metrics, deadline_s)
    try:
        yield client
    finally:
        await client.close()
        await channel.close()


def _worker_matches(match: ChainMatch) -> tuple[WorkerMatch, ...]:
    return tuple(map(WorkerMatch, match.worker_ids, match.epochs, match.host_pages))
