import gc

import pytest

from services.worker.engine.loop import EngineLoop, build_loop
from services.worker.engine.messages import (
    FlushCache,
    ProfileState,
    StartProfile,
    StepOutput,
    Stop,
    StopProfile,
)
from services.worker.engine.options import EnginePlan
from tests.fakes.engine_driver import EngineDriver, ListInbox, ListOutbox, make_request
from tests.fakes.fake_runner import FakeRunner

PROMPT = list(range(10))


class ScriptedInbox(ListInbox):
    """Hands out one scripted list of messages a call; a Stop after the last."""

    def __init__(self, *script) -> None:
        super().__init__()
        self._script = list(script)

    def receive(self, block, timeout_s=None):
        self.calls.append((block, timeout_s))
        return self._script.pop(0) if self._script else [Stop()]


class BrokenRunner(FakeRunner):
    """Fails in its third forward pass."""

    def forward(self, plan) -> None:
        if plan.step_number == 3:
            raise RuntimeError("device lost")
        super().forward(plan)


def scripted_loop(engine: EngineDriver, *script) -> tuple[EngineLoop, ScriptedInbox]:
    inbox = ScriptedInbox(*script)
    loop = EngineLoop(
        runner=engine.runner, scheduler=engine.scheduler, inbox=inbox, outbox=engine.outbox
    )
    return loop, inbox


def all_errors(outputs: list[StepOutput]) -> list[tuple[int, int]]:
    return [(error.key, error.code) for output in outputs for error in output.errors]


def test_every_step_is_published_even_without_tokens():
    engine = EngineDriver(max_step_tokens=4)
    engine.send(make_request(1, PROMPT, max_new_tokens=2))
    engine.run()
    assert [output.step_number for output in engine.outbox.outputs] == [1, 2, 3, 4]
    assert [len(output.token_ids) for output in engine.outbox.outputs] == [0, 0, 1, 1]


def test_with_two_in_flight_a_result_is_read_one_step_later():
    engine = EngineDriver(num_in_flight=2)
    engine.send(make_request(1, PROMPT, max_new_tokens=3))
    engine.step()
    assert engine.runner.num_steps == 1
    assert engine.records[1].token_ids == []
    engine.step()
    assert engine.runner.num_steps == 2
    assert len(engine.records[1].token_ids) == 1
    engine.run()
    assert len(engine.records[1].token_ids) == 3


def test_the_loop_waits_only_while_it_is_idle():
    engine = EngineDriver()
    loop, inbox = scripted_loop(engine, [make_request(1, PROMPT, max_new_tokens=2)], [], [])
    for _ in range(3):
        loop.step()
    assert [block for block, _ in inbox.calls] == [True, False, True]


def test_idle_upkeep_happens_once_in_each_idle_time():
    engine = EngineDriver()
    request = make_request(1, PROMPT, max_new_tokens=1)
    loop, inbox = scripted_loop(engine, [], [], [request], [], [])
    upkept = []
    for _ in range(5):
        loop.step()
        upkept.append(loop._was_upkept)
    # Upkeep after the first call, work after the third: the fourth is due for upkeep again.
    assert upkept == [True, True, False, True, True]
    assert all(block and timeout_s is not None for block, timeout_s in inbox.calls)


def test_an_idle_loop_asks_its_runner_whether_it_still_works():
    engine = EngineDriver()
    request = make_request(1, PROMPT, max_new_tokens=1)
    loop, _ = scripted_loop(engine, [], [], [request], [], [], [])
    for _ in range(5):
        loop.step()
    assert engine.runner.num_checks == 4
    engine.runner.failure = RuntimeError("a rank is gone")
    with pytest.raises(RuntimeError, match="a rank is gone"):
        loop.run()


def test_upkeep_finds_a_leak():
    engine = EngineDriver()
    engine.scheduler._cache.allocate(1)
    loop, _ = scripted_loop(engine, [])
    with pytest.raises(AssertionError, match="pages leaked: 1"):
        loop.step()


def test_stop_fails_what_is_live_with_a_retryable_status():
    engine = EngineDriver()
    requests = [make_request(key, PROMPT, max_new_tokens=50) for key in (1, 2)]
    loop, _ = scripted_loop(engine, requests, [], [Stop()])
    loop.run()
    assert sorted(all_errors(engine.outbox.outputs)) == [(1, 14), (2, 14)]
    assert engine.scheduler.num_live == 0


