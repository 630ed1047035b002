"""Which reservations are told to whom, and how often."""

from services.worker.reservations import ReservationBook


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_registration_hears_of_each_reservation_once() -> None:
    book = ReservationBook(Clock())
    feeds = [book.subscribe(), book.subscribe()]
    book.open(7)
    book.admit(7)
    for feed in feeds:
        assert feed.take() == ([7], [])
        assert feed.take() == ([], [])
    book.close(7)
    for feed in feeds:
        assert feed.take() == ([], [7])
    assert not len(book)


def test_a_reservation_of_three_choices_is_admitted_with_the_first_and_ends_with_the_last() -> None:
    book = ReservationBook(Clock())
    feed = book.subscribe()
    for _ in range(3):
        book.open(7)
    book.admit(7)
    book.admit(7)
    book.close(7)
    book.close(7)
    assert feed.take() == ([7], [])
    book.close(7)
    assert feed.take() == ([], [7])


def test_a_refused_choice_does_not_end_the_others() -> None:
    book = ReservationBook(Clock())
    feed = book.subscribe()
    book.open(7)
    book.open(7)
    book.close(7)
    assert feed.take() == ([], [])
    assert len(book) == 1


def test_a_new_registration_hears_of_what_lives_and_of_what_ended_lately() -> None:
    clock = Clock()
    book = ReservationBook(clock)
    for reservation_id in (1, 2, 3):
        book.open(reservation_id)
        book.admit(reservation_id)
    book.close(1)
    clock.now += 60
    book.close(2)
    assert book.subscribe().take() == ([3], [2])


def test_a_registration_that_ended_hears_nothing_more() -> None:
    book = ReservationBook(Clock())
    feed = book.subscribe()
    book.unsubscribe(feed)
    book.open(1)
    book.admit(1)
    assert feed.take() == ([], [])


def test_reservation_zero_stands_for_none() -> None:
    book = ReservationBook(Clock())
    feed = book.subscribe()
    book.open(0)
    book.admit(0)
    book.close(0)
    assert feed.take() == ([], [])
    assert not len(book)
