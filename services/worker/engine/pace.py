"""When to issue the next step: late enough to take in what arrives, early enough to leave no gap.

With two steps in flight, a request that arrives while step k runs waits for k, and for k+1 if
that was issued already. Issuing k+1 only when k is about to end spares it that second wait and
costs the device nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# A result that came without waiting was there for an unknown time.
_WAITED_NS = 100_000
# Share of the newest observation in a running mean.
_WEIGHT = 0.3
# The next step is issued this long before the running one should end, besides the host's own time.
_MARGIN_NS = 700_000
_HOST_FACTOR = 1.5
_TOKEN_QUANTUM = 32


@dataclass(frozen=True, slots=True)
class _Issued:
    kind: tuple[int, int]
    issued_ns: int


class StepPace:
    """Learns how long steps take on the device and on the host.

    Steps of like numbers of tokens and rows are taken to last alike; a kind that was not seen yet
    is never waited for. Times are of one monotonic clock, in nanoseconds.
    """

    def __init__(self) -> None:
        self._in_flight: deque[_Issued] = deque()
        self._durations: dict[tuple[int, int], float] = {}
        self._host_ns = 0.0
        # When the newest finished step ended; None where that is not known.
        self._last_end_ns: int | None = None

    def issued(self, num_tokens: int, num_rows: int, began_ns: int, now_ns: int) -> None:
        """A step was planned and issued between these times."""
        kind = (-(-num_tokens // _TOKEN_QUANTUM), -(-num_rows // _TOKEN_QUANTUM))
        self._in_flight.append(_Issued(kind, now_ns))
        host_ns = now_ns - began_ns
        # Rises at once: a step issued late leaves the device idle.
        self._host_ns = max(host_ns, self._host_ns + _WEIGHT * (host_ns - self._host_ns))

    def ended(self, asked_ns: int, now_ns: int) -> None:
        """The oldest step's result was asked for and had between these times."""
        step = self._in_flight.popleft()
        started_ns = self._start_of(step)
        if now_ns - asked_ns < _WAITED_NS:
            self._last_end_ns = None
            return
        self._last_end_ns = now_ns
        if started_ns is None:
            return
        duration = float(now_ns - started_ns)
        known = self._durations.get(step.kind, duration)
        # Falls at once, for the same reason.
        self._durations[step.kind] = min(duration, known + _WEIGHT * (duration - known))

    def wait_ns(self, now_ns: int) -> int:
        """How long the next step need not be issued yet; 0 for no time at all."""
        if len(self._in_flight) != 1:
            return 0
        step = self._in_flight[0]
        started_ns, duration = self._start_of(step), self._durations.get(step.kind)
        if started_ns is None or duration is None:
            return 0
        due_ns = started_ns + duration - _HOST_FACTOR * self._host_ns - _MARGIN_NS
        return max(0, int(due_ns) - now_ns)

    def idle(self) -> None:
        """Nothing is in flight: the next step starts when it is issued."""
        self._last_end_ns = 0

    def _start_of(self, step: _Issued) -> int | None:
        if self._last_end_ns is None:
            return None
        return max(step.issued_ns, self._last_end_ns)
