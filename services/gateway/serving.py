"""What every generating endpoint does alike: run prompts, answer whole or as an event stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.errors import RhizomeError
from services.common.peer_tls import PeerTls
from services.common.spans import NO_TRACER, Tracer
from services.gateway.access import Access
from services.gateway.exchange import ClientGoneError, EventStream, Exchange, KeepAlive
from services.gateway.generation import ChoiceListener, GenerationSpec
from services.gateway.http_errors import error_reply
from services.gateway.pipeline import Generation, Pipeline
from services.gateway.spans import describe_request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows one request."""

    max_body_bytes: int
    max_client_buffer_bytes: int
    request_timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Serving:
    """The parts that endpoints share."""

    pipeline: Pipeline
    keep_alive: KeepAlive
    limits: Limits
    access: Access
    # What calls of workers are made with; None is plain text.
    tls: PeerTls | None = None
    tracer: Tracer = NO_TRACER

    def deadline(self, arrival_s: float) -> float | None:
        """The monotonic time at which a request's time is over."""
        timeout_s = self.limits.request_timeout_s
        return None if timeout_s is None else arrival_s + timeout_s

    async def generations(
        self,
        exchange: Exchange,
        model: str,
        specs: Sequence[GenerationSpec],
        listener: Callable[[int], ChoiceListener],
    ) -> list[Generation]:
        """Tokenize all prompts; `listener` makes the listener of prompt i."""
        if exchange.span.is_recording:
            describe_request(exchange.span, model, specs)
        prompts = await exchange.watched(
            self.pipeline.prepare(self.pipeline.control.table.model(model), specs)
        )
        generations = [
            Generation(self.pipeline, prompt, listener(index), exchange.arrival_s)
            for index, prompt in enumerate(prompts)
        ]
        tokenized_s = time.monotonic() - exchange.arrival_s
        for generation in generations:
            generation.hops.tokenize_s = tokenized_s
        if exchange.span.is_recording:
            exchange.generations = generations
        return generations

    async def run(self, exchange: Exchange, generations: Sequence[Generation]) -> None:
        """Run to the end; the client's disconnect cancels everything."""
        with self.pipeline.admitted([g.prompt for g in generations], exchange.tenant):
            await exchange.watched(_run_all(generations))

    async def stream(
        self,
        exchange: Exchange,
        events: EventStream,
        generations: Sequence[Generation],
        closing: Callable[[], Iterable[bytes]],
        writer: Coroutine[Any, Any, None] | None = None,
    ) -> None:
        """Answer with events that the generations' listeners, or `writer`, write.

        Until a prompt is placed an error is still an HTTP status; later it is an event. When
        placing takes long the head is sent and comments keep the connection.
        """
        with (
            contextlib.nullcontext() if writer is None else contextlib.closing(writer),
            self.pipeline.admitted([g.prompt for g in generations], exchange.tenant),
        ):
            self.keep_alive.streams.add(events)
            try:
                await exchange.watched(
                    self._produce(exchange, events, generations, closing, writer)
                )
            finally:
                self.keep_alive.streams.discard(events)

    async def _produce(
        self,
        exchange: Exchange,
        events: EventStream,
        generations: Sequence[Generation],
        closing: Callable[[], Iterable[bytes]],
        writer: Coroutine[Any, Any, None] | None,
    ) -> None:
        work = asyncio.create_task(_run_with(generations, writer))
        events.overflowed = work.cancel
        try:
            if await self._placed_or_slow(work, generations):
                await events.open()
            try:
                await work
            except RhizomeError as error:
                if exchange.status == 0:
                    raise
                logger.info(
                    "event=stream_failed request_id=%s error=%.1000s",
                    exchange.request_id,
                    error.message,
                    extra=exchange.span.log_fields,
                )
                reply = error_reply(error)
                # What metrics call it; the head is long sent.
                exchange.status = reply.status
                exchange.span.fail(error)
                events.write(b"data: %b\n\n" % reply.body)
            except asyncio.CancelledError:
                if work.cancelled() and events.overflowed is None:
                    raise ClientGoneError from None
                raise
            else:
                for event in closing():
                    events.write(event)
            await events.close()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _placed_or_slow(
        self, work: asyncio.Task[None], generations: Sequence[Generation]
    ) -> bool:
        """Wait for the first placement, or long enough; False when the work failed before."""
        loop = asyncio.get_running_loop()
        decided: asyncio.Future[None] = loop.create_future()

        def decide(_: object = None) -> None:
            if not decided.done():
                decided.set_result(None)

        work.add_done_callback(decide)
        for generation in generations:
            generation.placed.add_done_callback(decide)
        timer = loop.call_later(self.keep_alive.silence_s, decide)
        try:
            await decided
        finally:
            timer.cancel()
        return not work.done() or (not work.cancelled() and work.exception() is None)


async def _run_all(generations: Sequence[Generation]) -> None:
    """Run prompts side by side; the first failure ends the others."""
    if len(generations) == 1:
        await generations[0].run()
        return
    tasks = [asyncio.create_task(generation.run()) for generation in generations]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_with(
    generations: Sequence[Generation], writer: Coroutine[Any, Any, None] | None
) -> None:
    if writer is None:
        await _run_all(generations)
        return
    writing = asyncio.create_task(writer)
    try:
        await _run_all(generations)
        await writing
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


def trace(exchange: Exchange, generation: Generation) -> dict[str, Any]:
    """How a prompt travelled; given to clients that send `x-rhizome-trace: 1`."""
    hops, arrival_s = generation.hops, generation.arrival_s
    first_token_s = generation.first_token_s
    first = generation.choices[0]
    traced = {"trace_id": exchange.span.trace_id} if exchange.span.is_recording else {}
    return {
        "request_id": exchange.request_id,
        **traced,
        "worker_ids": hops.worker_ids,
        "policy": hops.policy,
        "prompt_tokens": len(generation.prompt.token_ids),
        "cached_tokens": generation.cached_tokens,
        "predicted_cached_tokens": hops.predicted_cached_tokens,
        "output_tokens": generation.num_output_tokens,
        "tokenize_ms": _ms(hops.tokenize_s),
        "schedule_ms": _ms(hops.schedule_s),
        "worker_queue_ms": _ms(first.queue_ns / 1e9),
        "first_token_ms": _ms(first_token_s - arrival_s) if first_token_s else None,
        "total_ms": _ms((generation.end_s or first_token_s) - arrival_s),
    }


def usage(generations: Iterable[Generation]) -> dict[str, Any]:
    """OpenAI's usage object over several prompts."""
    prompt = cached = output = 0
    for generation in generations:
        prompt += len(generation.prompt.token_ids)
        cached += generation.cached_tokens
        output += generation.num_output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
