"""In which order waiting sequences are admitted: `--schedule-policy`.

fcfs: by arrival. lpm: longest prefix match first (Zheng et al., arXiv 2312.07104, section 3), so
that what the cache holds is used before it is evicted; sequences that waited for too long go
first, whatever the cache has of them, so nobody starves. Higher priorities come before lower ones
and preempted sequences before others in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Literal

from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.batching.waiting import WaitingQueue

SchedulePolicy = Literal["lpm", "fcfs"]

# Sequences that lpm looks at, oldest first: bounds the host's time for a step.
_WINDOW = 512
# A sequence that has waited for this long is admitted by arrival.
MAX_WAIT_NS = 10_000_000_000

# Longer than any prefix.
_FIRST = 1 << 62

# Waiting sequences, how many tokens the cache has of one, the time -> in order of admission. The
# sequence just handed out may be removed from the queue meanwhile.
AdmissionOrder = Callable[[WaitingQueue, Callable[[Sequence], int], int], Iterable[Sequence]]


def admission_order(policy: SchedulePolicy) -> AdmissionOrder:
    """The order of that name."""
    return _longest_prefix_first if policy == "lpm" else _first_come_first_served


def _first_come_first_served(
    waiting: WaitingQueue, num_cached: Callable[[Sequence], int], now: int
) -> Iterable[Sequence]:
    return waiting


def _longest_prefix_first(
    waiting: WaitingQueue, num_cached: Callable[[Sequence], int], now: int
) -> Iterable[Sequence]:
    def rank(sequence: Sequence) -> tuple[int, int]:
        overdue = now - sequence.arrival_ns > MAX_WAIT_NS
        goes_first = overdue or sequence.num_preemptions > 0
        cached = _FIRST if goes_first else num_cached(sequence)
        return -sequence.request.priority, -cached

    # A stable sort: among equals, arrival decides.
    return sorted(islice(waiting, _WINDOW), key=rank)
