"""The progress bar: for terminals alone."""

import io

from services.worker.engine.progress import ProgressBar


class Terminal(io.StringIO):
    """Text that claims to be looked at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_that_fills() -> None:
    screen = Terminal()
    bar = ProgressBar(screen)
    for fraction in (0.0, 0.5, 0.5, 1.0):
        bar.show(fraction, "weights")
    frames = screen.getvalue().split("\r")[1:]
    assert [frame.count("#") for frame in frames] == [0, 20, 40]
    assert frames[-1].endswith("100%\n")


def test_a_log_sees_nothing() -> None:
    log = io.StringIO()
    ProgressBar(log).show(0.5, "weights")
    assert log.getvalue() == ""
