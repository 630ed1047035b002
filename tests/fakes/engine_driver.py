"""Drives an engine loop over a FakeRunner, one turn at a time, and sorts its output by sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.worker.engine.batching.budget import GrowthEstimate
from services.worker.engine.batching.policy import SchedulePolicy
from services.worker.engine.batching.scheduler import BatchScheduler
from services.worker.engine.loop import EngineLoop
from services.worker.engine.messages import (
    Admission,
    CacheCleared,
    CacheEvent,
    Cancel,
    EngineInput,
    Finish,
    LogprobRows,
    PagesStored,
    Request,
    SamplingParams,
    SequenceError,
    StepOutput,
)
from tests.fakes.fake_runner import FakeRunner, fake_token, prefix_digests


class ListInbox:
    """Hands out what was put in, never waits."""

    def __init__(self) -> None:
        self.messages: list[EngineInput] = []
        # (block, timeout_s) of every call.
        self.calls: list[tuple[bool, float | None]] = []

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        """Everything put in since the last call."""
        self.calls.append((block, timeout_s))
        messages, self.messages = self.messages, []
        return messages


class ListOutbox:
    """Keeps every output."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []

    def send(self, message: StepOutput) -> None:
        """Keep it."""
        self.outputs.append(message)


@dataclass(slots=True)
class Record:
    """All output of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobRows] = field(default_factory=list)
    admission: Admission | None = None
    finish: Finish | None = None
    error: SequenceError | None = None

    @property
    def has_ended(self) -> bool:
        """Whether its terminal entry came."""
        return self.finish is not None or self.error is not None


class HeldHashes:
    """What a listener to cache events believes; asserts that each event keeps the promises."""

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}

    def apply(self, events: Iterable[CacheEvent]) -> None:
        """Take events in order."""
        for event in events:
            if isinstance(event, CacheCleared):
                self.parents.clear()
            elif isinstance(event, PagesStored):
                parent = event.parent_hash
                for prefix_hash in event.prefix_hashes:
                    assert parent == 0 or parent in self.parents, "announced before its parent"
                    assert prefix_hash not in self.parents, "announced twice"
                    self.parents[prefix_hash] = parent
                    parent = prefix_hash
            else:
                for prefix_hash in event.prefix_hashes:
                    assert prefix_hash in self.parents, "removed, but never announced"
                    children = prefix_hash in self.parents.values()
                    assert not children, "removed before its children"
                    del self.parents[prefix_hash]


class ManualClock:
    """Time that passes only when told, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now


