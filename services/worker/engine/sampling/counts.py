"""Which tokens sequences with penalties have seen, on the device.

Shapes: C rows of counts, V vocabulary, R rows of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from services.worker.engine.attention.upload import upload


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyRows:
    """The penalties of those rows of a step that have any."""

    # [R] rows of the step's logits, and their rows of counts.
    rows: torch.Tensor
    count_rows: torch.Tensor
    # [R, 1] float32
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


class TokenCounts:
    """Owns counts [C, V] for the slots that have penalties; grows when they become more.

    Assigning does not wait for the device.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.prompt_seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self.output_counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._rows_by_slot: dict[int, int] = {}
        self._free_rows: list[int] = []

    def assign(self, slot: int, prompt_ids: list[int], output_ids: list[int]) -> None:
        """Start counting for a slot."""
        row = self._rows_by_slot.get(slot)
        if row is None:
            if not self._free_rows:
                self._grow()
            row = self._free_rows.pop()
            self._rows_by_slot[slot] = row
        seen, counts = self.prompt_seen[row].zero_(), self.output_counts[row].zero_()
        prompt, output = upload(
            seen.device, np.array(prompt_ids, np.int64), np.array(output_ids, np.int64)
        )
        seen.index_fill_(0, prompt, True)
        counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def release(self, slot: int) -> None:
        """Stop counting for a slot; nothing happens when it was not counted."""
        row = self._rows_by_slot.pop(slot, None)
        if row is not None:
            self._free_rows.append(row)

    def row(self, slot: int) -> int:
        """The slot's row of counts."""
        return self._rows_by_slot[slot]

    def add(self, penalties: PenaltyRows, token_ids: torch.Tensor) -> None:
        """Count each row's sampled token; `token_ids` are those of all rows of the step."""
        self.output_counts[penalties.count_rows, token_ids[penalties.rows]] += 1

    def apply(self, logits: torch.Tensor, penalties: PenaltyRows) -> None:
        """Penalise the rows of `logits` in place.

        Repetition (Keskar et al., arXiv 1909.05858) divides positive and multiplies negative
        logits of tokens in prompt or output; then frequency is subtracted once for each time a
        token is in the output, and presence once.
        """
        counts = self.output_counts[penalties.count_rows]
        in_output = counts > 0
        seen = in_output | self.prompt_seen[penalties.count_rows]
        rows = logits[penalties.rows]
        repeated = torch.where(rows > 0, rows / penalties.repetition, rows * penalties.repetition)
        rows = torch.where(seen, repeated, rows)
        rows -= penalties.frequency * counts
        rows -= penalties.presence * in_output
        logits[penalties.rows] = rows

    def _grow(self) -> None:
        old = len(self.prompt_seen)
        added = max(4, old)
        self.prompt_seen = _with_rows(self.prompt_seen, added)
        self.output_counts = _with_rows(self.output_counts, added)
        self._free_rows.extend(range(old + added - 1, old - 1, -1))


def _with_rows(tensor: torch.Tensor, added: int) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros((added, tensor.shape[1]))))
