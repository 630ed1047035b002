"""The prediction overlay: pages of placed requests, counted as present before events say so.

The cache index hears of pages only when a worker has scheduled them. Without the overlay, a burst
of requests with one new prefix would look cold on every worker and scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A page counts for one to two of these; by then its stored event has come, or will not.
GENERATION_S = 2.0
MAX_GENERATION_MARKS = 131_072
# Every so many pages of a chain are marked: a hint may be three pages short, and costs a quarter.
STRIDE = 4


class PredictionOverlay:
    """Prefix hash -> workers (one bit each) for every STRIDE-th page predicted lately.

    Two generations: marks enter the current one, the previous one is dropped whole when the
    generations turn, by time or when the current one is full; so memory is bounded and nothing is
    ever expired one by one. Invariant: within a generation, a worker that has a mark of a chain
    has all marks before it (chains enter whole), so the depth of a match is found by bisection.
    """

    def __init__(self, now: float = 0.0, max_marks: int = MAX_GENERATION_MARKS) -> None:
        self._max_marks = max_marks
        self._turned_at = now
        self._current: dict[int, int] = {}
        self._previous: dict[int, int] = {}
        self._slots: dict[str, int] = {}
        self._names: list[str | None] = []
        # Slots of gone workers, and those whose last bits leave with the previous generation.
        self._free: list[int] = []
        self._retiring: list[int] = []
        self._retired: list[int] = []

    @property
    def num_marks(self) -> int:
        return len(self._current) + len(self._previous)

    @property
    def num_slots(self) -> int:
        return len(self._names)

    def add(self, worker_id: str, prefix_hashes: Sequence[int], now: float) -> None:
        """The chain's pages will be on the worker."""
        self.turn(now)
        marks = prefix_hashes[STRIDE - 1 :: STRIDE][: self._max_marks]
        if len(self._current) + len(marks) > self._max_marks:
            self._turn(now)
        held_by, bit = self._current, 1 << self._slot(worker_id)
        # [0, own): the worker has them; [own, known): others do; [known, end): nobody does.
        known = _depth(len(marks), lambda i: marks[i] in held_by)
        own = _depth(known, lambda i: bool(held_by[marks[i]] & bit))
        for mark in marks[own:known]:
            held_by[mark] |= bit
        held_by.update(dict.fromkeys(marks[known:], bit))

    def match(self, prefix_hashes: Sequence[int], now: float) -> dict[str, int]:
        """Leading pages by worker; workers without any are left out."""
        self.turn(now)
        matched: dict[str, int] = {}
        marks = prefix_hashes[STRIDE - 1 :: STRIDE]
        for held_by in (self._previous, self._current):
            if not marks or marks[0] not in held_by:
                continue
            for slot, depth in _depths(held_by, marks):
                name = self._names[slot]
                if name is not None and depth * STRIDE > matched.get(name, 0):
                    matched[name] = depth * STRIDE
        return matched

    def forget_worker(self, worker_id: str) -> None:
        """The worker is gone; its slot is used again only when no mark has its bit."""
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            self._names[slot] = None
            self._retiring.append(slot)

    def turn(self, now: float) -> None:
        """Drop what is too old."""
        if now - self._turned_at >= GENERATION_S:
            if now - self._turned_at >= 2 * GENERATION_S:
                self._turn(now)
            self._turn(now)

    def _turn(self, now: float) -> None:
        self._previous, self._current = self._current, {}
        self._turned_at = now
        self._free += self._retired
        self._retired, self._retiring = self._retiring, []

    def _slot(self, worker_id: str) -> int:
        slot = self._slots.get(worker_id)
        if slot is None:
            if self._free:
                slot = self._free.pop()
                self._names[slot] = worker_id
            else:
                slot = len(self._names)
                self._names.append(worker_id)
            self._slots[worker_id] = slot
        return slot


def _depths(held_by: dict[int, int], marks: Sequence[int]) -> list[tuple[int, int]]:
    """(slot, depth) of every worker that holds a chain's first mark.

    Deepest first: the workers that hold the deepest mark hold all before it, so each round looks
    only for those not seen yet.
    """
    found: list[tuple[int, int]] = []
    unseen = held_by[marks[0]]
    end = len(marks)
    while unseen:
        end = _depth(end, lambda i: bool(held_by.get(marks[i], 0) & unseen))  # noqa: B023
        here = held_by[marks[end - 1]] & unseen
        unseen &= ~here
        while here:
            lowest = here & -here
            found.append((lowest.bit_length() - 1, end))
            here ^= lowest
    return found


def _depth(end: int, holds: Callable[[int], bool]) -> int:
    """Number of leading marks that `holds` is true for; true ones all come first."""
    low = 0
    while low < end:
        middle = (low + end) // 2
        if holds(middle):
            low = middle + 1
        else:
            end = middle
    return low
