"""Random traffic against a real engine for a while, and what must hold after it.

SOAK_SECONDS in the environment sets how long; minutes find what seconds do not.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field

from services.worker.engine.batch import Runner
from services.worker.engine.batching.budget import GrowthEstimate
from services.worker.engine.batching.scheduler import BatchScheduler
from services.worker.engine.loop import EngineLoop
from services.worker.engine.messages import (
    Cancel,
    EngineInput,
    FlushCache,
    LogprobSpec,
    Request,
    SamplingParams,
    StepOutput,
)
from services.worker.engine.options import EnginePlan
from tests.fakes.engine_driver import HeldHashes, Record
from tests.fakes.step_driver import StepDriver

_MAX_LIVE = 40
_NUM_REFERENCES = 12
# What requests begin with, so that they share pages: none, one or three pages of 16.
_SHARED = ([], list(range(300, 316)), list(range(300, 348)), list(range(500, 548)))


def soak_seconds(default: float) -> float:
    """How long a soak lasts."""
    return float(os.environ.get("SOAK_SECONDS", str(default)))


@dataclass
class Soak:
    """An engine under traffic. Owns the loop, and a record of every sequence."""

    runner: Runner
    plan: EnginePlan
    random: random.Random
    inbox: list[EngineInput] = field(default_factory=list)
    requests: dict[int, Request] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    live: set[int] = field(default_factory=set)
    held: HeldHashes = field(default_factory=HeldHashes)
    newest: StepOutput | None = None

    def __post_init__(self) -> None:
        plan = self.plan
        self.scheduler = BatchScheduler(
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            context_length=plan.context_length,
            vocab_size=plan.vocab_size,
            eos_token_ids=plan.eos_token_ids,
            max_running_sequences=plan.max_running_sequences,
            max_step_tokens=plan.max_step_tokens,
            num_in_flight=self.runner.num_in_flight,
            policy=plan.schedule_policy,
            # Expects little, so that preemptions are frequent.
            growth=GrowthEstimate(initial=0.1),
        )
        self.loop = EngineLoop(
            runner=self.runner, scheduler=self.scheduler, inbox=self, outbox=self
        )

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        """As the loop's inbox: what traffic brought."""
        if block and timeout_s and not self.inbox:
            time.sleep(min(timeout_s, 0.001))
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, output: StepOutput) -> None:
        """As its outbox: sort the output by sequence."""
        self.newest = output
        self.held.apply(output.cache_events)
        position = 0
        for key, count in zip(output.keys, output.num_tokens, strict=True):
            assert not self.records[key].has_ended, "tokens after the end"
            self.records[key].token_ids += output.token_ids[position : position + count]
            position += count
        for key, rows in output.logprobs:
            self.records[key].logprobs.append(rows)
        for finish in output.finishes:
            assert not self.records[finish.key].has_ended, "ended twice"
            self.records[finish.key].finish = finish
            self.live.remove(finish.key)
        for error in output.errors:
            assert not self.records[error.key].has_ended, "ended twice"
            self.records[error.key].error = error
            self.live.remove(error.key)

    def run(self, seconds: float) -> None:
        """Traffic for so long, then until all is done."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if len(self.live) < _MAX_LIVE and self.random.random() < 0.3:
                self._submit()
            if self.live and self.random.random() < 0.05:
                key = self.random.choice(sorted(self.live))
                self.cancelled.add(key)
                self.inbox.append(Cancel([key]))
            if self.random.random() < 0.01:
                self.inbox.append(FlushCache())
            self.loop.step()
            if self.random.random() < 0.05:
                self.scheduler.check()
        while self.live or self.scheduler.num_issued:
            self.loop.step()

    def check(self) -> None:
        """Every sequence ended once and as it should, and nothing is held any more."""
        assert self.newest is not None, "an engine under traffic says something"
        assert self.newest.load.num_preemptions > 0, "the pool was not too small"
        assert self.newest.load.num_cached_tokens > 0, "nothing was shared"
        self.scheduler.check()
        self.inbox.append(FlushCache())
        self.loop.step()
        assert self.newest.load.num_free_pages == self.plan.num_pages, "a page leaked"
        assert self.held.parents == {}, "a page's event is missing"
        assert self.newest.load.num_running == self.newest.load.num_waiting == 0
        for key, request in self.requests.items():
            self._check_ending(request, self.records[key])

    def check_against_alone(self, runner: Runner, page_size: int) -> None:
        """Some sequences are what a roomy engine of the same kind gives each alone."""
        whole = [
            request
            for key, request in self.requests.items()
            if key not in self.cancelled and len(self.records[key].token_ids) > 1
        ]
        for request in self.random.sample(whole, min(_NUM_REFERENCES, len(whole))):
            tokens = self.records[request.key].token_ids
            driver = StepDriver(runner, page_size=page_size)
            alone = driver.start(
                request.token_ids, request.sampling, choice_index=request.choice_index
            )
            assert driver.generate([alone], len(tokens))[0] == tokens, request

    def _check_ending(self, request: Request, record: Record) -> None:
        assert record.error is None, record.error
        assert record.finish is not None, "a sequence is lost"
        tokens, reason = record.token_ids, record.finish.reason
        stops = set(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stops.update(self.plan.eos_token_ids)
        first = request.sampling.min_new_tokens
        assert not stops.intersection(tokens[first:-1]), "it went on after a stop id"
        assert not stops.intersection(tokens[:first]), "it stopped too early"
        if reason == "cancelled":
            assert request.key in self.cancelled
        elif reason == "stop":
            assert tokens[-1] in stops
        else:
            assert len(tokens) == request.sampling.max_new_tokens
        if request.logprobs.output:
            positions = [rows.start_position for rows in record.logprobs if rows.token_ids]
            assert positions == sorted(positions)

    def _submit(self) -> None:
        """A prompt, sometimes with several choices, sometimes with a priority."""
        rng = self.random
        shared = rng.choice(_SHARED)
        prompt = shared + [rng.randrange(300, 900) for _ in range(rng.randint(1, 40))]
        several = rng.choice([1, 1, 1, 3])
        sampling = self._sampling(several > 1)
        spec = LogprobSpec()
        if rng.random() < 0.2:
            start = rng.choice([None, 0, rng.randrange(len(prompt))])
            spec = LogprobSpec(output=True, num_top=rng.choice([0, 5]), prompt_start=start)
        priority, namespace = rng.choice([0, 0, 0, 1]), rng.choice(["", "", "other"])
        for choice in range(several):
            key = len(self.requests)
            self.requests[key] = request = Request(
                key=key,
                request_id=str(key),
                token_ids=prompt,
                prompt_len=len(prompt),
                sampling=sampling,
                logprobs=spec,
                choice_index=choice,
                priority=priority,
                namespace=namespace,
                arrival_ns=time.monotonic_ns(),
            )
            self.records[key] = Record()
            self.live.add(key)
            self.inbox.append(request)

    def _sampling(self, is_random: bool) -> SamplingParams:
        rng = self.random
        penalised = rng.random() < 0.4
        return SamplingParams(
            temperature=rng.choice([0.7, 1.3]) if is_random else rng.choice([0.0, 0.0, 0.8]),
            top_k=rng.choice([-1, 1, 20, 10**9]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.02]),
            repetition_penalty=1.2 if penalised else 1.0,
            frequency_penalty=rng.choice([0.0, 0.3]) if penalised else 0.0,
            presence_penalty=rng.choice([0.0, -0.3]) if penalised else 0.0,
            max_new_tokens=rng.randint(1, 60),
            min_new_tokens=rng.choice([0, 0, 1]),
            stop_token_ids=tuple(rng.sample(range(300, 900), 30)) if rng.random() < 0.4 else (),
            ignore_eos=rng.random() < 0.5,
            logit_bias=((rng.randrange(300, 900), 5.0),) if rng.random() < 0.2 else (),
            seed=rng.randrange(1000),
        )
