"""A progress bar for people who watch an engine load."""

from __future__ import annotations

from typing import TextIO

_WIDTH = 40


class ProgressBar:
    """Redraws one line of `stream`, and only where that is a terminal: logs say it elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_on = stream.isatty()
        self._last = ""

    def show(self, fraction: float, what: str) -> None:
        """So much is done; the line ends when it is all."""
        if not self._is_on:
            return
        full = int(fraction * _WIDTH)
        line = f"{what:<10.10} [{'#' * full}{' ' * (_WIDTH - full)}] {fraction:4.0%}"
        if line == self._last:
            return
        self._last = line
        self._stream.write(f"\r{line}" + ("\n" if fraction >= 1 else ""))
        self._stream.flush()
