from services.scheduler.sessions import SessionHomes


def test_the_newest_home_counts_and_the_longest_unused_is_forgotten() -> None:
    homes = SessionHomes(max_sessions=2)
    homes.note(("tenant", "one"), "a")
    homes.note(("tenant", "two"), "b")
    homes.note(("tenant", "one"), "c")
    homes.note(("other", "one"), "d")
    assert homes.find(("tenant", "one")) == "c"
    assert homes.find(("tenant", "two")) is None
    assert homes.find(("other", "one")) == "d"


def test_a_request_outside_a_session_has_no_home() -> None:
    homes = SessionHomes()
    homes.note(None, "a")
    assert homes.find(None) is None
