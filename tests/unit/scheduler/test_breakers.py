import pytest

from services.scheduler.breakers import BreakerBoard, BreakerState


@pytest.fixture
def board() -> BreakerBoard:
    return BreakerBoard()


def _fail(board: BreakerBoard, times: list[float]) -> None:
    for time in times:
        board.note_failure("w", time)


def test_three_failures_in_a_row_open_it(board: BreakerBoard) -> None:
    _fail(board, [0.0, 2.0])
    assert not board.is_open("w", 2.0)
    _fail(board, [4.0])
    assert board.is_open("w", 4.0)
    assert not board.is_open("other", 4.0)


def test_what_one_crash_fails_counts_once(board: BreakerBoard) -> None:
    assert board.note_failure("w", 0.0)
    assert not any(board.note_failure("w", 0.01 * index) for index in range(60))
    assert not board.is_open("w", 0.6)


def test_a_success_closes_it_and_starts_the_count_again(board: BreakerBoard) -> None:
    _fail(board, [0.0, 2.0])
    board.note_success("w")
    _fail(board, [4.0, 6.0])
    assert not board.is_open("w", 6.0)


def test_half_open_lets_one_probe_through(board: BreakerBoard) -> None:
    _fail(board, [0.0, 2.0, 4.0])
    assert board.is_open("w", 4.9)
    assert not board.is_open("w", 5.0)
    board.note_placed("w", 5.0)
    assert board.is_open("w", 5.0)
    board.note_success("w")
    assert not board.is_open("w", 5.1)


def test_a_probe_without_word_is_followed_by_another(board: BreakerBoard) -> None:
    _fail(board, [0.0, 2.0, 4.0])
    board.note_placed("w", 5.0)
    assert board.is_open("w", 5.9)
    assert not board.is_open("w", 6.0)


def test_each_failed_probe_doubles_the_pause_up_to_a_bound(board: BreakerBoard) -> None:
    now = 4.0
    _fail(board, [0.0, 2.0, now])
    pauses = []
    for _ in range(8):
        pause = 0.0
        while board.is_open("w", now + pause):
            pause += 0.5
        pauses.append(pause)
        now += pause + 1.0
        board.note_placed("w", now)
        board.note_failure("w", now)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_old_failures_are_forgotten(board: BreakerBoard) -> None:
    _fail(board, [0.0, 2.0, 4.0])
    board.forget_old(500.0)
    assert board.worker_ids == ["w"]
    board.forget_old(605.0)
    assert board.worker_ids == []


def test_its_state_is_open_for_a_while_then_half_open_until_a_success(board: BreakerBoard) -> None:
    _fail(board, [0.0, 2.0])
    assert board.state("w", 2.0) is BreakerState.CLOSED
    _fail(board, [4.0])
    assert [board.state("w", now) for now in (4.9, 5.0)] == [
        BreakerState.OPEN,
        BreakerState.HALF_OPEN,
    ]
    board.note_success("w")
    assert board.state("w", 5.0) is BreakerState.CLOSED
