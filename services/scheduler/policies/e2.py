"""E2, exploit or explore, as Preble publishes it (arXiv 2407.00023, section 3.2, Algorithms 1, 2).

Exploit: where the longest cached part of a prompt is longer than the rest, its worker gets the
request. Explore otherwise: the least of L_i + M_i + P_i, which are the load that a worker was given
in the last H = 180 s (prefill of what it missed, and decoding), what the eviction for this prompt
would cost it, and the prefill of what it lacks. After that, three corrections: exploitation leaves
the heaviest worker while its load is beyond Th_bal of the lightest's; a prefix whose queueing time
doubles within H gets a further worker; prompts that mostly prefill are explored on workers that
mostly decode.

Times are those that workers fit and report. What the paper keeps in the router's own tree, the
cache index and the workers' eviction costs say here. An assignment is final, as in the paper: a
request that waits for room is not assigned again while its worker is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from services.scheduler.policy import Query
from services.scheduler.scorers.eviction import eviction_ns
from services.scheduler.views import WorkerView

WINDOW_S = 180.0
BALANCE_THRESHOLD = 1.5
# No correction before a worker has had so many requests on average.
MIN_REQUESTS_A_WORKER = 50
QUEUEING_GROWTH = 2.0
# Waits below this are no queueing, however much they grow.
_LEAST_QUEUEING_NS = 10e6


class _Assigned(NamedTuple):
    at_s: float
    key: tuple[str, int]
    worker_id: str
    prefill_ns: int
    decode_ns: int
    prefix: int | None


@dataclass(slots=True)
class _History:
    """What a worker was given within the window."""

    # Whole numbers, so that what is added and taken off again leaves nothing.
    prefill_ns: int = 0
    decode_ns: int = 0

    @property
    def load_ns(self) -> int:
        return self.prefill_ns + self.decode_ns


@dataclass(slots=True)
class _Waits:
    """Queueing times of one prefix on one worker: (time, ns), oldest first."""

    times: deque[tuple[float, float]] = field(default_factory=deque)

    def has_doubled(self, now_s: float) -> bool:
        """Whether the window's second half waited twice as long as its first."""
        half_ago = now_s - WINDOW_S / 2
        first = [wait for at_s, wait in self.times if at_s < half_ago]
        second = [wait for at_s, wait in self.times if at_s >= half_ago]
        if not first or not second:
            return False
        mean = sum(second) / len(second)
        return mean >= max(QUEUEING_GROWTH * sum(first) / len(first), _LEAST_QUEUEING_NS)


