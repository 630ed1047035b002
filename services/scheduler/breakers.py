"""Circuit breakers: a worker whose requests fail again and again gets none for a while.

M. Nygard, Release It!, chapter "Stability Patterns": closed, open, and half-open with one probe.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

# Failures in a row that open a breaker.
_THRESHOLD = 3
# One crash fails everything that ran: what comes so close together is one failure.
_SAME_FAILURE_S = 1.0
# How long it stays open: doubled by each further failure.
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_FORGET_AFTER_S = 600.0


class BreakerState(enum.Enum):
    """Half open lets one request through as a probe."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(slots=True)
class _Breaker:
    num_failures: int = 0
    failed_at: float = float("-inf")
    # None while it is closed. After that time it is half open: the next request is a probe.
    open_until: float | None = None

    @property
    def pause_s(self) -> float:
        doublings = min(self.num_failures - _THRESHOLD, 10)
        return float(min(_FIRST_PAUSE_S * 2**doublings, _LONGEST_PAUSE_S))


class BreakerBoard:
    """Breakers by worker id: a worker that comes back under a new epoch is the same machine.

    Only workers that failed since their last success have one.
    """

    def __init__(self) -> None:
        self._breakers: dict[str, _Breaker] = {}

    def note_failure(self, worker_id: str, now: float) -> bool:
        """A request failed for the worker's sake; False where that is part of the last failure."""
        breaker = self._breakers.setdefault(worker_id, _Breaker())
        is_new = now - breaker.failed_at >= _SAME_FAILURE_S
        breaker.failed_at = now
        if is_new:
            breaker.num_failures += 1
            if breaker.num_failures >= _THRESHOLD:
                breaker.open_until = now + breaker.pause_s
        return is_new

    def note_success(self, worker_id: str) -> None:
        """A request ended well there."""
        self._breakers.pop(worker_id, None)

    def note_placed(self, worker_id: str, now: float) -> None:
        """A half-open breaker lets one probe through; without word of it, another one later."""
        breaker = self._breakers.get(worker_id)
        if breaker is not None and breaker.open_until is not None:
            breaker.open_until = now + breaker.pause_s

    def is_open(self, worker_id: str, now: float) -> bool:
        """Whether the worker must not get a request now."""
        return self.state(worker_id, now) is BreakerState.OPEN

    def state(self, worker_id: str, now: float) -> BreakerState:
        """As others may see it."""
        breaker = self._breakers.get(worker_id)
        if breaker is None or breaker.open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < breaker.open_until else BreakerState.HALF_OPEN

    @property
    def worker_ids(self) -> list[str]:
        return list(self._breakers)

    def forget_old(self, now: float) -> None:
        """Drop those of workers that did not fail for long; they may be gone for good."""
        for worker_id, breaker in list(self._breakers.items()):
            if now - breaker.failed_at > _FORGET_AFTER_S:
                del self._breakers[worker_id]
