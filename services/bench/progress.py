"""A progress bar on standard error, drawn on terminals only."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 30


class ProgressBar:
    """Owns one line of the terminal until `close`."""

    def __init__(
        self, what: str, total: int, *, is_disabled: bool = False, stream: TextIO = sys.stderr
    ) -> None:
        self._what = what
        self._total = total
        self._stream = stream
        self._is_drawn = stream.isatty() and not is_disabled
        self._started_s = time.monotonic()

    def update(self, done: int) -> None:
        """Draw it with `done` of the total."""
        if not self._is_drawn:
            return
        filled = _WIDTH * done // max(1, self._total)
        elapsed_s = time.monotonic() - self._started_s
        bar = "#" * filled + "-" * (_WIDTH - filled)
        self._stream.write(f"\r{self._what} [{bar}] {done}/{self._total} {elapsed_s:.0f} s ")
        self._stream.flush()

    def close(self) -> None:
        """Leave the line as it is."""
        if self._is_drawn:
            self._stream.write("\n")
