"""Who holds pages: each holder's slot in the bit masks, and which holders a match may name."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Tiers of a page, nearest first.
GPU, HOST, REMOTE = range(3)
NUM_TIERS = 3
# A page in this tier or a nearer one: what a tier's leading pages are counted over.
THIS_AND_NEARER = (0b001, 0b011, 0b111)

# Bits of a mask below the slots' are its user's own; then come three a slot, one a tier.
FIRST_SLOT_BIT = 30

# Sets of holders whose names are remembered.
_MAX_NAMES = 4096


class Holder:
    """One worker's holding in the index, from one subscription's snapshot on.

    Owns slot `slot` of every mask until it is retired and scrubbed.
    """

    __slots__ = ("worker_id", "epoch", "slot", "gpu_bit", "num_pages")

    def __init__(self, worker_id: str, epoch: int, slot: int) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.slot = slot
        self.gpu_bit = 1 << (FIRST_SLOT_BIT + NUM_TIERS * slot)
        # By tier.
        self.num_pages = [0] * NUM_TIERS

    @property
    def bits(self) -> int:
        """Of every tier."""
        return self.gpu_bit * THIS_AND_NEARER[REMOTE]


class HolderNames(NamedTuple):
    """What a match says of one set of holders."""

    worker_ids: tuple[str, ...]
    epochs: tuple[int, ...]


class HolderTable:
    """Owns the slots. Invariant: a slot has one owner from `add` until `free`."""

    def __init__(self) -> None:
        # Bits of visible holders, of every tier and of the GPU's alone.
        self.visible_bits = 0
        self.visible_gpu = 0
        self._by_slot: list[Holder | None] = []
        self._free_slots: list[int] = []
        self._visible: list[Holder] = []
        self._names: dict[int, HolderNames] = {}

    def __iter__(self) -> Iterator[Holder]:
        return (holder for holder in self._by_slot if holder is not None)

    def add(self, worker_id: str, epoch: int) -> Holder:
        """A new holder, which is not visible yet."""
        if self._free_slots:
            slot = heapq.heappop(self._free_slots)
        else:
            slot = len(self._by_slot)
            self._by_slot.append(None)
        holder = Holder(worker_id, epoch, slot)
        self._by_slot[slot] = holder
        return holder

    def show(self, holder: Holder) -> None:
        """Idempotent."""
        if holder not in self._visible:
            self._set_visible([*self._visible, holder])

    def hide(self, holder: Holder) -> None:
        """Idempotent; its slot stays its own."""
        self._set_visible([other for other in self._visible if other is not holder])

    def free(self, holders: Iterable[Holder]) -> None:
        """No mask has a bit of these any more: others may have their slots."""
        for holder in holders:
            self._by_slot[holder.slot] = None
            heapq.heappush(self._free_slots, holder.slot)

    def owner(self, slot: int) -> Holder:
        holder = self._by_slot[slot]
        assert holder is not None, "a set bit has an owner"
        return holder

    def holdings(self, bits: int) -> Iterator[tuple[Holder, int]]:
        """The holder and the tier of each bit that is set, highest bit first."""
        while bits:
            position = bits.bit_length() - 1
            bits ^= 1 << position
            slot, tier = divmod(position - FIRST_SLOT_BIT, NUM_TIERS)
            yield self.owner(slot), tier

    def names(self, gpu_bits: int) -> HolderNames:
        """The visible holders whose GPU bits these are, remembered until the holders change."""
        return self._names.get(gpu_bits) or self._name(gpu_bits)

    def _name(self, gpu_bits: int) -> HolderNames:
        holders = [holder for holder, _ in self.holdings(gpu_bits)]
        names = HolderNames(
            tuple(holder.worker_id for holder in holders),
            tuple(holder.epoch for holder in holders),
        )
        if len(self._names) >= _MAX_NAMES:
            self._names.clear()
        self._names[gpu_bits] = names
        return names

    def _set_visible(self, holders: list[Holder]) -> None:
        self._visible = holders
        self.visible_gpu = sum(holder.gpu_bit for holder in holders)
        self.visible_bits = self.visible_gpu * THIS_AND_NEARER[REMOTE]
        self._names.clear()
