"""Virtual time: actions in the order of their times; nobody sleeps."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class VirtualClock:
    """Owns the time and what is still to happen.

    Invariant: time never goes back, and actions of one moment run in the order in which they were
    asked for, so a run is a function of its inputs. Times are nanoseconds from the start.
    """

    def __init__(self) -> None:
        self.now_ns = 0
        self._actions: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = count()

    @property
    def now_s(self) -> float:
        return self.now_ns / 1e9

    def after(self, delay_ns: float, action: Callable[[], None]) -> None:
        """Run `action` so much later."""
        self.at(self.now_ns + int(delay_ns), action)

    def at(self, time_ns: int, action: Callable[[], None]) -> None:
        """Run `action` then, or now if that has passed."""
        heapq.heappush(self._actions, (max(time_ns, self.now_ns), next(self._numbers), action))

    def run(self, until: Callable[[], bool]) -> None:
        """Run actions until `until()` is true. Raises RuntimeError when none are left before."""
        while not until():
            if not self._actions:
                raise RuntimeError("nothing is left to happen, and the run has not ended")
            self.now_ns, _, action = heapq.heappop(self._actions)
            action()
