"""The sequences that run: each has a slot, pages for all its known tokens, and a locked path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.worker.engine.batch import Int32Array
from services.worker.engine.batching.cache import SequenceCache
from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.batching.sharing import ComingPages
from services.worker.engine.batching.slots import SlotTable


@dataclass(frozen=True, slots=True)
class PageSwap:
    """A sequence's page was in the tree already: it uses that one from the next step on."""

    slot: int
    epoch: int
    index: int
    page: int


class RunningSequences:
    """Owns the slots, and which sequences are in the middle of their prefill.

    A sequence prefills until all ids known at its admission are scheduled, then it decodes.
    """

    def __init__(self, cache: SequenceCache, num_slots: int) -> None:
        self.slots = SlotTable(num_slots)
        self._cache = cache
        # Both in order of admission.
        self._sequences: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._coming = ComingPages()
        self._swaps: list[PageSwap] = []
        self._num_admissions = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def prefilling(self) -> list[Sequence]:
        """Sequences with known tokens that are not scheduled, oldest first."""
        return list(self._prefilling)

    @property
    def num_unscheduled_tokens(self) -> int:
        """Known tokens of these that are in no step yet."""
        computed = self.slots.num_computed
        return sum(
            len(sequence.token_ids) - int(computed[sequence.slot]) for sequence in self._prefilling
        )

    def sequence_in(self, slot: int) -> Sequence:
        """Whose slot it is."""
        sequence = self.slots.sequences[slot]
        assert sequence is not None, "a row of a slot that is nobody's"
        return sequence

    def remaining_tokens(self) -> Int32Array:
        """Tokens that each slot's sequence may still produce; 0 for free slots."""
        return self.slots.end_len - self.slots.num_known

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether a prefill is about to compute the page after a waiting sequence's match."""
        max_pages = sequence.max_matched_tokens() // self._cache.page_size
        return self._coming.includes_next_of(sequence, max_pages)

    def to_preempt(self) -> Sequence:
        """The newest sequence of the lowest priority."""
        return min(self._sequences, key=_preemption_rank)

    def start(self, sequence: Sequence) -> int:
        """Give a sequence its slot and pages; returns the number of tokens found cached."""
        self._cache.acquire(sequence)
        num_cached = sequence.tail.depth * self._cache.page_size
        self.slots.take(sequence, num_cached)
        self._num_admissions += 1
        sequence.admission_number = self._num_admissions
        self._sequences[sequence] = None
        self._prefilling[sequence] = None
        return num_cached

    def stop(self, sequence: Sequence) -> None:
        """Take slot and pages back; results of its steps in flight are void from now on."""
        self._cache.release(sequence)
        self.slots.release(sequence)
        del self._sequences[sequence]
        self._prefilling.pop(sequence, None)
        self._coming.withdraw(sequence)

    def advance_prefill(self, sequence: Sequence, slot: int, stop: int) -> None:
        """Tokens up to `stop` are scheduled: their full pages can be shared at once."""
        self.slots.num_computed[slot] = stop
        self._store(sequence, slot, stop)
        known = len(sequence.token_ids)
        if stop < known:
            self._coming.announce(sequence)
            return
        self._coming.withdraw(sequence)
        del self._prefilling[sequence]
        if known < sequence.end_len:
            self.slots.start_decoding(slot)

    def store_generated(self, slot: int, num_tokens: int) -> None:
        """The ids of generated tokens that fill a page are known."""
        self._store(self.sequence_in(slot), slot, num_tokens)

    def take_swaps(self) -> list[PageSwap]:
        """Changes of pages that the device must hear of."""
        swaps = [swap for swap in self._swaps if self.slots.is_current(swap.slot, swap.epoch)]
        self._swaps.clear()
        return swaps

    def check(self) -> None:
        """Raise AssertionError unless every slot, lock and page is accounted for."""
        self._cache.check(self._sequences)
        taken = [sequence for sequence in self.slots.sequences if sequence is not None]
        assert set(taken) == set(self._sequences), "a slot is taken by nobody that runs"
        assert len(taken) + self.slots.num_free == len(self.slots.keys), "a slot is lost"
        assert set(self._prefilling) <= set(taken), "a prefill that does not run"

    def _store(self, sequence: Sequence, slot: int, num_tokens: int) -> None:
        for index in self._cache.store(sequence, num_tokens):
            epoch = int(self.slots.epochs[slot])
            self._swaps.append(PageSwap(slot, epoch, index, sequence.pages[index]))


def _preemption_rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, -sequence.admission_number
