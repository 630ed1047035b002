"""Asks the cache index who holds a prefix, in batches, without ever being held up by it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from grpc import aio

from rhizome.cache_index.v1.cache_index_service_pb2 import (
    ChainMatch,
    MatchManyRequest,
    MatchManyResponse,
    MatchPrefixRequest,
)
from rhizome.cache_index.v1.cache_index_service_pb2_grpc import CacheIndexServiceStub
from services.common.outbox import Outbox
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
    traceparent: str
    answer: asyncio.Future[tuple[WorkerMatch, ...]]


class _Asked(NamedTuple):
    """Questions that travel together, and the timer that ends the wait for their answer."""

    questions: list[_Question]
    timer: asyncio.TimerHandle


class IndexClient:
    """`match` answers within about `deadline_s`, with nothing when the index does not.

    All questions go through one call, opened when first needed and again after it broke. After
    three failures in a row nobody asks any more, until a probe, sent once a second, is answered in
    time.
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
        # What the call has not answered yet, by number.
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count()
        self._outbox: Outbox[MatchManyRequest] = Outbox(MatchManyRequest)
        self._serving: asyncio.Task[None] | None = None
        self._num_failures = 0
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_skipped(self) -> bool:
        return self._num_failures >= _FAILURES_TO_SKIP

    async def match(
        self, prefix_hashes: Sequence[int], traceparent: str = ""
    ) -> tuple[WorkerMatch, ...]:
        """Who holds how many leading pages of the chain."""
        if not prefix_hashes:
            return ()
        if self.is_skipped:
            self._metrics.index_skipped.inc()
            return ()
        loop = asyncio.get_running_loop()
        question = _Question(prefix_hashes, traceparent, loop.create_future())
        if not self._questions:
            self._collecting_since = loop.time()
        self._questions.append(question)
        if len(self._questions) >= _MAX_CHAINS:
            self._ask()
        elif self._timer is None:
            if self._asked:
                self._timer = loop.call_later(_WINDOW_S, self._ask)
            else:
                self._timer = loop.call_soon(self._ask)
        return await question.answer

    async def close(self) -> None:
        """Stop what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for task in (self._serving, self._probe) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ask(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        questions = [question for question in self._questions if not question.answer.done()]
        self._questions = []
        if not questions:
            return
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        timeout_s = max(0.0, self._deadline_s - (loop.time() - self._collecting_since))
        self._asked[number] = _Asked(questions, loop.call_later(timeout_s, self._give_up, number))
        if self._serving is None:
            # What a broken call left unsent was given up with it.
            self._outbox.clear()
            self._serving = asyncio.create_task(self._serve())
        request = MatchManyRequest(number=number)
        for question in questions:
            request.chains.add(
                prefix_hashes=question.prefix_hashes, traceparent=question.traceparent
            )
        self._outbox.push(request)

    async def _serve(self) -> None:
        """One call, from its opening to its end."""
        call = self._stub.MatchMany()
        writer = asyncio.create_task(self._outbox.drain(call))
        reason = "the index ended the call"
        try:
            while isinstance(response := await call.read(), MatchManyResponse):
                self._take(response)
        except aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        finally:
            self._serving = None
            call.cancel()
            writer.cancel()
            self._lose_asked(reason)
            await asyncio.gather(writer, return_exceptions=True)

    def _lose_asked(self, reason: str) -> None:
        asked, self._asked = self._asked, {}
        for lost in asked.values():
            _settle(lost, [])
        if asked:
            self._note_failure(reason)
        if self._questions:
            self._ask()

    def _take(self, response: MatchManyResponse) -> None:
        asked = self._asked.pop(response.number, None)
        if asked is None:
            # It came too late.
            return
        self._num_failures = 0
        _settle(asked, [_worker_matches(match) for match in response.matches])
        if self._questions and not self._asked:
            self._ask()

    def _give_up(self, number: int) -> None:
        _settle(self._asked.pop(number), [])
        self._note_failure("no answer in time")
        if self._questions and not self._asked:
            self._ask()

    def _note_failure(self, reason: str) -> None:
        self._metrics.index_failures.inc()
        self._num_failures += 1
        if self.is_skipped and self._probe is None:
            logger.warning("event=index_skipped reason=%r", reason)
            self._probe = asyncio.create_task(self._probe_until_answered())
            if self._serving is not None:
                # It may be full of what the index did not read.
                self._serving.cancel()

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


def _settle(asked: _Asked, answers: list[tuple[WorkerMatch, ...]]) -> None:
    asked.timer.cancel()
    answers += [()] * (len(asked.questions) - len(answers))
    for question, answer in zip(asked.questions, answers, strict=False):
        if not question.answer.done():
            question.answer.set_result(answer)
