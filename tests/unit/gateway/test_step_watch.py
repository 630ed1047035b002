from rhizome.worker.v1.worker_service_pb2 import Heartbeat
from services.gateway.step_watch import StepWatch


def _hung_after(predicted_s: float = 0.0, busy: bool = True, has_others: bool = True) -> float:
    """Seconds of the same step until it counts as hung; 1000 for never."""
    watch, now = StepWatch(), 0.0
    beat = Heartbeat(
        engine_step_number=7, engine_busy=busy, predicted_step_ns=int(predicted_s * 1e9)
    )
    while now < 1000.0 and not watch.is_hung(beat, now, has_others):
        now += 0.5
    return now


def test_an_engine_hangs_after_two_seconds_or_ten_predicted_steps() -> None:
    assert _hung_after() == 2.5
    assert _hung_after(predicted_s=0.1) == 2.5
    assert _hung_after(predicted_s=1.0) == 10.5


def test_nobody_leaves_soon_who_has_nowhere_to_go() -> None:
    assert _hung_after(has_others=False) == 30.5


def test_an_idle_engine_never_hangs() -> None:
    assert _hung_after(busy=False) == 1000.0


def test_a_step_starts_the_time_again() -> None:
    watch = StepWatch()
    for step in range(100):
        assert not watch.is_hung(Heartbeat(engine_step_number=step, engine_busy=True), step, True)
