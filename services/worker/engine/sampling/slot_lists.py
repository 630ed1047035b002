"""Lists of (token id, value) by slot, on the device: logit biases, and ids asked about.

Shapes: B rows of lists, W entries a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from services.worker.engine.attention.upload import upload_into


class SlotLists:
    """Owns entries [B, W, 2] int32 (id, bits of a float32) of the slots that have any; grows."""

    def __init__(self, device: torch.device) -> None:
        self.entries = torch.zeros((1, 4, 2), dtype=torch.int32, device=device)
        self._rows_by_slot: dict[int, int] = {}
        self._free_rows = [0]

    def assign(self, slot: int, entries: Sequence[tuple[int, float]]) -> int:
        """The slot's list from here on -> its row; 0 for no entries."""
        if not entries:
            self.release(slot)
            return 0
        row = self._rows_by_slot.get(slot)
        if row is None:
            if not self._free_rows:
                self._grow_rows()
            row = self._rows_by_slot[slot] = self._free_rows.pop()
        if len(entries) > self.entries.shape[1]:
            self._widen(len(entries))
        ids, values = zip(*entries, strict=True)
        packed = np.empty((len(entries), 2), np.int32)
        packed[:, 0] = ids
        packed[:, 1] = np.array(values, np.float32).view(np.int32)
        upload_into(self.entries[row, : len(entries)], packed)
        return row

    def release(self, slot: int) -> None:
        """The slot has no list any more; nothing happens when it had none."""
        row = self._rows_by_slot.pop(slot, None)
        if row is not None:
            self._free_rows.append(row)

    def _grow_rows(self) -> None:
        old = len(self.entries)
        self.entries = torch.cat((self.entries, torch.zeros_like(self.entries)))
        self._free_rows.extend(range(2 * old - 1, old - 1, -1))

    def _widen(self, needed: int) -> None:
        rows, width, _ = self.entries.shape
        wider = self.entries.new_zeros((rows, max(needed, 2 * width), 2))
        wider[:, :width] = self.entries
        self.entries = wider
