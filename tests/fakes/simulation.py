"""The real scheduler against a device that only takes time: what a policy costs on a workload.

The cost of a step is that of the 8B shape on one H100, from the figures to design by: reading the
weights bounds it from below, then every token costs its matrix products, every decoded token the
reading of its context, and every pair of a prefilled token with one before it its attention.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from services.worker.engine.batch import StepPlan, StepResult
from services.worker.engine.batching.scheduler import BatchScheduler
from services.worker.engine.messages import Request, SamplingParams

_WEIGHTS_NS = 5_000_000.0
_TOKEN_NS = 22_000.0
_CONTEXT_TOKEN_NS = 47.7
_PAIR_NS = 1.35
_HOST_NS = 300_000.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a workload; its prompt is `shared` ids that others share, then its own."""

    at_ns: int
    prompt_len: int
    output_len: int
    shared: int = 0
    group: int = 0


@dataclass(slots=True)
class Outcome:
    """What serving a workload took."""

    seconds: float
    num_steps: int
    num_preemptions: int
    # Tokens of rows with known ids, and those of them that were computed before.
    prefilled: int
    recomputed: int
    output_tokens: int
    # By request, in seconds.
    first_token: list[float] = field(default_factory=list)
    peak_running: int = 0

    def percentile(self, percent: float) -> float:
        """Of the times to the first token, in ms."""
        return float(np.percentile(self.first_token, percent)) * 1000


def step_ns(plan: StepPlan) -> float:
    """How long the device works on a step."""
    lengths, starts = plan.num_tokens.astype(np.float64), plan.start_positions.astype(np.float64)
    single = lengths == 1
    context = starts[single].sum()
    pairs = (lengths * (starts + lengths / 2))[~single].sum()
    products = max(_WEIGHTS_NS, len(plan.token_ids) * _TOKEN_NS)
    return products + context * _CONTEXT_TOKEN_NS + pairs * _PAIR_NS + _HOST_NS


def simulate(arrivals: list[Arrival], *, num_in_flight: int = 2, **settings: object) -> Outcome:
    """Serve `arrivals`, issuing a step as soon as fewer than `num_in_flight` are."""
    now = 0

    def clock() -> int:
        return now

    scheduler = BatchScheduler(
        eos_token_ids=(),
        vocab_size=2**31 - 1,
        num_in_flight=num_in_flight,
        clock=clock,
        **settings,  # type: ignore[arg-type]
    )
    pending = deque(sorted(enumerate(arrivals), key=lambda item: item[1].at_ns))
    ids = count(1_000_000)
    first: dict[int, float] = {}
    in_flight: deque[tuple[int, StepPlan]] = deque()
    outcome = Outcome(0.0, 0, 0, 0, 0, 0)
    device_free = 0
    while pending or scheduler.num_live or in_flight:
        while pending and pending[0][1].at_ns <= now:
            key, arrival = pending.popleft()
            scheduler.add(_request(key, arrival, ids))
        plan = scheduler.schedule() if len(in_flight) < num_in_flight else None
        if plan is not None:
            device_free = max(device_free, now) + int(step_ns(plan))
            in_flight.append((device_free, plan))
            outcome.num_steps += 1
            outcome.prefilled += int(plan.num_tokens[plan.num_tokens > 1].sum())
        if in_flight and (plan is None or len(in_flight) == num_in_flight):
            ended, oldest = in_flight.popleft()
            now = max(now, ended)
            num_sampled = len(oldest.sample_rows)
            scheduler.apply(
                StepResult(
                    step_number=oldest.step_number, token_ids=np.full(num_sampled, 7, np.int32)
                )
            )
            _take_output(scheduler, arrivals, first, outcome, now)
        elif plan is None and pending:
            now = max(now, pending[0][1].at_ns)
    scheduler.check()
    outcome.seconds = now / 1e9
    outcome.first_token = [first[key] for key in sorted(first)]
    unique = sum(arrival.prompt_len for arrival in arrivals)
    outcome.recomputed = outcome.prefilled - unique
    return outcome


def _take_output(
    scheduler: BatchScheduler,
    arrivals: list[Arrival],
    first: dict[int, float],
    outcome: Outcome,
    now: int,
) -> None:
    output = scheduler.take_output()
    if output is None:
        return
    assert not output.errors
    for key in output.keys:
        first.setdefault(key, (now - arrivals[key].at_ns) / 1e9)
    outcome.output_tokens += len(output.token_ids)
    outcome.num_preemptions = output.load.num_preemptions
    outcome.peak_running = max(outcome.peak_running, output.load.num_running)


def _request(key: int, arrival: Arrival, ids: count[int]) -> Request:
    shared = [arrival.group * 100_000 + index + 1 for index in range(arrival.shared)]
    own = [next(ids) for _ in range(arrival.prompt_len - arrival.shared)]
    return Request(
        key=key,
        request_id=str(key),
        token_ids=shared + own,
        prompt_len=arrival.prompt_len,
        arrival_ns=max(1, arrival.at_ns),
        sampling=SamplingParams(max_new_tokens=arrival.output_len, ignore_eos=True),
    )
