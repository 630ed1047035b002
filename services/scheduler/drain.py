"""How fast a pool works a queue off, learned from the queue itself."""

from __future__ import annotations

from collections import deque

# Placements of waiting requests that the estimate rests on, and the fewest that make one.
_WINDOW = 64
_MIN_PLACEMENTS = 8
# Without a backlog for longer than this, what was learned from the last one is forgotten.
_REMEMBERED_S = 1.0
# Less time than this says nothing about a rate.
_MIN_BUSY_WORKER_S = 0.2


class DrainRate:
    """Work placed in a worker-second, over the times in which requests waited.

    Work is in the unit of its caller (the service that waiting requests are expected to take).
    While nothing waits, a pool's pace is its clients', so that time does not count; after more than
    a moment of it the next backlog is another matter: of the last one, the end may have waited for
    long answers. With workers gone or come the rate scales with their number.
    """

    def __init__(self) -> None:
        self._busy_worker_s = 0.0
        self._work = 0.0
        # (busy worker-seconds, work) after each of the last placements.
        self._samples: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=_WINDOW + 1)
        self._seen_at = 0.0
        self._num_busy = 0
        # None while requests wait.
        self._empty_since: float | None = None

    def observe(self, now: float, *, num_waiting: int, num_workers: int) -> None:
        """What is so from now on; to be called whenever either changes, and now and then."""
        self._busy_worker_s += max(0.0, now - self._seen_at) * self._num_busy
        self._seen_at = now
        if not num_waiting:
            self._empty_since = now if self._empty_since is None else self._empty_since
        elif self._empty_since is not None:
            if now - self._empty_since > _REMEMBERED_S:
                self._samples.clear()
                self._samples.append((self._busy_worker_s, self._work))
            self._empty_since = None
        self._num_busy = num_workers if num_waiting else 0

    def note_placed(self, work: float) -> None:
        """A request that had waited was placed."""
        self._work += work
        self._samples.append((self._busy_worker_s, self._work))

    @property
    def per_worker(self) -> float | None:
        """Work a worker-second; None until enough was seen."""
        since, work = self._samples[0]
        busy_s = self._busy_worker_s - since
        if len(self._samples) <= _MIN_PLACEMENTS or busy_s < _MIN_BUSY_WORKER_S:
            return None
        return (self._work - work) / busy_s

    def seconds_for(self, work: float, num_workers: int) -> float | None:
        """Predicted time until so much work is placed; None where nothing can be said."""
        rate = self.per_worker
        if rate is None or rate <= 0 or num_workers == 0:
            return None
        return work / (rate * num_workers)
