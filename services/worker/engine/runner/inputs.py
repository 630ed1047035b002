"""The device's tables over slots, and a plan turned into a forward pass's inputs.

Shapes: S rows of the step, T tokens, R rows that sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.worker.engine.attention.backend import AttentionInputs
from services.worker.engine.batch import LAST_SAMPLED, StepPlan
from services.worker.engine.layers.parameters import MIN_CPU_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What one forward pass and its sampling read."""

    # [T] on the device, int64; on a CPU with padding up to MIN_CPU_ROWS.
    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionInputs
    # [S] first token of each row in the step, on the host.
    first_tokens: npt.NDArray[np.int64]
    # [R], padded likewise: tokens whose hidden state is sampled from; None when it is all T.
    sample_tokens: torch.Tensor | None
    # [R] slots of the rows that sample, and positions of the tokens they get, on the host.
    sample_slots: npt.NDArray[np.int32]
    sample_positions: npt.NDArray[np.int64]


class SlotTables:
    """Owns the page table and the last sampled ids, both by slot.

    The page table has a twin on the host, from which pool locations are computed.
    """

    def __init__(
        self, *, num_slots: int, max_pages: int, page_size: int, device: torch.device
    ) -> None:
        self._page_size = page_size
        self._device = device
        self._host_pages = np.zeros((num_slots, max_pages), np.int32)
        self.last_ids = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # On a CPU both twins are the same memory.
        self._page_table = torch.from_numpy(self._host_pages).to(device)

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Apply the plan's page changes and lay out its tokens."""
        self._apply_page_changes(plan)
        num_tokens, starts = plan.num_tokens, plan.start_positions.astype(np.int64)
        ends = np.cumsum(num_tokens, dtype=np.int64)
        first_tokens = ends - num_tokens
        if len(plan.token_ids) == len(num_tokens):
            token_slots, positions = plan.slots, starts
        else:
            token_slots = np.repeat(plan.slots, num_tokens)
            positions = np.arange(ends[-1]) + np.repeat(starts - first_tokens, num_tokens)
        pages = self._host_pages[token_slots, positions // self._page_size].astype(np.int64)
        locations = pages * self._page_size + positions % self._page_size
        sample_rows = plan.sample_rows
        return StepInputs(
            token_ids=self._padded(self._resolve_ids(plan.token_ids, token_slots)),
            positions=self._padded(self._upload(positions)),
            attention=AttentionInputs(
                slots=plan.slots,
                num_tokens=num_tokens,
                start_positions=plan.start_positions,
                page_table=self._page_table,
                locations=self._upload(locations),
            ),
            first_tokens=first_tokens,
            sample_tokens=(
                None
                if len(sample_rows) == len(plan.token_ids)
                else self._padded(self._upload(ends[sample_rows] - 1))
            ),
            sample_slots=plan.slots[sample_rows],
            sample_positions=starts[sample_rows] + num_tokens[sample_rows],
        )

    def _apply_page_changes(self, plan: StepPlan) -> None:
        if not len(plan.page_slots):
            return
        self._host_pages[plan.page_slots, plan.page_indices] = plan.page_ids
        if self._device.type != "cpu":
            index = (self._upload(plan.page_slots), self._upload(plan.page_indices))
            self._page_table.index_put_(index, torch.from_numpy(plan.page_ids).to(self._device))

    def _resolve_ids(
        self, token_ids: npt.NDArray[np.int32], token_slots: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        resolved = self._upload(token_ids)
        unknown = np.flatnonzero(token_ids == LAST_SAMPLED)
        if unknown.size:
            where = self._upload(unknown)
            resolved[where] = self.last_ids[self._upload(token_slots[unknown])]
        return resolved

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu" and len(values) == 1:
            return values.expand(MIN_CPU_ROWS)
        return values

    def _upload(self, values: npt.NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device, non_blocking=True)
