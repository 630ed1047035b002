"""An engine without a model, at the other end of the front's ZeroMQ sockets.

Speaks messages.py like the real one. The next token is a function of the sequence, so whatever a
client receives can be checked; steps can be slowed, paused, or stopped for good.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from services.common.prefix_hash import ROOT_HASH, prefix_hashes
from services.worker.engine.messages import (
    Admission,
    CacheCleared,
    CacheEvent,
    Cancel,
    EngineFailed,
    EngineInput,
    EngineLoad,
    EngineOutput,
    EngineReady,
    Finish,
    FlushCache,
    LogprobRows,
    PagesStored,
    Request,
    SequenceError,
    StepOutput,
    StepWork,
    Stop,
)

VOCAB_SIZE = 1000
PAGE_SIZE = 16
_DEADLINE_EXCEEDED = 4


def next_token(token_ids: Sequence[int]) -> int:
    """The model: depends on the last id and on the position."""
    return (token_ids[-1] * 31 + len(token_ids) * 7 + 1) % VOCAB_SIZE


def expected_output(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the fake model says after `prompt`."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


@dataclass
class _Running:
    request: Request
    ids: list[int]
    started_ns: int = field(default_factory=time.monotonic_ns)

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.request.prompt_len


class FakeScheduler:
    """The engine's state and its steps, without any sockets."""

    def __init__(
        self, *, num_pages: int, max_running: int, context_length: int, tokens_per_step: int = 1
    ) -> None:
        self.num_pages = num_pages
        self.max_running = max_running
        self.context_length = context_length
        self.tokens_per_step = tokens_per_step
        self.step_number = 0
        self._waiting: list[Request] = []
        self._running: dict[int, _Running] = {}
        self._cached: set[int] = set()
        self._num_output = 0
        self._pending = StepOutput(step_number=0)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    def take(self, message: EngineInput) -> None:
        """One input; what it ends is in the next step's output."""
        if isinstance(message, Request):
            self._waiting.append(message)
            if message.reservation_id:
                self._pending.accepted_reservation_ids.append(message.reservation_id)
        elif isinstance(message, Cancel):
            for key in message.keys:
                self._cancel(key)
        elif isinstance(message, FlushCache):
            self._pending.flushed_pages = len(self._cached)
            self._pending.cache_events.append(CacheCleared())
            self._cached.clear()

    @property
    def has_output(self) -> bool:
        """Whether inputs alone made something to tell."""
        pending = self._pending
        return bool(pending.finishes or pending.errors or pending.flushed_pages is not None)

    def step(self) -> StepOutput:
        """Run one step; the output holds what inputs did since the last one, too."""
        output = self._pending
        self._pending = StepOutput(step_number=0)
        started = time.monotonic_ns()
        if self.busy:
            self.step_number += 1
            self._expire(output)
            self._admit(output)
            for key, running in list(self._running.items()):
                self._advance(key, running, output)
            output.work = StepWork(
                step_ns=time.monotonic_ns() - started, decode_sequences=len(output.keys)
            )
        output.step_number = self.step_number
        output.load = self.load()
        return output

    def load(self) -> EngineLoad:
        """What a step reports."""
        used = sum(-(-len(running.ids) // PAGE_SIZE) for running in self._running.values())
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_pages=self.num_pages - used,
            num_evictable_pages=len(self._cached),
            predicted_step_ns=1_000_000,
            num_output_tokens=self._num_output,
        )

    def _admit(self, output: StepOutput) -> None:
        while self._waiting and len(self._running) < self.max_running:
            request = self._waiting.pop(0)
            self._running[request.key] = _Running(request, list(request.token_ids))
            output.admissions.append(Admission(request.key, 0, 1))
            output.cache_events += self._store(request)
            output.logprobs += _prompt_logprobs(request)

    def _store(self, request: Request) -> list[CacheEvent]:
        prompt = request.token_ids[: request.prompt_len]
        hashes = prefix_hashes(prompt, PAGE_SIZE, request.namespace)
        held = sum(1 for prefix_hash in hashes if prefix_hash in self._cached)
        if held == len(hashes):
            return []
        self._cached.update(hashes)
        return [PagesStored(hashes[held - 1] if held else ROOT_HASH, hashes[held:])]

    def _advance(self, key: int, running: _Running, output: StepOutput) -> None:
        request, sampling = running.request, running.request.sampling
        new: list[int] = []
        reason = None
        while len(new) < self.tokens_per_step and reason is None:
            if running.num_output < sampling.max_new_tokens:
                token_id = next_token(running.ids)
                running.ids.append(token_id)
                new.append(token_id)
            if running.num_output >= sampling.max_new_tokens:
                reason = "length"
            if new and new[-1] in sampling.stop_token_ids:
                reason = "stop"
        if new:
            output.keys.append(key)
            output.num_tokens.append(len(new))
            output.token_ids += new
            self._num_output += len(new)
        if request.logprobs.output and new:
            output.logprobs.append((key, _rows(request, len(running.ids) - len(new), new)))
        if reason is not None:
            matched = new[-1] if reason == "stop" else None
            output.finishes.append(self._finish(key, reason, matched))

    def _finish(self, key: int, reason: str, matched: int | None = None) -> Finish:
        running = self._running.pop(key)
        return Finish(
            key=key,
            reason=reason,
            matched_token_id=matched,
            num_output_tokens=running.num_output,
            cached_tokens=0,
            queue_ns=1,
            prefill_ns=2,
            decode_ns=time.monotonic_ns() - running.started_ns,
            num_preemptions=0,
            reservation_id=running.request.reservation_id,
        )

    def _cancel(self, key: int) -> None:
        for request in [request for request in self._waiting if request.key == key]:
            self._waiting.remove(request)
            self._running[key] = _Running(request, list(request.token_ids))
        if key in self._running:
            self._pending.finishes.append(self._finish(key, "cancelled"))

    def _expire(self, output: StepOutput) -> None:
        now = time.monotonic_ns()
        for key, running in list(self._running.items()):
            deadline = running.request.deadline_ns
            if deadline is not None and deadline <= now:
                del self._running[key]
                output.errors.append(
                    SequenceError(
                        key, _DEADLINE_EXCEEDED, "its time passed", running.request.reservation_id
                    )
                )


class FakeEngine:
    """A thread that runs a FakeScheduler between the two sockets, until `close`.

    `pause` keeps it alive but silent, like an engine that hangs. `step_s` is the time a step
    takes.
    """

    def __init__(
        self,
        input_address: str,
        output_address: str,
        *,
        step_s: float = 0.0,
        num_pages: int = 4096,
        max_running: int = 256,
        context_length: int = 4096,
        tokens_per_step: int = 1,
        ready: bool = True,
    ) -> None:
        self.step_s = step_s
        self.scheduler = FakeScheduler(
            num_pages=num_pages,
            max_running=max_running,
            context_length=context_length,
            tokens_per_step=tokens_per_step,
        )
        self._addresses = (input_address, output_address)
        self._ready = ready
        self._closing = threading.Event()
        self._going = threading.Event()
        self._going.set()
        self._outgoing: list[EngineOutput] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> FakeEngine:
        """Bind, connect and begin."""
        self._thread.start()
        return self

    def pause(self) -> None:
        """Do nothing until `resume`."""
        self._going.clear()

    def resume(self) -> None:
        """Go on."""
        self._going.set()

    def say(self, message: EngineOutput) -> None:
        """Send this before the next step."""
        self._outgoing.append(message)

    def fail(self, reason: str, permanent: bool = False) -> None:
        """Report a failure, as a dying engine does."""
        self.say(EngineFailed(reason, permanent))

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._going.set()
        self._thread.join()

    def ready_message(self) -> EngineReady:
        """What it says when it is up."""
        return EngineReady(
            device="cpu",
            dtype="float32",
            attention_backend="none",
            page_size=PAGE_SIZE,
            num_pages=self.scheduler.num_pages,
            context_length=self.scheduler.context_length,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[0],
            max_running_sequences=self.scheduler.max_running,
            max_step_tokens=2048,
            pair_work=1e-4,
            tp_size=1,
        )

    def _run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        inbox.bind(self._addresses[0])
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.connect(self._addresses[1])
        decoder = msgspec.msgpack.Decoder(list[EngineInput])
        encoder = msgspec.msgpack.Encoder()
        if self._ready:
            self.say(self.ready_message())
        while not self._closing.is_set():
            self._going.wait()
            if self.scheduler.busy and self.step_s:
                time.sleep(self.step_s)
            elif not self.scheduler.busy:
                inbox.poll(5)
            for message in _received(inbox, decoder):
                if isinstance(message, Stop):
                    self._closing.set()
                self.scheduler.take(message)
            while self._outgoing:
                outbox.send(encoder.encode(self._outgoing.pop(0)))
            if self.scheduler.busy or self.scheduler.has_output:
                outbox.send(encoder.encode(self.scheduler.step()))
        inbox.close(linger=0)
        outbox.close(linger=100)
        context.term()


def _received(inbox: Any, decoder: msgspec.msgpack.Decoder[list[EngineInput]]) -> list[EngineInput]:
    messages: list[EngineInput] = []
    while True:
        try:
            messages += decoder.decode(inbox.recv(zmq.NOBLOCK))
        except zmq.Again:
            return messages


def _prompt_logprobs(request: Request) -> list[tuple[int, LogprobRows]]:
    start = request.logprobs.prompt_start
    if start is None or start >= request.prompt_len:
        return []
    return [
        (
            request.key,
            _rows(request, first, request.token_ids[first : min(first + 2048, request.prompt_len)]),
        )
        for first in range(start, request.prompt_len, 2048)
    ]


def _rows(request: Request, start: int, token_ids: list[int]) -> LogprobRows:
    top, num_requested = request.logprobs.num_top, len(request.logprobs.token_ids)
    count = len(token_ids)
    return LogprobRows(
        start_position=start,
        token_ids=token_ids,
        logprobs=[float("nan") if start + i == 0 else -(start + i) / 8 for i in range(count)],
        num_top=top,
        top_token_ids=[k for _ in range(count) for k in range(top)],
        top_logprobs=[-float(k) for _ in range(count) for k in range(top)],
        requested_logprobs=[-0.5] * (count * num_requested),
    )
