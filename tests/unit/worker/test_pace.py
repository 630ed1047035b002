"""When the loop issues steps, over a device whose time is simulated."""

from collections import deque

from services.worker.engine.loop import EngineLoop
from services.worker.engine.messages import EngineInput, Request
from services.worker.engine.pace import StepPace
from tests.fakes.engine_driver import EngineDriver, ListInbox, ManualClock, make_request
from tests.fakes.fake_runner import FakeRunner

MS = 1_000_000
STEP_MS, HOST_MS = 10, 1


class TimedRunner(FakeRunner):
    """Steps take STEP_MS on the device, one after another, and HOST_MS to issue."""

    def __init__(self, clock: ManualClock, **shape: int) -> None:
        super().__init__(**shape)
        self._clock = clock
        self._ends: deque[int] = deque()
        self._device_free_at = 0
        self.idle_ns = 0
        self.keys_by_step: list[int] = []

    def forward(self, plan) -> None:
        self._clock.now += HOST_MS * MS
        now = self._clock.now
        if self._ends:
            self.idle_ns += max(0, now - self._device_free_at)
        self._device_free_at = max(now, self._device_free_at) + STEP_MS * MS
        self._ends.append(self._device_free_at)
        self.keys_by_step.append(len(plan.slots))
        super().forward(plan)

    def result(self):
        self._clock.now = max(self._clock.now, self._ends.popleft())
        return super().result()


class TimedInbox(ListInbox):
    """Messages arrive at given times; waiting passes time."""

    def __init__(self, clock: ManualClock, arrivals: list[tuple[int, EngineInput]]) -> None:
        super().__init__()
        self._clock = clock
        self._arrivals = deque(arrivals)

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        if block and timeout_s is not None:
            until = self._clock.now + int(timeout_s * 1e9)
            if self._arrivals:
                until = min(until, max(self._clock.now, self._arrivals[0][0]))
            self._clock.now = until
        taken = []
        while self._arrivals and self._arrivals[0][0] <= self._clock.now:
            taken.append(self._arrivals.popleft()[1])
        return taken


def run(arrivals: list[tuple[int, Request]], num_steps: int) -> tuple[TimedRunner, EngineDriver]:
    engine = EngineDriver(num_in_flight=2)
    runner = TimedRunner(
        engine.clock,
        num_slots=8,
        num_pages=engine.num_pages,
        page_size=4,
        context_length=128,
        vocab_size=engine.vocab_size,
        max_step_tokens=32,
        num_in_flight=2,
    )
    loop = EngineLoop(
        runner=runner,
        scheduler=engine.scheduler,
        inbox=TimedInbox(engine.clock, [(at, message) for at, message in arrivals]),
        outbox=engine.outbox,
        clock=engine.clock,
    )
    for _ in range(num_steps):
        loop.step()
    return runner, engine


def test_a_request_that_comes_early_in_a_step_is_in_the_very_next_one() -> None:
    first = make_request(1, list(range(8)), max_new_tokens=60)
    # Step 10 runs from about 91 to 101 ms; without waiting, step 11 would be issued at its start.
    second = make_request(2, list(range(8)), max_new_tokens=10)
    runner, _ = run([(0, first), (94 * MS, second)], 20)
    assert runner.keys_by_step.index(2) == 10


def test_waiting_never_leaves_the_device_idle() -> None:
    arrivals = [
        (number * 37 * MS, make_request(number + 1, list(range(5 + number)), max_new_tokens=20))
        for number in range(8)
    ]
    runner, engine = run(arrivals, 60)
    assert len(runner.keys_by_step) > 40
    assert runner.idle_ns == 0
    assert len(engine.outbox.outputs) > 40


def test_a_host_as_slow_as_the_device_does_not_wait() -> None:
    pace = StepPace()
    pace.idle()
    now = 0
    for _ in range(10):
        pace.issued(1, 1, now, now + 2 * MS)
        now += 2 * MS
        assert pace.wait_ns(now) == 0
        pace.ended(now, now + MS)
        now += MS