class E2:
    """A picker. Owns the assignments of the last H seconds; the rest is in the snapshot.

    Invariant: a worker's history is the sum of its assignments in the window.
    """

    def __init__(self) -> None:
        self._window: deque[_Assigned] = deque()
        self._worker_of: dict[tuple[str, int], str] = {}
        self._histories: dict[str, _History] = {}
        self._waits: dict[tuple[int, str], _Waits] = {}

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        self._forget(query.now_s)
        assigned = self._worker_of.get(query.request.key)
        for index, view in enumerate(workers):
            if view.worker_id == assigned:
                return index
        loads = [self._history(view).load_ns for view in workers]
        matched = [query.cached_tokens.get(view.worker_id, 0) for view in workers]
        longest = max(matched)
        if longest > query.request.num_prompt_tokens - longest:
            holders = [index for index, tokens in enumerate(matched) if tokens == longest]
            chosen = min(holders, key=lambda index: loads[index])
            chosen = self._corrected(query, workers, loads, chosen, longest)
        else:
            chosen = self._explore(query, workers, loads)
        self._note(query, workers[chosen], longest)
        return chosen

    def _corrected(
        self,
        query: Query,
        workers: Sequence[WorkerView],
        loads: Sequence[float],
        chosen: int,
        longest: int,
    ) -> int:
        """Where an exploiting request goes after load shifting and replication."""
        if len(self._window) < MIN_REQUESTS_A_WORKER * len(workers):
            return chosen
        lightest = min(range(len(workers)), key=lambda index: loads[index])
        if loads[chosen] == max(loads) and loads[chosen] > BALANCE_THRESHOLD * loads[lightest]:
            return lightest
        waits = self._waits.get(
            (_prefix(query, workers[chosen], longest), workers[chosen].worker_id)
        )
        if waits is not None and waits.has_doubled(query.now_s):
            waits.times.clear()
            return lightest
        return chosen

    def _explore(self, query: Query, workers: Sequence[WorkerView], loads: Sequence[float]) -> int:
        prefill = [_prefill_ns(query, view) for view in workers]
        costs = [
            load + eviction_ns(view, _missed(query, view)) + own
            for load, view, own in zip(loads, workers, prefill, strict=True)
        ]
        indices = list(range(len(workers)))
        if min(prefill) > max(_decode_ns(query, view) for view in workers):
            histories = [self._history(view) for view in workers]
            decoding = [
                index
                for index, history in enumerate(histories)
                if history.decode_ns > BALANCE_THRESHOLD * history.prefill_ns
            ]
            indices = decoding or indices
        return min(indices, key=lambda index: costs[index])

    def _note(self, query: Query, view: WorkerView, longest: int) -> None:
        prefix = _prefix(query, view, longest) if longest else None
        assigned = _Assigned(
            query.now_s,
            query.request.key,
            view.worker_id,
            int(_prefill_ns(query, view)),
            int(_decode_ns(query, view)),
            prefix,
        )
        self._window.append(assigned)
        self._worker_of[assigned.key] = view.worker_id
        history = self._history(view)
        history.prefill_ns += assigned.prefill_ns
        history.decode_ns += assigned.decode_ns
        if prefix is not None:
            waits = self._waits.setdefault((prefix, view.worker_id), _Waits())
            waits.times.append((query.now_s, view.queued_prefill_ns))

    def _forget(self, now_s: float) -> None:
        while self._window and self._window[0].at_s < now_s - WINDOW_S:
            old = self._window.popleft()
            if self._worker_of.get(old.key) == old.worker_id:
                del self._worker_of[old.key]
            history = self._histories[old.worker_id]
            history.prefill_ns -= old.prefill_ns
            history.decode_ns -= old.decode_ns
            self._forget_wait(old)

    def _forget_wait(self, old: _Assigned) -> None:
        if old.prefix is None:
            return
        waits = self._waits.get((old.prefix, old.worker_id))
        if waits is None:
            return
        if waits.times and waits.times[0][0] <= old.at_s:
            waits.times.popleft()
        if not waits.times:
            del self._waits[old.prefix, old.worker_id]

    def _history(self, view: WorkerView) -> _History:
        return self._histories.setdefault(view.worker_id, _History())


def e2_branch(query: Query, chosen: WorkerView) -> str:
    """Which rule a choice follows: `exploit`, `shift` (exploitation sent elsewhere), `explore`."""
    longest = max(query.cached_tokens.values(), default=0)
    if longest <= query.request.num_prompt_tokens - longest:
        return "explore"
    has_longest = query.cached_tokens.get(chosen.worker_id, 0) == longest
    return "exploit" if has_longest else "shift"


def _missed(query: Query, view: WorkerView) -> int:
    return query.request.num_prompt_tokens - query.cached_tokens.get(view.worker_id, 0)


def _prefill_ns(query: Query, view: WorkerView) -> float:
    return view.cost_model.prefill_ns(_missed(query, view), query.request.num_prompt_tokens)


def _decode_ns(query: Query, view: WorkerView) -> float:
    return query.num_output_tokens * query.request.num_choices * view.decode_step_ns


def _prefix(query: Query, view: WorkerView, longest: int) -> int:
    """The node of the tree that the longest match ends in, named by its prefix hash."""
    return query.request.prefix_hashes[max(1, longest // view.worker.page_size) - 1]
