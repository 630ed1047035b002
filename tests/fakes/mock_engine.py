"""A mock worker's engine: a step timer that gives each running sequence its next token.

The next token is a function of the sequence alone, so any attempt on any mock worker with the
same token list continues it exactly, and what a reader has not seen is derived again, not stored.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from xxhash import xxh3_64_intdigest

from rhizome.common.v1 import finish_reason_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    RhizomeError,
)
from services.common.prefix_hash import prefix_hashes
from tests.fakes.mock_cache import MockCache

STOP = finish_reason_pb2.FINISH_REASON_STOP
LENGTH = finish_reason_pb2.FINISH_REASON_LENGTH
CANCELLED = finish_reason_pb2.FINISH_REASON_CANCELLED


class TokenCycle:
    """The output of every sequence: the given ids over and over, from a place its prompt sets."""

    def __init__(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ValueError("token_ids must not be empty")
        self.ids = tuple(ids)

    def phase(self, prompt_ids: Sequence[int], choice_index: int) -> int:
        """Where in the cycle a sequence starts."""
        digest = xxh3_64_intdigest(array("I", prompt_ids).tobytes(), choice_index)
        return digest % len(self.ids)

    def output(self, phase: int, start: int, end: int) -> list[int]:
        """Output ids number `start` to `end` (exclusive) of a sequence."""
        ids, length = self.ids, len(self.ids)
        return [ids[i % length] for i in range(phase + start, phase + end)]


class Reader(Protocol):
    """Whoever gets a sequence's output: told that there is some, it reads when it likes."""

    def wake(self) -> None:
        """There is something new."""


class MockSequence:
    """One sequence: counts, not tokens. `num_output` includes output ids it came with."""

    __slots__ = (
        "admission_due",
        "arrival_ns",
        "cached_tokens",
        "deadline",
        "end",
        "end_reason",
        "error",
        "fails_at",
        "finish",
        "first_output",
        "first_token_ns",
        "handle",
        "hashes",
        "logprobs_from",
        "num_ids",
        "num_output",
        "num_sent",
        "phase",
        "prompt_ids",
        "prompt_len",
        "reader",
        "ready_ns",
        "start_ns",
        "submit",
        "terminal_due",
    )

    def __init__(self, submit: pb.Submit, handle: int, reader: Reader) -> None:
        self.submit = submit
        self.handle = handle
        self.reader = reader
        self.prompt_len = submit.prompt_len
        self.num_ids = submit.num_token_ids
        # Output ids it came with, has now, and has sent.
        self.first_output = max(0, self.num_ids - self.prompt_len)
        self.num_output = self.num_sent = self.first_output
        # Kept only where prompt log-probabilities are wanted.
        self.prompt_ids: list[int] = []
        # Next position whose log-probability is to be sent; None sends no more.
        self.logprobs_from: int | None = None
        self.hashes: list[int] = []
        self.phase = 0
        # Ends when it has this many output ids, and why.
        self.end = 0
        self.end_reason = LENGTH
        # Fails when it has this many, by fault injection.
        self.fails_at: int | None = None
        self.cached_tokens = 0
        self.arrival_ns = time.monotonic_ns()
        self.start_ns = self.ready_ns = self.first_token_ns = 0
        self.admission_due = self.terminal_due = False
        self.finish: pb.SequenceFinish | None = None
        self.error: pb.HandleError | None = None
        self.deadline: asyncio.TimerHandle | None = None

    @property
    def logprobs_to(self) -> int:
        """End of the positions that are reported and computed by now."""
        if not self.first_token_ns:
            return 0
        return self.prompt_len + (self.num_output if self.submit.logprobs.output else 0)

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None


