"""The host's side of the device's slots: one row of numbers a slot, as arrays.

A step over hundreds of decoding sequences is planned and applied with a few array operations;
Python objects are touched only where a page begins or a sequence ends.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from services.worker.engine.batch import Int32Array
from services.worker.engine.batching.order import DecodeOrder
from services.worker.engine.batching.sequence import Sequence

_NOBODY: frozenset[int] = frozenset()


class SlotTable:
    """Owns which slot is whose; the lowest free slot is taken first.

    A slot's epoch grows when it is released, so that a result of a step in flight can be told
    to be of a sequence that is gone.
    """

    def __init__(self, num_slots: int) -> None:
        # Tokens whose keys and values are in place once all issued steps are done.
        self.num_computed: Int32Array = np.zeros(num_slots, np.int32)
        # Tokens whose ids are known.
        self.num_known: Int32Array = np.zeros(num_slots, np.int32)
        self.end_len: Int32Array = np.zeros(num_slots, np.int32)
        # end_len once all ids known at admission are scheduled, else 0: gates decoding.
        self.decode_end_len: Int32Array = np.zeros(num_slots, np.int32)
        self.last_ids: Int32Array = np.zeros(num_slots, np.int32)
        self.epochs: npt.NDArray[np.int64] = np.zeros(num_slots, np.int64)
        self.sequences: list[Sequence | None] = [None] * num_slots
        self.keys: list[int] = [0] * num_slots
        self.token_ids: list[list[int]] = [[] for _ in range(num_slots)]
        self.stop_ids: list[frozenset[int]] = [_NOBODY] * num_slots
        # By id, the number of slots whose sequences it ends.
        self._num_stopped_by: dict[int, int] = {}
        self._free = list(range(num_slots))
        self._order = DecodeOrder()

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def take(self, sequence: Sequence, num_computed: int) -> int:
        """Give `sequence`, whose first tokens are in place, a slot. One must be free."""
        slot = heapq.heappop(self._free)
        sequence.slot = slot
        self.num_computed[slot] = num_computed
        self.num_known[slot] = len(sequence.token_ids)
        self.end_len[slot] = sequence.end_len
        self.decode_end_len[slot] = 0
        self.sequences[slot] = sequence
        self.keys[slot] = sequence.key
        self.token_ids[slot] = sequence.token_ids
        self.stop_ids[slot] = sequence.stop_ids
        for token_id in sequence.stop_ids:
            self._num_stopped_by[token_id] = self._num_stopped_by.get(token_id, 0) + 1
        return slot

    def release(self, sequence: Sequence) -> None:
        """Take the slot of `sequence` back."""
        slot = sequence.slot
        assert slot is not None, "releasing a slot that was not taken"
        assert self.sequences[slot] is sequence, "a slot is another sequence's"
        sequence.slot = None
        self.epochs[slot] += 1
        self.num_computed[slot] = self.num_known[slot] = 0
        self.end_len[slot] = self.decode_end_len[slot] = 0
        self.sequences[slot] = None
        self.token_ids[slot] = []
        self.stop_ids[slot] = _NOBODY
        for token_id in sequence.stop_ids:
            self._num_stopped_by[token_id] -= 1
            if not self._num_stopped_by[token_id]:
                del self._num_stopped_by[token_id]
        self._order.leave(slot)
        heapq.heappush(self._free, slot)

    def stopped(self, slots: list[int], token_ids: list[int]) -> list[tuple[int, int]]:
        """The slots, with their new ids, whose sequences these ids end."""
        if self._num_stopped_by.keys().isdisjoint(token_ids):
            return []
        return [
            (slot, token_id)
            for slot, token_id in zip(slots, token_ids, strict=True)
            if token_id in self.stop_ids[slot]
        ]

    def start_decoding(self, slot: int) -> None:
        """All ids known at admission are scheduled: from now on its rows are single tokens."""
        self.decode_end_len[slot] = self.end_len[slot]
        sequence = self.sequences[slot]
        assert sequence is not None, "a slot that is nobody's decodes"
        self._order.join(slot, sequence.pages[: sequence.tail.depth])

    def decoding_slots(self) -> npt.NDArray[np.intp]:
        """Slots whose next token is to be computed in this step, common prefixes together.

        The last token before end_len is sampled from the one before it and never computed.
        """
        slots = self._order.slots
        return slots[self.num_computed[slots] + 1 < self.decode_end_len[slots]]

    def is_current(self, slot: int, epoch: int) -> bool:
        """Whether the slot's sequence is still the one that had it in `epoch`."""
        return bool(self.epochs[slot] == epoch)
