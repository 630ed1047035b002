import pytest

from services.scheduler.drain import DrainRate


def _work_off(rate: DrainRate, start: float, count: int, step_s: float, workers: int) -> float:
    now = start
    rate.observe(now, num_waiting=5, num_workers=workers)
    for _ in range(count):
        now += step_s
        rate.observe(now, num_waiting=5, num_workers=workers)
        rate.note_placed(100.0)
    return now


def test_nothing_is_predicted_before_enough_was_seen() -> None:
    rate = DrainRate()
    _work_off(rate, 0.0, 7, 1.0, 1)
    assert rate.seconds_for(100.0, 1) is None


def test_the_rate_scales_with_the_workers() -> None:
    rate = DrainRate()
    _work_off(rate, 0.0, 40, 0.5, 2)
    assert rate.per_worker == pytest.approx(100.0)
    assert rate.seconds_for(1000.0, 2) == pytest.approx(5.0)
    assert rate.seconds_for(1000.0, 4) == pytest.approx(2.5)
    assert rate.seconds_for(1000.0, 0) is None


def test_time_without_a_backlog_does_not_count() -> None:
    rate = DrainRate()
    now = _work_off(rate, 0.0, 20, 1.0, 1)
    rate.observe(now, num_waiting=0, num_workers=1)
    _work_off(rate, now + 0.9, 20, 1.0, 1)
    assert rate.per_worker == pytest.approx(100.0)


def test_a_new_backlog_is_not_judged_by_the_end_of_an_old_one() -> None:
    """A burst was refused because the last of the one before had waited for long answers."""
    rate = DrainRate()
    now = _work_off(rate, 0.0, 20, 30.0, 1)
    rate.observe(now, num_waiting=0, num_workers=1)
    rate.observe(now + 3.0, num_waiting=200, num_workers=1)
    assert rate.seconds_for(20_000.0, 1) is None
    _work_off(rate, now + 3.0, 20, 0.1, 1)
    assert rate.per_worker == pytest.approx(1000.0)


def test_the_last_placements_count() -> None:
    rate = DrainRate()
    now = _work_off(rate, 0.0, 100, 1.0, 1)
    _work_off(rate, now, 64, 4.0, 1)
    assert rate.per_worker == pytest.approx(25.0)


def test_a_backlog_that_stands_still_lowers_the_rate() -> None:
    rate = DrainRate()
    now = _work_off(rate, 0.0, 64, 1.0, 1)
    rate.observe(now + 64.0, num_waiting=5, num_workers=1)
    assert rate.per_worker == pytest.approx(50.0)
