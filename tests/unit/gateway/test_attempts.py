import pytest

from services.common.errors import (
    InternalError,
    OverloadedError,
    SessionBrokenError,
    UnavailableError,
)
from services.gateway.attempts import Attempts

DEATH = SessionBrokenError("the engine failed")


def test_the_third_death_is_final_whatever_came_between() -> None:
    attempts = Attempts()
    attempts.give_up_on("a", DEATH)
    attempts.give_up_on("b", UnavailableError("draining"))
    attempts.give_up_on("c", DEATH)
    assert (attempts.number, attempts.num_losses) == (3, 2)
    assert attempts.excluded_worker_ids == ["a", "b", "c"]
    with pytest.raises(InternalError, match="3 workers in turn died"):
        attempts.give_up_on("d", DEATH)


def test_refusals_are_no_deaths() -> None:
    attempts = Attempts()
    for name in "abc":
        attempts.give_up_on(name, UnavailableError("draining"))
    assert attempts.num_losses == 0
    with pytest.raises(InternalError, match="4 workers in turn gave the request up: draining"):
        attempts.give_up_on("d", UnavailableError("draining"))


def test_workers_that_are_full_stay_an_overload() -> None:
    attempts = Attempts()
    for name in "abc":
        attempts.give_up_on(name, OverloadedError("full"))
    with pytest.raises(OverloadedError):
        attempts.give_up_on("d", OverloadedError("full"))