def test_an_exception_fails_what_is_live_and_is_raised_again(caplog):
    engine = EngineDriver()
    runner = BrokenRunner(
        num_slots=8,
        num_pages=64,
        page_size=4,
        context_length=128,
        vocab_size=50,
        max_step_tokens=32,
    )
    inbox = ScriptedInbox([make_request(1, PROMPT, max_new_tokens=50)], [], [], [])
    loop = EngineLoop(runner=runner, scheduler=engine.scheduler, inbox=inbox, outbox=engine.outbox)
    with pytest.raises(RuntimeError, match="device lost"):
        loop.run()
    assert all_errors(engine.outbox.outputs) == [(1, 10)]
    assert "event=engine_step_failed live=1" in caplog.text


def test_the_collector_is_off_while_the_loop_runs():
    engine = EngineDriver()
    seen = []

    class WatchingInbox(ScriptedInbox):
        def receive(self, block, timeout_s=None):
            seen.append(gc.isenabled())
            return super().receive(block, timeout_s)

    loop = EngineLoop(
        runner=engine.runner,
        scheduler=engine.scheduler,
        inbox=WatchingInbox(),
        outbox=engine.outbox,
    )
    loop.run()
    assert seen == [False]
    assert gc.isenabled()


def test_flushing_says_how_many_pages_went():
    engine = EngineDriver(num_pages=64)
    engine.send(make_request(1, PROMPT, max_new_tokens=3))
    engine.run()
    engine.send(FlushCache())
    engine.step()
    last = engine.outbox.outputs[-1]
    # 10 prompt and 2 computed output tokens.
    assert last.flushed_pages == 3
    assert last.load.num_free_pages == 64
    engine.send(FlushCache())
    engine.step()
    assert engine.outbox.outputs[-1].flushed_pages == 0


def test_flushing_keeps_the_pages_of_running_sequences():
    engine = EngineDriver()
    request = make_request(1, PROMPT, max_new_tokens=20)
    engine.send(request)
    engine.step(3)
    engine.send(FlushCache())
    engine.run()
    assert engine.records[1].token_ids == engine.expected(request)[0]


def test_a_loop_is_built_from_the_engines_plan():
    plan = EnginePlan(
        device="cpu",
        dtype="float32",
        attention_backend="torch",
        kv_cache_dtype="float32",
        page_size=4,
        num_pages=16,
        context_length=40,
        vocab_size=50,
        eos_token_ids=(1,),
        max_running_sequences=2,
        max_step_tokens=8,
        pair_work=1e-4,
        tp_size=1,
    )
    runner = FakeRunner(
        num_slots=2,
        num_pages=16,
        page_size=4,
        context_length=40,
        vocab_size=50,
        max_step_tokens=8,
        num_in_flight=2,
    )
    outbox = ListOutbox()
    inbox = ScriptedInbox([make_request(1, PROMPT, max_new_tokens=4, ignore_eos=True)], *[[]] * 9)
    build_loop(runner, plan, inbox, outbox).run()
    assert [finish.reason for output in outbox.outputs for finish in output.finishes] == ["length"]


class CountingRecorder:
    """Counts the steps and turns it is told of while it records."""

    def __init__(self) -> None:
        self.is_recording = False
        self.steps: list[int] = []
        self.num_turns = 0

    def start(self, message):
        self.is_recording = True
        return ProfileState()

    def begin_step(self, plan) -> None:
        if self.is_recording:
            self.steps.append(plan.step_number)

    def end_turn(self) -> None:
        self.num_turns += self.is_recording

    def stop(self):
        self.is_recording = False
        return ProfileState(trace_path="here")


def test_without_a_recorder_profiles_are_refused_and_requests_go_on():
    engine = EngineDriver()
    loop, _ = scripted_loop(
        engine, [StartProfile()], [make_request(1, PROMPT, max_new_tokens=2)], [StopProfile()]
    )
    loop.run()
    states = [output for output in engine.outbox.outputs if isinstance(output, ProfileState)]
    assert [state.is_refusal for state in states] == [True, True]
    assert all("--profile-dir" in state.error for state in states)
    assert any(
        output.token_ids for output in engine.outbox.outputs if isinstance(output, StepOutput)
    )


def test_a_recorder_sees_the_steps_between_start_and_stop():
    engine = EngineDriver()
    recorder = CountingRecorder()
    inbox = ScriptedInbox(
        [make_request(1, PROMPT, max_new_tokens=8)], [StartProfile()], [], [StopProfile()]
    )
    loop = EngineLoop(
        runner=engine.runner,
        scheduler=engine.scheduler,
        inbox=inbox,
        outbox=engine.outbox,
        recorder=recorder,
    )
    loop.run()
    assert recorder.steps == [2, 3]
    assert recorder.num_turns == 2
    answers = [output for output in engine.outbox.outputs if isinstance(output, ProfileState)]
    assert [answer.trace_path for answer in answers] == ["", "here"]