class MockEngine:
    """Waiting and running sequences, the clock of steps, and the faults to inject.

    `step_s` may be changed at any time; a hung engine makes no steps but its worker stays up.
    Prefills run one after the other at `prefill_tokens_per_s`, beside the decode steps.
    """

    def __init__(
        self,
        *,
        cycle: TokenCycle,
        cache: MockCache,
        vocab_size: int,
        context_length: int,
        page_size: int,
        eos_token_ids: Sequence[int],
        step_s: float,
        prefill_tokens_per_s: float,
        max_running: int,
        fail_every_nth: int | None = None,
        on_tokens: Callable[[int], None] = lambda total: None,
    ) -> None:
        self.cycle = cycle
        self.cache = cache
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.page_size = page_size
        self.step_s = step_s
        self.prefill_tokens_per_s = prefill_tokens_per_s
        self.max_running = max_running
        self.step_number = 0
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        # Live sequences by reservation, and who wants to know when that changes.
        self.reservations: dict[int, int] = {}
        self.on_reservation: list[Callable[[int, bool], None]] = []
        self._eos = frozenset(eos_token_ids)
        self._fail_every_nth = fail_every_nth
        self._on_tokens = on_tokens
        self._num_submitted = 0
        self._waiting: deque[MockSequence] = deque()
        self._prefilling: deque[MockSequence] = deque()
        self._running: dict[MockSequence, None] = {}
        self._prefill_free_ns = 0
        self._work = asyncio.Event()
        self._not_hung = asyncio.Event()
        self._not_hung.set()

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._prefilling or self._waiting)

    @property
    def num_context_tokens(self) -> int:
        """Tokens held by running sequences."""
        return sum(seq.prompt_len + seq.num_output for seq in self._running)

    @property
    def num_waiting_uncached_tokens(self) -> int:
        """Prompt tokens that are still to be prefilled."""
        return sum(seq.num_ids - seq.cached_tokens for seq in (*self._prefilling, *self._waiting))

    def hang(self) -> None:
        """Make no more steps, with everything else alive."""
        self._not_hung.clear()

    def unhang(self) -> None:
        self._not_hung.set()

    def submit(
        self, submit: pb.Submit, token_ids: Sequence[int], handle: int, reader: Reader
    ) -> MockSequence:
        """Queue one sequence. Raises InvalidRequestError naming what is wrong."""
        self._check(submit, token_ids)
        seq = MockSequence(submit, handle, reader)
        prompt = token_ids[: submit.prompt_len]
        seq.phase = self.cycle.phase(prompt, submit.choice_index)
        if submit.logprobs.HasField("prompt_start"):
            seq.prompt_ids = list(prompt)
        seq.hashes = prefix_hashes(token_ids, self.page_size, submit.namespace)
        self._set_end(seq)
        self._num_submitted += 1
        if self._fail_every_nth and self._num_submitted % self._fail_every_nth == 0:
            seq.fails_at = (seq.num_output + seq.end + 1) // 2
        if submit.HasField("remaining"):
            seq.deadline = asyncio.get_running_loop().call_later(
                submit.remaining.ToTimedelta().total_seconds(), self._expire, seq
            )
        self._waiting.append(seq)
        self._count_reservation(submit.reservation_id, 1)
        self._start_waiting()
        self._work.set()
        return seq

    def cancel(self, seq: MockSequence) -> None:
        """End a sequence as cancelled. Idempotent."""
        if not seq.ended:
            self._finish(seq, CANCELLED)

    def fail(self, seq: MockSequence, code: int, message: str) -> None:
        """End a sequence with an error of its own. Idempotent."""
        if not seq.ended:
            seq.error = pb.HandleError(handle=seq.handle, code=code, message=message)
            self._release(seq)

    async def run(self) -> None:
        """Make steps while there is work, until cancelled."""
        next_step = time.monotonic()
        while True:
            if not self.busy:
                self._work.clear()
                await self._work.wait()
                next_step = time.monotonic()
            next_step = max(next_step + self.step_s, time.monotonic())
            await asyncio.sleep(next_step - time.monotonic())
            await self._not_hung.wait()
            self.step()

    def step(self) -> None:
        """One forward pass: admissions, one token for each running sequence, ends."""
        self.step_number += 1
        self._admit()
        readers = set()
        ended = []
        self.num_output_tokens += len(self._running)
        for seq in self._running:
            if seq.num_output < seq.end:
                seq.num_output += 1
            else:
                self.num_output_tokens -= 1
            readers.add(seq.reader)
            if seq.num_output >= seq.end or seq.num_output == seq.fails_at:
                ended.append(seq)
        for seq in ended:
            if seq.num_output == seq.fails_at:
                self.fail(seq, InternalError().code, "injected fault")
            else:
                self._finish(seq, seq.end_reason)
        for reader in readers:
            reader.wake()
        self._on_tokens(self.num_output_tokens)

    def _expire(self, seq: MockSequence) -> None:
        self.fail(seq, DeadlineError().code, "the sequence's time passed")

    def _start_waiting(self) -> None:
        """Start the prefills there is room for."""
        now = time.monotonic_ns()
        while self._waiting and len(self._running) + len(self._prefilling) < self.max_running:
            seq = self._waiting.popleft()
            self._start_prefill(seq, now)
            self._prefilling.append(seq)

    def _admit(self) -> None:
        """Let sequences whose prefill is done take part in this step."""
        self._start_waiting()
        now = time.monotonic_ns()
        while self._prefilling and self._prefilling[0].ready_ns <= now:
            seq = self._prefilling.popleft()
            self._running[seq] = None
            seq.first_token_ns = now

    def _start_prefill(self, seq: MockSequence, now: int) -> None:
        seq.start_ns = now
        # At least the last token is computed, so a match never covers it.
        matchable = (seq.num_ids - 1) // self.page_size
        seq.cached_tokens = min(self.cache.use(seq.hashes), matchable) * self.page_size
        seq.admission_due = True
        self.num_prompt_tokens += seq.num_ids
        self.num_cached_tokens += seq.cached_tokens
        prefill_s = (seq.num_ids - seq.cached_tokens) / self.prefill_tokens_per_s
        seq.ready_ns = max(now, self._prefill_free_ns) + int(prefill_s * 1e9)
        self._prefill_free_ns = seq.ready_ns
        seq.reader.wake()

    def _finish(self, seq: MockSequence, reason: finish_reason_pb2.FinishReason.ValueType) -> None:
        now = time.monotonic_ns()
        start = seq.start_ns or now
        first = seq.first_token_ns or now
        seq.finish = pb.SequenceFinish(
            handle=seq.handle,
            reason=reason,
            num_output_tokens=seq.num_output,
            cached_tokens=min(seq.cached_tokens, seq.prompt_len),
            queue_ns=start - seq.arrival_ns,
            prefill_ns=first - start,
            decode_ns=now - first,
        )
        if reason == STOP:
            last = self.cycle.output(seq.phase, seq.num_output - 1, seq.num_output)
            seq.finish.matched_token_id = last[0]
        self._release(seq)

    def _release(self, seq: MockSequence) -> None:
        seq.terminal_due = True
        if seq in self._running:
            del self._running[seq]
        elif seq in self._prefilling:
            self._prefilling.remove(seq)
        elif seq in self._waiting:
            self._waiting.remove(seq)
        if seq.deadline is not None:
            seq.deadline.cancel()
        self._count_reservation(seq.submit.reservation_id, -1)
        seq.reader.wake()

    def _count_reservation(self, reservation_id: int, change: int) -> None:
        if not reservation_id:
            return
        before = self.reservations.get(reservation_id, 0)
        after = before + change
        if after:
            self.reservations[reservation_id] = after
        else:
            del self.reservations[reservation_id]
        if not before or not after:
            for notify in self.on_reservation:
                notify(reservation_id, after > 0)

    def _set_end(self, seq: MockSequence) -> None:
        """How long the output gets is known from the start."""
        sampling = seq.submit.sampling
        room = self.context_length - seq.prompt_len
        limit = sampling.max_new_tokens if sampling.HasField("max_new_tokens") else room
        seq.end = max(min(limit, room), seq.num_output)
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops |= self._eos
        if not stops.intersection(self.cycle.ids):
            return
        first = max(seq.num_output, sampling.min_new_tokens)
        last = min(seq.end, first + len(self.cycle.ids))
        for number, token in enumerate(self.cycle.output(seq.phase, first, last), first):
            if token in stops:
                seq.end, seq.end_reason = number + 1, STOP
                return

    def _check(self, submit: pb.Submit, token_ids: Sequence[int]) -> None:
        if not 1 <= submit.prompt_len <= submit.num_token_ids == len(token_ids):
            raise InvalidRequestError(
                f"prompt_len {submit.prompt_len}, num_token_ids {submit.num_token_ids} and "
                f"{len(token_ids)} ids do not fit together",
                "prompt_len",
            )
        if submit.num_token_ids > self.context_length or submit.prompt_len == self.context_length:
            raise InvalidRequestError(
                f"{submit.num_token_ids} tokens exceed the context length of {self.context_length}",
                "num_token_ids",
            )
        if max(token_ids) >= self.vocab_size:
            raise InvalidRequestError(
                f"token ids must be below {self.vocab_size}, got {max(token_ids)}", "token_ids"
            )
        constraint = submit.sampling.WhichOneof("constraint")
        if constraint is not None:
            raise InvalidRequestError(f"{constraint} is not supported yet", constraint)


def handle_error(handle: int, error: RhizomeError) -> pb.HandleError:
    """The entry that ends a handle that was refused."""
    return pb.HandleError(handle=handle, code=error.code, message=error.message)