class EngineDriver:
    """An engine of fake parts around the real loop and scheduler."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        context_length: int = 128,
        vocab_size: int = 50,
        eos_token_ids: tuple[int, ...] = (),
        max_running_sequences: int = 8,
        max_step_tokens: int = 32,
        num_in_flight: int = 1,
        growth: GrowthEstimate | None = None,
        policy: SchedulePolicy = "fcfs",
    ) -> None:
        self.vocab_size = vocab_size
        self.num_pages = num_pages
        self.eos_token_ids = eos_token_ids
        self.max_len = min(context_length, num_pages * page_size + 1)
        self.clock = ManualClock()
        self.runner = FakeRunner(
            num_slots=max_running_sequences,
            num_pages=num_pages,
            page_size=page_size,
            context_length=context_length,
            vocab_size=vocab_size,
            max_step_tokens=max_step_tokens,
            num_in_flight=num_in_flight,
        )
        self.scheduler = BatchScheduler(
            num_pages=num_pages,
            page_size=page_size,
            context_length=context_length,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            max_running_sequences=max_running_sequences,
            max_step_tokens=max_step_tokens,
            num_in_flight=num_in_flight,
            growth=growth,
            policy=policy,
            clock=self.clock,
        )
        self.inbox = ListInbox()
        self.outbox = ListOutbox()
        self.loop = EngineLoop(
            runner=self.runner, scheduler=self.scheduler, inbox=self.inbox, outbox=self.outbox
        )
        self.records: dict[int, Record] = {}
        self.held = HeldHashes()
        self._num_sorted = 0

    def send(self, *messages: EngineInput) -> None:
        """Put messages in the inbox."""
        for message in messages:
            if isinstance(message, Request):
                self.records[message.key] = Record()
        self.inbox.messages += messages

    def cancel(self, *keys: int) -> None:
        """Ask for sequences to be stopped."""
        self.send(Cancel(list(keys)))

    def step(self, num_steps: int = 1) -> None:
        """Turns of the loop, each followed by the invariants."""
        for _ in range(num_steps):
            self.clock.now += 1_000
            self.loop.step()
            self.scheduler.check()
            self._sort_outputs()

    def run(self, max_steps: int = 2_000) -> None:
        """Turns until all sequences have ended and nothing is in flight."""
        for _ in range(max_steps):
            self.step()
            if not (self.scheduler.num_live or self.scheduler.num_issued or self.inbox.messages):
                return
        raise AssertionError(f"sequences still live after {max_steps} steps")

    def expected(self, request: Request) -> tuple[list[int], str]:
        """What the sequence produces when it runs alone, and why it ends."""
        token_ids = list(request.token_ids)
        digests = prefix_digests(token_ids)
        sampling = request.sampling
        stop_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_ids.update(self.eos_token_ids)
        end_len = min(request.prompt_len + sampling.max_new_tokens, self.max_len)
        new: list[int] = []
        while len(token_ids) < end_len:
            token_id = fake_token(digests[-1], sampling, request.choice_index, self.vocab_size)
            token_ids.append(token_id)
            new.append(token_id)
            digests += prefix_digests([token_id], before=digests[-1])
            if token_id in stop_ids:
                return new, "stop"
        return new, "length"

    def _sort_outputs(self) -> None:
        for output in self.outbox.outputs[self._num_sorted :]:
            self.held.apply(output.cache_events)
            self._sort_tokens(output)
            for admission in output.admissions:
                assert self.records[admission.key].admission is None, "admitted twice"
                self.records[admission.key].admission = admission
            for finish in output.finishes:
                assert not self.records[finish.key].has_ended, "ended twice"
                self.records[finish.key].finish = finish
            for error in output.errors:
                assert not self.records[error.key].has_ended, "ended twice"
                self.records[error.key].error = error
        self._num_sorted = len(self.outbox.outputs)

    def _sort_tokens(self, output: StepOutput) -> None:
        position = 0
        for key, count in zip(output.keys, output.num_tokens, strict=True):
            record = self.records[key]
            assert not record.has_ended, "tokens after the end"
            record.token_ids += output.token_ids[position : position + count]
            position += count
        assert position == len(output.token_ids)
        for key, rows in output.logprobs:
            assert not self.records[key].has_ended, "log-probabilities after the end"
            self.records[key].logprobs.append(rows)


def no_foresight() -> GrowthEstimate:
    """Admits whatever fits now, so that preemptions are frequent."""
    return GrowthEstimate(initial=0.0, minimum=0.0)


def make_request(
    key: int,
    token_ids: list[int],
    *,
    max_new_tokens: int = 8,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    seed: int = 0,
    **fields: object,
) -> Request:
    """A request whose ids are all prompt unless `prompt_len` says otherwise."""
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    fields.setdefault("prompt_len", len(token_ids))
    return Request(
        key=key,
        request_id=f"request-{key}",
        token_ids=token_ids,
        sampling=sampling,
        **fields,  # type: ignore[arg-type]
    )


def run_to_end(
    loop: EngineLoop, inbox: ListInbox, outbox: ListOutbox, requests: list[Request]
) -> dict[int, list[int]]:
    """Each request's tokens, by key, once all have ended without an error."""
    inbox.messages += requests
    tokens: dict[int, list[int]] = {request.key: [] for request in requests}
    num_finished = seen = 0
    while num_finished < len(requests):
        loop.step()
        for output in outbox.outputs[seen:]:
            ids = iter(output.token_ids)
            for key, number in zip(output.keys, output.num_tokens, strict=True):
                tokens[key] += [next(ids) for _ in range(number)]
            num_finished += len(output.finishes)
            assert not output.errors
        seen = len(outbox.outputs)
    return tokens
