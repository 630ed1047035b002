"""The whole engine in one thread: loop, scheduler and runner between two lists."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from services.bench.workloads import Turn
from services.worker.engine.messages import (
    EngineInput,
    ProfileState,
    Request,
    SamplingParams,
    StepOutput,
)


class ListInbox:
    """What the benchmark puts in; taken by the loop on its next turn."""

    def __init__(self) -> None:
        self._messages: list[EngineInput] = []
        # Time that the loop asked to wait here.
        self.waited_ns = 0

    def put(self, messages: Iterable[EngineInput]) -> None:
        """Add messages in order."""
        self._messages.extend(messages)

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        """Everything put in; with `block` and nothing there, after `timeout_s`.

        Nothing can arrive meanwhile: only this thread puts messages in.
        """
        if block and not self._messages and timeout_s:
            started_ns = time.perf_counter_ns()
            time.sleep(timeout_s)
            self.waited_ns += time.perf_counter_ns() - started_ns
        messages, self._messages = self._messages, []
        return messages


class EncodingOutbox:
    """Encodes outputs as the socket to the front would, and hands them to the benchmark."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._outputs: list[StepOutput] = []

    def send(self, message: StepOutput | ProfileState) -> None:
        """Encode, and keep until taken."""
        assert isinstance(message, StepOutput), "nobody asked for a profile"
        self._encoder.encode(message)
        self._outputs.append(message)

    def take(self) -> list[StepOutput]:
        """What was sent since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs


def make_request(key: int, turn: Turn, temperature: float = 0.0) -> Request:
    """A request for exactly the turn's tokens."""
    return Request(
        key=key,
        request_id=f"bench-{key}",
        token_ids=turn.token_ids,
        prompt_len=len(turn.token_ids),
        sampling=SamplingParams(
            temperature=temperature,
            max_new_tokens=turn.output_len,
            ignore_eos=True,
            seed=key,
        ),
        arrival_ns=time.monotonic_ns(),
    )
